"""From conditions to latents: what is asked of the network, and that the answer is put together rightly."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import linear_network
import numpy as np
import pytest
from training_helpers import TEXT_WIDTH, VISION_WIDTH, make_record, tiny_model
from training_helpers import conditions as kinds

from fluxdit_jax import flow
from fluxdit_jax.dataset.fields import BF16
from fluxdit_jax.model import dit
from fluxdit_jax.model.patches import unpatchify
from fluxdit_jax.objective import patch_statistics
from fluxdit_jax.sampling.pipeline import Generator, _padded, conditions, record_conditions
from fluxdit_jax.sampling.solvers import Guidance

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

MEAN, STD = (0.5, -1.0, 0.0, 2.0), (2.0, 1.0, 0.5, 3.0)
SHIFT, STEPS, TOKENS, TEXT_TOKENS = 2.0, 3, 6, 4
GRIDS = [(2, 3), (3, 1), (1, 2), (2, 2), (1, 5)]
LENGTHS = [3, 0, 1, 9, 4]


def given() -> list[dict[str, np.ndarray | None]]:
    """Per picture a text of `LENGTHS`, and a vector for all but the third."""
    rng = np.random.default_rng(0)
    texts = [rng.normal(size=(length, TEXT_WIDTH)).astype(BF16) for length in LENGTHS]
    vectors: list = [rng.normal(size=VISION_WIDTH).astype(np.float32) for _ in LENGTHS]
    vectors[2] = None
    return [{"text": text, "vision": vector} for text, vector in zip(texts, vectors, strict=True)]


# -------------------------------------------------------------------------------------------------- conditions


def test_conditions_are_stacked_and_what_is_missing_is_marked() -> None:
    found = conditions(kinds(), given(), GRIDS)
    assert found["text"].shape == (5, 9, TEXT_WIDTH) and found["text"].dtype == BF16
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(found["text"][row, :length], given()[row]["text"])
        assert not found["text"][row, length:].any()
    assert found["text_length"].tolist() == [3, 1, 1, 9, 4]  # an empty text has the length 1 that the network wants
    assert found["keep_text"].tolist() == [True, False, True, True, True]
    assert found["keep_vision"].tolist() == [True, True, False, True, True]
    for row, vector in enumerate(one["vision"] for one in given()):
        np.testing.assert_array_equal(found["vision"][row], np.zeros(VISION_WIDTH) if vector is None else vector)
    assert found["grid"].tolist() == [list(grid) for grid in GRIDS]


def test_a_single_picture_without_conditions() -> None:
    found = conditions(kinds(), [{"text": np.zeros((0, TEXT_WIDTH), BF16), "vision": None}], [(2, 3)])
    assert found["text"].shape == (1, 1, TEXT_WIDTH) and found["text_length"].tolist() == [1]
    assert not found["keep_text"].any() and not found["keep_vision"].any()


@pytest.mark.parametrize(("limit", "length"), [(None, 4), (2, 2)])
def test_conditions_of_a_record(limit: int | None, length: int) -> None:
    record = make_record(3, size=(6, 10))
    found = record_conditions(kinds(), [record], 2, limit)
    assert found["grid"].tolist() == [[3, 5]] and found["text_length"].tolist() == [length]
    np.testing.assert_array_equal(found["text"][0], record.text[:length])
    np.testing.assert_array_equal(found["vision"][0], record.vision)


# ----------------------------------------------------------------------------------------------------- latents


def generator(batch_size: int, **changes) -> Generator:
    values = {
        "tokens": TOKENS, "lengths": {"text": TEXT_TOKENS}, "shift": SHIFT, "steps": STEPS, "method": "euler",
        "statistics": patch_statistics(MEAN, STD, 2), "graph": linear_network.build()[0],
    }  # fmt: skip
    return Generator(tiny_model(), batch_size=batch_size, **values | changes)


def by_hand(row: int, noise: np.ndarray, guidance: Guidance, kept: tuple[str, ...] = ("text", "vision")) -> np.ndarray:
    """The latent of a picture; padding counts as zeros, also in the deviation that `rescale` takes."""
    own_conditions, grid = given()[row], GRIDS[row]
    text = own_conditions["text"] if LENGTHS[row] and "text" in kept else None
    vector = own_conditions["vision"] if "vision" in kept else None
    own = np.arange(TOKENS) < grid[0] * grid[1]
    x = np.where(own[:, None], noise.astype(np.float64), 0)
    times = flow.shift_time(np.linspace(1, 0, STEPS + 1), SHIFT)
    for t, after in itertools.pairwise(times):
        none, of_text, both = (
            np.where(own[:, None], linear_network.velocity(x, t, grid, *conditions), 0)
            for conditions in ((None, None), (text, None), (text, vector))
        )
        v = none + guidance.of("text") * (of_text - none) + guidance.of("vision") * (both - of_text)
        v *= 1 - guidance.rescale + guidance.rescale * both.std() / v.std()
        x = x + (after - t) * v
    mean, std = patch_statistics(MEAN, STD, 2)
    return unpatchify(x * std + mean, grid, 2)


@pytest.mark.parametrize(
    "guidance", [Guidance(), Guidance({"text": 3.0}), Guidance({"text": 2.0, "vision": 0.5}, rescale=0.7)]
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_latents_by_hand(batch_size: int, guidance: Guidance) -> None:
    """Pictures of other sizes and texts; the third has no vector, the second no caption, one batch is not full."""
    drawing = generator(batch_size)
    params = drawing.cast(linear_network.build()[1])
    noise = drawing.noise([7, 7, 8, 9, 10])
    done: list[int] = []
    latents = drawing.latents(params, conditions(kinds(), given(), GRIDS), noise, done.append, guidance)
    for row, latent in enumerate(latents):
        assert latent.shape == (4, 2 * GRIDS[row][0], 2 * GRIDS[row][1])
        np.testing.assert_allclose(latent, by_hand(row, noise[row], guidance), rtol=1e-4, atol=1e-4)
    assert done == ([1] * 5 if batch_size == 1 else [3, 1, 1])


@pytest.mark.parametrize(
    ("kept", "scales", "evaluations"),
    [
        (("text", "vision"), {}, 1),
        (("text", "vision"), {"text": 2.0}, 3),
        (("text",), {"text": 2.0, "vision": 3.0}, 2),
        (("vision",), {"text": 2.0, "vision": 3.0}, 2),
        ((), {"text": 2.0}, 1),
    ],
)
def test_guidance_costs_one_evaluation_more_for_each_given_condition(
    kept: tuple[str, ...], scales: dict[str, float], evaluations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, original = set(), linear_network.Linear.__call__

    def call(self, x, *given):
        asked.add(len(x))
        return original(self, x, *given)

    monkeypatch.setattr(linear_network.Linear, "__call__", call)
    drawing, row = generator(batch_size=1), 4
    wanted = conditions(kinds(), [{name: given()[row][name] for name in kept}], [GRIDS[row]])
    noise = drawing.noise([3])
    (latent,) = drawing.latents(drawing.cast(linear_network.build()[1]), wanted, noise, guidance=Guidance(scales))
    assert asked == {evaluations}
    np.testing.assert_allclose(latent, by_hand(row, noise[0], Guidance(scales), kept), rtol=1e-4, atol=1e-4)


def test_noise_depends_on_its_seed_alone() -> None:
    drawing = generator(2)
    noise = drawing.noise([5, 6, 5])
    assert noise.shape == (3, TOKENS, 16) and noise.dtype == np.float32
    np.testing.assert_array_equal(noise[0], noise[2])
    assert (noise[0] != noise[1]).all() and abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.2


def test_text_is_padded_to_the_training_length_or_a_power_of_two_of_it() -> None:
    """A batch has texts of one padded length only."""
    lengths = np.array([1, 17, 4, 5, 8, 9, 16, 2])
    found = [(rows.tolist(), length) for rows, length in generator(2)._batches({"text_length": lengths})]
    expected = [([0, 2], 4), ([7], 4), ([3, 4], 8), ([5, 6], 16), ([1], 32)]
    assert found == [(rows, {"text": length}) for rows, length in expected]


@pytest.mark.parametrize("length", [2, 3, 8])
def test_texts_are_padded_to_just_that_length(length: int) -> None:
    text = np.random.default_rng(0).normal(size=(2, 3, TEXT_WIDTH)).astype(BF16)
    padded = _padded(text, length)
    assert padded.shape == (2, length, TEXT_WIDTH) and padded.dtype == BF16
    np.testing.assert_array_equal(padded[:, :3], text[:, :length])
    assert not padded[:, 3:].any()


def test_weights_are_cast_and_the_network_is_that_of_the_configuration() -> None:
    config = tiny_model(dtype="bfloat16")
    drawing = Generator(
        config,
        tokens=TOKENS,
        lengths={"text": 4},
        shift=1.0,
        statistics=patch_statistics(MEAN, STD, 2),
        steps=1,
        batch_size=1,
    )
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), dit.build(config)[1])
    params = drawing.cast(zeros)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    wanted = conditions(kinds(), given(), GRIDS)
    run = functools.partial(drawing._run, guided=("text", "vision"))
    noise, scales = np.zeros((5, TOKENS, 16), np.float32), np.zeros(2, np.float32)
    found = jax.eval_shape(run, params, wanted, noise, scales, np.float32(0))
    assert (found.shape, found.dtype) == ((5, TOKENS, 16), jnp.float32)
