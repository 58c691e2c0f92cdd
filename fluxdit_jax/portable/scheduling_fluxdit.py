"""From noise to a latent: ODE solvers over the learned velocity, and guidance with a scale for each condition.

They compute what `fluxdit_jax.sampling.solvers` computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

METHODS = {"euler": 1, "heun": 2, "rk3": 3}  # evaluations of the network, for each step

# (x, scalar t) -> dx/dt
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def guide(velocities: Sequence[torch.Tensor], scales: Sequence[float], rescale: float = 0.0) -> torch.Tensor:
    """Guidance with one scale per condition (arXiv:2211.09800, equation 3).

    v_0 + s_1 (v_1 - v_0) + s_2 (v_2 - v_1) + ...; all scales at 1 give the last of them.

    Args:
      velocities: [B, N, P] each: without conditions, with the first, with the first and the second, and so on.
      scales: of each condition, one less than velocities.
      rescale: share by which each sample's standard deviation is pulled back to that of the last velocity
        (arXiv:2305.08891, section 3.4).
    """
    guided, last = velocities[0], velocities[-1]
    for scale, (before, after) in zip(scales, itertools.pairwise(velocities), strict=True):
        guided = guided + scale * (after - before)
    axes = tuple(range(1, guided.ndim))
    factor = last.std(axes, keepdim=True, correction=0) / (guided.std(axes, keepdim=True, correction=0) + 1e-8)
    return guided * (rescale * factor + 1 - rescale)


class RectifiedFlowSolver(SchedulerMixin, ConfigMixin):
    """Solves dx/dt = velocity(x, t) from noise, t = 1, to a latent, t = 0.

    Args:
      shift: of the times, s t / (1 + (s - 1) t), as in training (arXiv:2403.03206).
    """

    source = Path(__file__).read_text(encoding="utf-8")  # for a pipeline that is saved again
    guide = staticmethod(guide)

    @register_to_config
    def __init__(self, shift: float = 1.0):
        pass

    def times(self, steps: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """steps + 1 times from 1 to 0, shifted, f32."""
        t, s = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32, device=device), self.config.shift
        return s * t / (1 + (s - 1) * t)

    def solve(
        self,
        velocity: Velocity,
        noise: torch.Tensor,
        steps: int,
        method: str = "heun",
        after_step: Callable[[int, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """x at t = 0, f32.

        Args:
          noise: x at t = 1, f32.
          steps: intervals; "euler" costs one evaluation each, "heun" two, "rk3" (Kutta's third-order method) three.
          after_step: called with the number of the step and x.

        Raises:
          ValueError: an unknown method, or less than one step.
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        x = noise
        for number, (t, t_next) in enumerate(itertools.pairwise(self.times(steps, noise.device))):
            h = t_next - t
            k1 = velocity(x, t)
            if method == "euler":
                x = x + h * k1
            elif method == "heun":
                x = x + h * (k1 + velocity(x + h * k1, t_next)) / 2
            else:
                k2 = velocity(x + h * k1 / 2, t + h / 2)
                k3 = velocity(x + h * (2 * k2 - k1), t_next)
                x = x + h * (k1 + 4 * k2 + k3) / 6
            if after_step is not None:
                after_step(number, x)
        return x
