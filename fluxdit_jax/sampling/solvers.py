"""From noise to a latent: ODE solvers over the learned velocity, and guidance with two scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fluxdit_jax.flow import shift_time

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x, scalar t) -> dx/dt
METHODS = ("euler", "heun", "rk3")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Scales of `guide`. Both at 1 is the model itself and costs one network evaluation instead of three."""

    text: float = 1.0
    vision: float = 1.0
    rescale: float = 0.0

    @property
    def plain(self) -> bool:
        return self.text == 1.0 and self.vision == 1.0


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
        k2 = velocity(x + h * k1 / 2, t + h / 2)
        k3 = velocity(x + h * (2 * k2 - k1), t_next)
        return x + h * (k1 + 4 * k2 + k3) / 6, None

    x, _ = jax.lax.scan(step, noise, (grid[:-1], grid[1:]))
    return x


def guide(
    none: jax.Array,
    text: jax.Array,
    both: jax.Array,
    text_scale: float | jax.Array,
    vision_scale: float | jax.Array,
    rescale: float | jax.Array = 0.0,
) -> jax.Array:
    """Guidance with one scale per condition (arXiv:2211.09800, equation 3).

    none + text_scale (text - none) + vision_scale (both - text); both scales at 1 give `both` itself.

    Args:
      none, text, both: velocities [B, N, P] without conditions, with the caption, with caption and vector.
      rescale: share by which each sample's standard deviation is pulled back to that of `both`
        (arXiv:2305.08891, section 3.4); strong guidance otherwise over-saturates.
    """
    guided = none + text_scale * (text - none) + vision_scale * (both - text)
    axes = tuple(range(1, guided.ndim))
    factor = jnp.std(both, axis=axes, keepdims=True) / (jnp.std(guided, axis=axes, keepdims=True) + 1e-8)
    return guided * (rescale * factor + 1 - rescale)
