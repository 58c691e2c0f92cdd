"""From noise to a latent: ODE solvers over the learned velocity, and guidance with a scale for each condition."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from fluxdit_jax.flow import shift_time

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x, scalar t) -> dx/dt
EVALUATIONS = {"euler": 1, "heun": 2, "rk3": 3}  # of the network, for each solver step
METHODS = tuple(EVALUATIONS)
COSTS = ", ".join(f"{method} {count}" for method, count in EVALUATIONS.items())  # in words, for help


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Scales of `guide`. All at 1 is the model itself and costs one evaluation of the network.

    Attributes:
      scales: by condition; 1 for those that are not named.
      rescale: see `guide`.
    """

    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rescale: float = 0.0

    @property
    def plain(self) -> bool:
        return all(scale == 1.0 for scale in self.scales.values())

    def of(self, name: str) -> float:
        return self.scales.get(name, 1.0)


def time_grid(steps: int, shift: float) -> jax.Array:
    """steps + 1 times from 1 (noise) to 0 (image), shifted as in training, f32."""
    return shift_time(jnp.linspace(1.0, 0.0, steps + 1, dtype=jnp.float32), shift)


def integrate(velocity: Velocity, noise: jax.Array, steps: int, shift: float, method: str) -> jax.Array:
    """Solves dx/dt = velocity(x, t) from t = 1 to t = 0.

    Args:
      noise: x at t = 1, f32.
      steps: intervals; "euler" costs one evaluation each, "heun" two, "rk3" (Kutta's third-order
        method) three. Their global errors fall with the first, second and third power of the step.
      shift: the run's time shift.

    Returns:
      x at t = 0, f32.
    """
    if method not in METHODS:
        raise ValueError(f"sampler method must be one of {METHODS}, got {method!r}")
    grid = time_grid(steps, shift)

    def step(x: jax.Array, times: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        t, t_next = times
        h = t_next - t
        k1 = velocity(x, t)
        if method == "euler":
            return x + h * k1, None
        if method == "heun":
            k2 = velocity(x + h * k1, t_next)
            return x + h * (k1 + k2) / 2, None
        assert method == "rk3"
        k2 = velocity(x + h * k1 / 2, t + h / 2)
        k3 = velocity(x + h * (2 * k2 - k1), t_next)
        return x + h * (k1 + 4 * k2 + k3) / 6, None

    x, _ = jax.lax.scan(step, noise, (grid[:-1], grid[1:]))
    return x


def guide(velocities: Sequence[jax.Array], scales: jax.Array, rescale: float | jax.Array = 0.0) -> jax.Array:
    """Guidance with one scale per condition (arXiv:2211.09800, equation 3).

    v_0 + s_1 (v_1 - v_0) + s_2 (v_2 - v_1) + ...; all scales at 1 give the last of them.

    Args:
      velocities: [B, N, P] each: without conditions, with the first, with the first and the second, and so on.
      scales: of each condition, f32, one less than velocities.
      rescale: share by which each sample's standard deviation is pulled back to that of the last velocity
        (arXiv:2305.08891, section 3.4); strong guidance otherwise over-saturates.
    """
    guided, last = velocities[0], velocities[-1]
    for number, (before, after) in enumerate(itertools.pairwise(velocities)):
        guided = guided + scales[number] * (after - before)
    axes = tuple(range(1, guided.ndim))
    factor = jnp.std(last, axis=axes, keepdims=True) / (jnp.std(guided, axis=axes, keepdims=True) + 1e-8)
    return guided * (rescale * factor + 1 - rescale)
