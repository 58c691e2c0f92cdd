"""The solvers and the guidance in PyTorch against those in JAX."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fluxdit_jax.portable.scheduling_fluxdit import METHODS, RectifiedFlowSolver, guide
from fluxdit_jax.sampling import solvers


@pytest.mark.parametrize("method", solvers.METHODS)
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (5, 3.0), (16, 2.5)])
def test_a_solution_is_the_same(method, steps, shift):
    """Of a velocity that depends on x and on t."""
    noise = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    ours = solvers.integrate(lambda x, t: jnp.sin(3 * x) * (1 + t), jnp.asarray(noise), steps, shift, method)
    done = []
    theirs = RectifiedFlowSolver(shift=shift).solve(
        lambda x, t: torch.sin(3 * x) * (1 + t), torch.from_numpy(noise), steps, method, lambda k, x: done.append(k)
    )
    np.testing.assert_allclose(theirs.numpy(), ours, atol=2e-6)
    assert done == list(range(steps)) and METHODS == solvers.EVALUATIONS


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("scales", [[1.0, 1.0], [4.0, 1.5], [0.0, 3.0]])
def test_guidance_is_the_same(scales, rescale):
    v = np.random.default_rng(1).normal(size=(3, 2, 6, 4)).astype(np.float32)
    ours = solvers.guide(list(jnp.asarray(v)), jnp.asarray(scales), rescale)
    theirs = guide(list(torch.from_numpy(v)), scales, rescale)
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=2e-5, atol=2e-6)


def test_it_is_saved_with_its_shift(tmp_path):
    RectifiedFlowSolver(shift=3.5).save_pretrained(tmp_path)
    again = RectifiedFlowSolver.from_pretrained(tmp_path)
    np.testing.assert_allclose(again.times(4).numpy(), solvers.time_grid(4, 3.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("steps", "method", "named"), [(0, "heun", "at least 1.*0"), (4, "dpm", "euler, heun, rk3.*dpm")]
)
def test_impossible_arguments_are_named(steps, method, named):
    with pytest.raises(ValueError, match=named):
        RectifiedFlowSolver().solve(lambda x, t: x, torch.zeros(1), steps, method)
