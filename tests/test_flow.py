"""The path, the time density and the draws, against closed forms and against each other."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import dropping, tiny_flow

from fluxdit_jax import flow

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

NAMES = ("text", "vision")
MANY = np.arange(10_000, dtype=np.uint32)


def time_cdf(t, config):
    """P(time <= t) of the density that `FlowConfig` describes, in float64."""
    t = np.asarray(t, np.float64)
    t = t / (config.shift - (config.shift - 1) * t)  # undo the shift
    z = (np.log(t / (1 - t)) - config.mean) / config.std
    normal = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in z])
    return config.uniform_share * t + (1 - config.uniform_share) * normal


def distance_to_uniform(u):
    """The Kolmogorov-Smirnov statistic of values that should be uniform."""
    u, n = np.sort(u), len(u)
    return max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max())


# ------------------------------------------------------------------------------------------------ time


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mean": -0.6, "std": 0.7},
        {"shift": 3.0},
        {"uniform_share": 1.0},
        {"uniform_share": 0.3, "mean": 1.0, "shift": 0.5},
    ],
)
def test_time_has_the_density_of_the_configuration(changes):
    config = tiny_flow(**changes)
    t = np.asarray(flow.draw_time(config, 7, MANY, 16))
    assert t.dtype == np.float32 and t.shape == MANY.shape
    assert t.min() > 0 and t.max() < 1
    # 1.63 / sqrt(n) is exceeded by one seed in a hundred; the seed is fixed
    assert distance_to_uniform(time_cdf(t, config)) < 1.63 / math.sqrt(len(t))
    other = tiny_flow(**({"mean": 0.1} | changes | {"std": config.std * 1.1}))
    if config.uniform_share < 1:
        assert distance_to_uniform(time_cdf(t, other)) > 1.63 / math.sqrt(len(t))


@pytest.mark.parametrize("changes", [{}, {"shift": 2.0, "mean": 0.5}, {"uniform_share": 1.0}])
def test_stratified_times_fall_into_different_quantiles_of_every_batch(changes):
    batch, steps = 32, 6
    config = tiny_flow(stratified=True, **changes)
    draw = jax.jit(lambda index: flow.draw_time(config, 3, index, batch))
    quantiles = time_cdf(draw(np.arange(batch * steps, dtype=np.uint32)), config).reshape(steps, batch)
    orders = np.floor(quantiles * batch - 1e-4 * (quantiles * batch % 1 > 0.5)).astype(int)
    for order in orders:
        assert sorted(order) == list(range(batch))
    assert len({tuple(order) for order in orders}) == steps  # another sample gets the noisy end each time
    within = quantiles * batch - orders
    assert distance_to_uniform(within.ravel()) < 1.63 / math.sqrt(batch * steps)


def test_the_uniform_share_is_stratified_apart():
    """A quarter of each batch is uniform, one in each of its own quantiles; the rest stands near 0.9997."""
    config = tiny_flow(stratified=True, uniform_share=0.25, mean=8.0, std=1e-3)
    t = np.asarray(flow.draw_time(config, 0, np.arange(64, dtype=np.uint32), 32)).reshape(2, 32)
    for batch in t:
        uniform = batch[batch < 0.999]
        assert sorted(np.floor(uniform * 8)) == list(range(8))
        np.testing.assert_allclose(batch[batch >= 0.999], 1 / (1 + np.exp(-8)), rtol=1e-5)


def test_stratified_and_plain_times_have_one_density():
    config = tiny_flow(stratified=True, mean=0.4, shift=1.7)
    t = flow.draw_time(config, 0, np.arange(4096, dtype=np.uint32), 64)
    assert distance_to_uniform(time_cdf(t, config)) < 0.5 / math.sqrt(4096)


def test_times_stay_inside_the_unit_interval_at_the_edges():
    for changes in ({"std": 50.0}, {"uniform_share": 1.0, "shift": 100.0}, {"shift": 0.01}):
        t = np.asarray(flow.draw_time(tiny_flow(**changes), 0, MANY, 8))
        assert np.isfinite(t).all() and t.min() > 0 and t.max() <= 1


def test_the_outermost_quantiles_are_those_at_a_millionth():
    """A uniform number may be 0, and with strata round to 1."""
    outermost = np.array([0.0, 1.0], np.float32)
    z = 4.753424  # of the standard normal at 1 - 1e-6
    for mean, std in ((0.0, 1.0), (0.5, 0.1)):
        expected = 1 / (1 + np.exp(-mean - std * np.array([-z, z])))
        t = flow.time_at_quantile(tiny_flow(mean=mean, std=std), outermost)
        np.testing.assert_allclose(t, expected, rtol=1e-3)  # 1 - 1e-6 has six bits of its own in f32
    wide = np.asarray(flow.time_at_quantile(tiny_flow(std=50.0), outermost))
    np.testing.assert_allclose([wide[0], 1 - wide[1]], 1e-6, rtol=0.1)


def test_another_seed_or_position_gives_other_times():
    config = tiny_flow()
    a = np.asarray(flow.draw_time(config, 0, MANY[:100], 8))
    assert len(np.unique(a)) == 100
    assert not np.intersect1d(a, flow.draw_time(config, 1, MANY[:100], 8)).size
    far = np.array([2**31, 2**32 - 1], np.uint32)
    assert np.unique(np.concatenate([a, flow.draw_time(config, 0, far, 8)])).size == 102


@given(st.floats(0.0, 1.0), st.floats(0.05, 20.0), st.floats(0.05, 20.0))
@settings(max_examples=200, deadline=None)
def test_shift_identities(t, a, b):
    assert math.isclose(flow.shift_time(t, 1.0), t, abs_tol=1e-12)
    assert math.isclose(flow.shift_time(flow.shift_time(t, a), 1 / a), t, abs_tol=1e-9)
    assert math.isclose(
        flow.shift_time(flow.shift_time(t, a), b), flow.shift_time(t, a * b), rel_tol=1e-9, abs_tol=1e-9
    )
    assert flow.shift_time(0.0, a) == 0 and math.isclose(flow.shift_time(1.0, a), 1)
    # what a shift does: it multiplies the ratio of noise to signal by s
    if 0.01 < t < 0.99:
        shifted = flow.shift_time(t, a)
        assert math.isclose(shifted / (1 - shifted), a * t / (1 - t), rel_tol=1e-6)


def test_shift_by_token_count():
    assert [flow.shift_for_tokens(n) for n in (64, 256, 1024, 4096)] == [1.0, 1.0, 2.0, 4.0]


# ------------------------------------------------------------------------------------------------ draws


@pytest.mark.parametrize("optimised", [False, True])
def test_draws_do_not_depend_on_how_the_batch_is_split(optimised):
    config = tiny_flow(stratified=True, uniform_share=0.2, drop=dropping(0.1, 0.3, 0.2))
    batch, steps = 12, 2

    def draw(index):
        return (
            flow.draw_time(config, 5, index, batch),
            flow.draw_noise(5, index, (3, 5)),
            flow.draw_kept_conditions(config, NAMES, 5, index),
        )

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", not optimised)
    try:
        whole = [np.asarray(x) for x in jax.tree.leaves(jax.jit(draw)(np.arange(batch * steps, dtype=np.uint32)))]
        for size in (1, 3, 4, 12):
            parts = [
                jax.tree.leaves(jax.jit(draw)(np.arange(first, first + size, dtype=np.uint32)))
                for first in range(0, batch * steps, size)
            ]
            for together, pieces in zip(whole, zip(*parts, strict=True), strict=True):
                assert np.concatenate(pieces).tobytes() == together.tobytes(), size
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def test_noise_is_standard_normal_and_its_own_for_every_sample():
    noise = np.asarray(flow.draw_noise(0, MANY[:400], (5, 10)))
    assert noise.dtype == np.float32 and noise.shape == (400, 5, 10)
    flat = noise.ravel().astype(np.float64)
    quantiles = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in flat])
    assert distance_to_uniform(quantiles) < 1.63 / math.sqrt(len(flat))
    assert len(np.unique(flat)) > 0.99 * len(flat)
    correlation = np.corrcoef(noise.reshape(400, 50).T)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / math.sqrt(400)
    assert not np.array_equal(noise, flow.draw_noise(1, MANY[:400], (5, 10)))


def test_time_noise_and_dropped_conditions_are_independent():
    index = MANY[:4000]
    config = tiny_flow(drop=dropping(text=0.5))
    time = np.asarray(flow.draw_time(config, 0, index, 8))
    noise = np.asarray(flow.draw_noise(0, index, (8,)))
    kept = np.asarray(flow.draw_kept_conditions(config, NAMES, 0, index)["text"])
    step_noise = np.asarray(flow.draw_noise(0, index // 8, (8,)))
    columns = [time, kept, *noise.T, *step_noise.T]
    strata = np.asarray(flow.draw_time(tiny_flow(stratified=True), 0, index, 8))
    correlation = np.corrcoef(np.stack([*columns, strata]).astype(np.float64))
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / math.sqrt(len(index) / 8), np.abs(correlation).max()
    direct = correlation[:2][:, 2:10]
    assert np.abs(direct).max() < 4.5 / math.sqrt(len(index))


@pytest.mark.parametrize("shares", [(0.1, 0.3, 0.1), (0.0, 0.0, 0.0), (0.5, 0.25, 0.25), (0.0, 0.0, 1.0)])
def test_one_categorical_draw_decides_the_conditions(shares):
    text, vision, both = shares
    config = tiny_flow(drop=dropping(both, text, vision))
    keep_text, keep_vision = map(np.asarray, flow.draw_kept_conditions(config, NAMES, 0, MANY).values())
    assert keep_text.dtype == keep_vision.dtype == bool
    found = {
        "text": (~keep_text & keep_vision).mean(),
        "vision": (keep_text & ~keep_vision).mean(),
        "both": (~keep_text & ~keep_vision).mean(),
    }
    for name, share in (("text", text), ("vision", vision), ("both", both)):
        spread = math.sqrt(share * (1 - share) / len(MANY))
        assert abs(found[name] - share) <= 4 * spread + 1e-7, name


@pytest.mark.parametrize(
    ("shares", "kept"),
    [((0.0, 0.0, 0.0), (True, True)), ((0.0, 1.0, 0.0), (True, False)), ((1.0, 0.0, 0.0), (False, True))],
)
def test_a_share_of_none_drops_nothing_and_a_share_of_all_everything(shares, kept):
    """Also of the sample whose random number is 0."""
    index = np.array([612_944], np.uint32)
    key = jax.random.fold_in(flow.sample_keys(0, index)[0], flow._DROP)
    assert jax.random.uniform(key) == 0
    text, vision, both = shares
    config = tiny_flow(drop=dropping(both, text, vision))
    found = flow.draw_kept_conditions(config, NAMES, 0, index)
    assert tuple(bool(k[0]) for k in found.values()) == kept


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        (flow.DROP, NAMES, {"text vision": 0.1, "text": 0.1, "vision": 0.3}),
        ("", NAMES, {}),
        ("text 1", NAMES, {"text": 1.0}),
        (" vision  0.25 ,text+vision 0.5,", NAMES, {"vision": 0.25, "text vision": 0.5}),
        # a condition that no subset but `all` names is dropped in three of ten samples, whatever else is dropped
        ("all 0.1, text 0.2", (*NAMES, "pose"), {
            "text vision pose": 0.1, "text": 0.14, "text pose": 0.06, "pose": 0.21,
        }),
        ("", ("text", "vision", "a", "b"), {"a": 0.21, "b": 0.21, "a b": 0.09}),
        ("all 0.1, pose 0.2, vision+pose 0.3", (*NAMES, "pose"), {
            "text vision pose": 0.1, "pose": 0.2, "vision pose": 0.3,
        }),
    ],
)  # fmt: skip
def test_the_dropout_is_read_from_its_text(text, names, expected):
    found = flow.parse_drop(text, names)
    assert {" ".join(subset): share for subset, share in found} == pytest.approx(expected)
    config = tiny_flow(drop=found)
    keep = {name: np.asarray(kept) for name, kept in flow.draw_kept_conditions(config, names, 0, MANY).items()}
    assert tuple(keep) == tuple(names)
    for subset, share in expected.items():
        drawn = np.all([keep[name] != (name in subset.split()) for name in names], axis=0).mean()
        assert abs(drawn - share) <= 4 * math.sqrt(share * (1 - share) / len(MANY)) + 1e-7, subset
        assert config.dropped(subset.split()) == pytest.approx(share)
        assert config.dropped(reversed(subset.split())) == pytest.approx(share)
    assert config.dropped(["text", "nothing"]) == 0


def test_what_is_made_from_the_caption_is_dropped_with_the_text_unless_it_is_named():
    names, of_captions = ("text", "twin", "vision"), ("text", "twin")

    def found(text):
        return dict(flow.parse_drop(text, names, of_captions))

    assert found("all 0.1, text 0.2") == {names: 0.1, ("text", "twin"): 0.2}
    assert found("vision+text 0.2") == {("vision", "text", "twin"): 0.2}
    assert found("text 0.2, twin 0.1") == {("text",): 0.2, ("twin",): 0.1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pose 0.1", ["pose", "text, vision"]),
        ("text", ["text"]),
        ("text x", ["text x"]),
        ("text 1.5", ["1.5"]),
        ("text -0.1", ["-0.1"]),
        ("text nan", ["nan"]),
        ("all 0.4, text 0.4, vision 0.3", ["1.1"]),
    ],
)
def test_a_dropout_that_cannot_be_is_refused(text, words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        flow.parse_drop(text, NAMES)
    assert all(word in str(refusal.value) for word in words)


# ------------------------------------------------------------------------------------------------ path and loss


def test_the_path_is_a_straight_line_from_image_to_noise():
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 4, 3, 5)).astype(np.float32)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, np.zeros(4, np.float32)), x0)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, np.ones(4, np.float32)), noise)
    t = np.array([0.1, 0.3, 0.5, 0.9], np.float32)
    x_t = flow.interpolate(x0, noise, t)
    for row in range(4):
        np.testing.assert_allclose(x_t[row], (1 - t[row]) * x0[row] + t[row] * noise[row], rtol=1e-6)
    _, slope = jax.jvp(lambda t: flow.interpolate(x0, noise, t), (t,), (np.ones(4, np.float32),))
    np.testing.assert_allclose(slope, flow.velocity(x0, noise), rtol=1e-6, atol=1e-6)
    # one Euler step of the true velocity from anywhere lands on the image
    t_ = t.reshape(4, 1, 1)
    np.testing.assert_allclose(x_t - t_ * flow.velocity(x0, noise), x0, rtol=1e-4, atol=1e-5)


def test_sample_means_are_over_a_samples_own_tokens():
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    valid = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]], bool)
    expected = [values[row][valid[row]].mean() for row in range(3)]
    np.testing.assert_allclose(flow.sample_means(values, valid), expected, rtol=1e-5)
    values[~valid] = np.nan
    np.testing.assert_allclose(flow.sample_means(values, valid), expected, rtol=1e-5)


def test_loss_by_time_bins():
    t = np.array([0.0, 0.124, 0.125, 0.5, 0.9999, 1.0], np.float32)
    loss = np.array([1, 2, 4, 8, 16, 32], np.float32)
    total, count = flow.loss_by_time(loss, t)
    assert total.tolist() == [3, 4, 0, 0, 8, 0, 0, 48]
    assert count.tolist() == [2, 1, 0, 0, 1, 0, 0, 2]
    assert total.dtype == count.dtype == jnp.float32
