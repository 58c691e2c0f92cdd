"""What is asked of the model, and the model that answers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fluxdit_jax.sampling.pipeline import Generator, conditions
from fluxdit_jax.sampling.solvers import Guidance
from fluxdit_jax.vae.decoder import Decoder, decode_all


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One picture to draw.

    Attributes:
      caption: in words.
      conditions: by name; "text" are the caption's tokens. What is missing is not given.
      grid: (rows, columns) of tokens.
      seed: of the noise.
      guidance: scale of all conditions; 1 is the model itself.
    """

    caption: str
    conditions: Mapping[str, np.ndarray]
    grid: tuple[int, int]
    seed: int
    guidance: float = 1.0

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two that must give the same picture."""
        others = tuple((n, self.conditions[n].tobytes()) for n in sorted(self.conditions) if n != "text")
        return "text" in self.conditions and self.caption, others, self.grid, self.seed, self.guidance


# Draws uint8 [H, W, 3] pictures, one for each request, in order.
Draw = Callable[[Sequence[Request]], list[np.ndarray]]


class Sampler:
    """The model as a `Draw`. It remembers what it drew: tests that want the same picture share it."""

    def __init__(self, generator: Generator, ema: Any, decoder: Decoder):
        """
        Args:
          ema: weights, f32.
        """
        self._generator, self._params, self._decoder = generator, generator.cast(ema), decoder
        self._drawn: dict[tuple[Any, ...], np.ndarray] = {}

    def __call__(self, requests: Sequence[Request]) -> list[np.ndarray]:
        self.draw(requests)
        return [self._drawn[one.key] for one in requests]

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """What of it is not drawn yet, each once, by guidance."""
        missing = {one.key: one for one in requests if one.key not in self._drawn}.values()
        return sorted(missing, key=lambda one: one.guidance)

    def draw(self, requests: Sequence[Request], progress: Callable[[int], Any] | None = None) -> None:
        """Draws what is missing. `progress` is called with the number of pictures done after each batch."""
        size = self._generator.batch_size
        for guidance, group in itertools.groupby(self.missing(requests), lambda one: one.guidance):
            missing = list(group)
            scales = Guidance(dict.fromkeys((c.name for c in self._generator.conditions), guidance))
            for start in range(0, len(missing), size):
                part = missing[start : start + size]
                latents = self._generator.latents(
                    self._params,
                    conditions(
                        self._generator.conditions, [one.conditions for one in part], [one.grid for one in part]
                    ),
                    self._generator.noise([one.seed for one in part]),
                    guidance=scales,
                )
                images = decode_all(self._decoder, latents)
                self._drawn.update((one.key, image) for one, image in zip(part, images))
                if progress is not None:
                    progress(len(part))
