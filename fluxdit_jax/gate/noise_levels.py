"""How much of the training teaches which light a condition asks for: the samples that are too noisy to show it.

A noisy latent x_t = (1 - t) x + t noise shows by itself which of two pictures it was made from where their distance
is clearly above the noise: (1 - t) / t |a - b| > 2, the best detector's ratio of signal to noise. Only above that
time must the network read its conditions. Distances grow with the square root of the number of tokens, so one time
shift leaves less and less of the training there as pictures grow (the ratio of arXiv:2403.03206, section 5.3.2).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fluxdit_jax.dataset.grid import Grid
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.flow import FlowConfig, time_at_quantile

CLEAR = 2.0  # signal to noise at which the best detector tells two pictures apart in 84 of 100 cases
LITTLE = 0.02  # share of the samples below which the light is hardly taught
ENOUGH = 0.06  # what a shift is proposed for: configs/demo.py has it at 128 px
_QUANTILES = 2_000


@dataclasses.dataclass(frozen=True)
class NoiseLevels:
    """How much of the training is at noise that hides the light of a picture.

    Attributes:
      time: above it a noisy picture does not show its light.
      share: of the training's samples above it.
      shift: the time shift at which `ENOUGH` of them are.
      uniform_shift: the same of uniform times, which keep samples at little noise where the other shift is large.
    """

    time: float
    share: float
    shift: float
    uniform_shift: float

    @property
    def too_few(self) -> bool:
        return self.share < LITTLE


def of_lights(
    records: Sequence[Record], grid: Grid, mean: Sequence[float], std: Sequence[float], flow: FlowConfig
) -> NoiseLevels | None:
    """Of the median pair of lights of a photograph; None without such pairs.

    Args:
      mean, std: of the latent's channels.
    """
    shift, scale = (np.asarray(values, np.float32)[:, None, None] for values in (mean, std))
    views: dict[tuple[str, str], list[np.ndarray]] = {}
    for record in records:
        if record.key in grid:
            place = grid[record.key]
            latent = (np.asarray(record.latent, np.float32) - shift) / scale
            views.setdefault((place.photograph, place.view), []).append(latent)
    pairs = [pair for latents in views.values() for pair in itertools.combinations(latents, 2)]
    distances = [float(np.linalg.norm(a - b)) for a, b in pairs if a.shape == b.shape]
    if not distances or not np.median(distances):
        return None
    time = 1 / (1 + CLEAR / float(np.median(distances)))
    u = (jnp.arange(_QUANTILES) + 0.5) / _QUANTILES
    share = float(np.mean(np.asarray(time_at_quantile(flow, u)) > time))
    # Of the times before the shift, those above q become those above s q / (1 + (s - 1) q).
    q = float(np.quantile(np.asarray(time_at_quantile(dataclasses.replace(flow, shift=1.0), u)), 1 - ENOUGH))
    odds = time / (1 - time)
    return NoiseLevels(time, share, odds * (1 - q) / q, odds * ENOUGH / (1 - ENOUGH))
