"""The sampler: what it draws once, in which batches, and for whom."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from training_helpers import TEXT_WIDTH, VISION_WIDTH, lively, tiny_model

from fluxdit_jax.dataset.fields import BF16
from fluxdit_jax.gate.sampler import Request, Sampler
from fluxdit_jax.model import dit
from fluxdit_jax.objective import patch_statistics
from fluxdit_jax.sampling.pipeline import Generator


class Grey:
    """A decoder that shows the first channel."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        grey = np.clip(128 + 40 * latents[:, :1], 0, 255).astype(np.uint8)
        return np.repeat(np.transpose(grey, (0, 2, 3, 1)), 3, axis=3)


def request(number: int, seed: int, grid: tuple[int, int] = (2, 2), guidance: float = 1.0) -> Request:
    rng = np.random.default_rng(number)
    vision = rng.normal(size=VISION_WIDTH).astype(np.float32)
    text = rng.normal(size=(3, TEXT_WIDTH)).astype(BF16)
    conditions = {"text": text, "vision": vision / np.linalg.norm(vision)}
    return Request(f"caption {number}", conditions, grid, seed, guidance)


def without(one: Request, name: str) -> Request:
    return dataclasses.replace(one, conditions={n: value for n, value in one.conditions.items() if n != name})


@pytest.fixture(scope="module")
def model() -> tuple[Generator, object]:
    config = tiny_model(depth=1, width=16)
    statistics = patch_statistics((0.0,) * config.channels, (1.0,) * config.channels, config.patch)
    generator = Generator(
        config, tokens=4, lengths={"text": 4}, shift=1.0, statistics=statistics, steps=1, method="euler", batch_size=2
    )
    return generator, lively(dit.build(config)[1])


def sampler(model: tuple[Generator, object]) -> Sampler:
    return Sampler(*model, Grey())


def test_each_picture_is_drawn_once_in_full_batches_and_is_the_same_alone(model) -> None:
    done = list[int]()
    asked = [request(0, 0), request(1, 1), request(0, 0), request(0, 2), request(2, 0, (1, 3)), request(2, 0)]
    first = sampler(model)
    assert [one.key for one in first.missing(asked)] == [asked[k].key for k in (0, 1, 3, 4, 5)]
    first.draw(asked, done.append)
    assert done == [2, 2, 1] and first.missing(asked) == []
    first.draw([*asked, request(0, 3)])
    together = first(asked)
    assert done == [2, 2, 1]
    assert (together[0] == together[2]).all() and together[0].dtype == np.uint8
    assert [image.shape[:2] for image in together] == [(4, 4)] * 4 + [(2, 6), (4, 4)]
    different = [together[k] for k in (0, 1, 3, 5)]
    assert all((a != b).any() for k, a in enumerate(different) for b in different[:k])
    alone = sampler(model)
    for k in (3, 4):
        assert np.abs(alone([asked[k]])[0].astype(int) - together[k]).max() <= 1


def test_each_guidance_is_a_batch_of_its_own_and_another_picture(model) -> None:
    done = list[int]()
    asked = [request(0, 0, guidance=3.0), request(0, 0), request(1, 0, guidance=3.0), request(1, 0), request(2, 0)]
    first = sampler(model)
    assert [one.guidance for one in first.missing(asked)] == [1, 1, 1, 3, 3]
    first.draw(asked, done.append)
    assert done == [2, 1, 2]
    guided, own, *_ = first(asked)
    assert (guided != own).any()
    (alone,) = sampler(model)(asked[:1])
    assert np.abs(alone.astype(int) - guided).max() <= 1


def test_a_condition_that_is_not_given_is_left_out(model) -> None:
    whole = request(0, 0)
    asked = [whole, without(whole, "text"), without(whole, "vision")]
    pictures = sampler(model)(asked)
    assert len({image.tobytes() for image in pictures}) == 3
    other_words = dataclasses.replace(without(request(1, 0), "vision"), caption=whole.caption)
    assert other_words.key == asked[2].key  # a caption is known by its words
    silent = dataclasses.replace(asked[1], caption="whatever")
    assert silent.key == asked[1].key
