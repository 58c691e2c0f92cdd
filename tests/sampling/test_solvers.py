"""The solvers on equations with known solutions, and the algebra of guidance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxdit_jax.sampling.solvers import METHODS, Guidance, guide, integrate, time_grid

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

ORDER = {"euler": 1, "heun": 2, "rk3": 3}


def rand(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_time_grid_runs_from_noise_to_image():
    grid = np.asarray(time_grid(8, 1.0))
    np.testing.assert_allclose(grid, np.linspace(1, 0, 9), atol=1e-7)
    shifted = np.asarray(time_grid(8, 3.0))
    assert shifted[0] == 1 and shifted[-1] == 0 and (np.diff(shifted) < 0).all()
    np.testing.assert_allclose(shifted, 3 * grid / (1 + 2 * grid), atol=1e-6)
    assert grid.dtype == np.float32


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("euler", 3 - 1 * (3 * 3 + 1)),
        ("heun", 3 - (10 + 3 * (3 - 10) + 0) / 2),
        ("rk3", 3 - (10 + 4 * (3 * (3 - 10 / 2) + 0.5) + 3 * (3 - 2 * (3 * (3 - 10 / 2) + 0.5) + 10)) / 6),
    ],
)
def test_one_step_by_hand(method, expected):
    """dx/dt = 3 x + t from x(1) = 3, in one step to t = 0."""
    found = integrate(lambda x, t: 3 * x + t, np.full(2, 3, np.float32), 1, 1.0, method)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("method", METHODS)
def test_order_of_accuracy(method, shift):
    """dx/dt = 2 (1 + t) x, whose solution is x(0) = x(1) exp(-3)."""
    noise = np.linspace(0.5, 2, 4, dtype=np.float32)
    exact = noise.astype(np.float64) * np.exp(-3.0)

    def error(steps):
        out = integrate(lambda x, t: 2 * (1 + t) * x, noise, steps, shift, method)
        return np.abs(np.asarray(out, np.float64) - exact).max()

    counts = {"euler": (64, 128, 256), "heun": (16, 32, 64), "rk3": (8, 16, 32)}[method]
    errors = [error(steps) for steps in counts]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert abs(orders - ORDER[method]).max() < 0.3, (orders, errors)


@pytest.mark.parametrize(("method", "degree"), [("euler", 0), ("heun", 1), ("rk3", 2)])
def test_exact_on_polynomials_in_time(method, degree):
    noise = rand(3)

    def velocity(x, t):
        return (degree + 1) * t**degree * jnp.ones_like(x)  # x(0) = x(1) - 1

    np.testing.assert_allclose(integrate(velocity, noise, 3, 1.0, method), noise - 1, rtol=1e-5, atol=1e-5)
    wrong = integrate(lambda x, t: velocity(x, t) + 10 * t ** (degree + 2), noise, 3, 1.0, method)
    assert np.abs(wrong - (noise - 1 - 10 / (degree + 3))).max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_per_step(method):
    calls = []

    def velocity(x, t):
        calls.append(t)
        return x

    integrate(velocity, rand(2), 5, 1.0, method)
    assert len(calls) == ORDER[method]  # traced once for all steps


@pytest.mark.parametrize("method", METHODS)
def test_the_flow_of_a_gaussian_turns_noise_into_it(method):
    """For x_0 ~ N(m, s²) the marginal velocity is known, and the flow maps noise z to m + s z."""
    m, s = 1.5, 0.4

    def velocity(x, t):
        variance = (1 - t) ** 2 * s**2 + t**2
        score = (x - (1 - t) * m) / variance
        return t * score - (m + (1 - t) * s**2 * score)  # E[noise | x_t] - E[x_0 | x_t]

    z = rand(50)
    out = integrate(velocity, z, 200, 1.0, method)
    np.testing.assert_allclose(out, m + s * z, atol=0.03 if method == "euler" else 1e-3)


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(ValueError, match="'rk45'") as refusal:
        integrate(lambda x, t: x, rand(2), 2, 1.0, "rk45")
    for method in METHODS:
        assert method in str(refusal.value)


# ------------------------------------------------------------------------------------------------ guidance


@pytest.fixture
def velocities():
    return tuple(rand(3, 4, 5, seed=seed) for seed in range(3))


def test_guidance_that_is_not_given_is_the_model_itself():
    assert Guidance().plain and Guidance({"text": 1.0, "vision": 1.0}).plain
    assert Guidance().rescale == 0.0 and Guidance({"text": 3.0}).of("vision") == 1.0
    assert Guidance(rescale=0.7).plain  # the deviation is that of the model already
    for text, vision in ((1.0, 2.0), (2.0, 1.0), (0.0, 1.0), (1.0, 0.0), (2.0, 2.0), (0.0, 0.0)):
        assert not Guidance({"text": text, "vision": vision}).plain


def guided(*velocities_and_scales, rescale=0.0):
    """`guide` of three velocities and two scales."""
    *velocities, text_scale, vision_scale = velocities_and_scales
    return guide(velocities, np.float32([text_scale, vision_scale]), rescale)


def test_guidance_identities(velocities):
    none, text, both = velocities
    np.testing.assert_allclose(guided(*velocities, 1.0, 1.0), both, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(guided(*velocities, 1.0, 0.0), text, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(guided(*velocities, 0.0, 0.0), none)
    for scales in ((3.0, 2.0), (0.5, 7.0)):
        np.testing.assert_allclose(guided(both, both, both, *scales), both, rtol=1e-6)
    expected = none + 4 * (text - none) + 2.5 * (both - text)
    np.testing.assert_allclose(guided(*velocities, 4.0, 2.5), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_guidance_has_a_scale_for_each_condition(count):
    """Each is of the step from the conditions before it to those with it."""
    steps = [rand(3, 4, 5, seed=seed) for seed in range(count + 1)]
    scales = np.array([4.0, 2.5, 0.5], np.float32)[:count]
    expected = steps[0] + sum(scale * step for scale, step in zip(scales, steps[1:], strict=True))
    np.testing.assert_allclose(guide(np.cumsum(steps, axis=0), scales), expected, rtol=1e-4, atol=1e-5)


def test_rescale_pulls_each_samples_deviation_back(velocities):
    none, text, both = velocities
    both = both * np.array([1, 2, 3], np.float32)[:, None, None]
    plain = np.asarray(guided(none, text, both, 5.0, 3.0))
    full = np.asarray(guided(none, text, both, 5.0, 3.0, rescale=1.0))
    for row in range(3):
        np.testing.assert_allclose(full[row].std(), both[row].std(), rtol=1e-4)
        np.testing.assert_allclose(full[row] / plain[row], (full / plain)[row, 0, 0], rtol=1e-4)
    half = guided(none, text, both, 5.0, 3.0, rescale=0.5)
    np.testing.assert_allclose(half, (full + plain) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(guided(none, text, both, 1.0, 1.0, rescale=0.7), both, rtol=1e-4, atol=1e-5)


def test_rescale_of_nothing_is_finite():
    zero = np.zeros((2, 3, 4), np.float32)
    assert np.isfinite(np.asarray(jax.jit(guide)([zero, zero, zero], np.float32([3.0, 2.0]), 0.7))).all()
