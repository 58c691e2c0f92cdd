"""What is asked of the model, and the model that answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fluxdit_jax.sampling import image_grid
from fluxdit_jax.sampling.pipeline import Generator, conditions

# Of a picture: equal for two that must be the same.
Key = tuple[str, bytes, tuple[int, int], int]


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """One picture to draw.

    Attributes:
      caption: in words.
      conditions: by name; "text" are the caption's tokens.
      grid: (rows, columns) of tokens.
      seed: of the noise.
    """

    caption: str
    conditions: Mapping[str, np.ndarray]
    grid: tuple[int, int]
    seed: int

    @property
    def key(self) -> Key:
        """Equal for two that must give the same picture."""
        others = b"".join(self.conditions[name].tobytes() for name in sorted(self.conditions) if name != "text")
        return self.caption, others, self.grid, self.seed


# Draws uint8 [H, W, 3] pictures, one for each that is wanted, in order.
Draw = Callable[[Sequence[Wanted]], list[np.ndarray]]


class Painter:
    """The model as a `Draw`. It remembers what it drew: tests that want the same picture share it."""

    def __init__(self, generator: Generator, params: Any, decoder: image_grid.Decoder, batch_size: int):
        """
        Args:
          params: of `generator.cast`.
          batch_size: the generator's.
        """
        self._generator, self._params, self._decoder = generator, params, decoder
        self._batch_size = batch_size
        self._drawn: dict[Key, np.ndarray] = {}

    def __call__(self, wanted: Sequence[Wanted]) -> list[np.ndarray]:
        self.paint(wanted)
        return [self._drawn[one.key] for one in wanted]

    def missing(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """What of it is not drawn yet, each once."""
        return list({one.key: one for one in wanted if one.key not in self._drawn}.values())

    def paint(self, wanted: Sequence[Wanted], progress: Callable[[int], Any] | None = None) -> None:
        """Draws what is missing. `progress` is called with the number of pictures done after each batch."""
        missing = self.missing(wanted)
        for start in range(0, len(missing), self._batch_size):
            part = missing[start : start + self._batch_size]
            latents = self._generator.latents(
                self._params,
                conditions(self._generator.conditions, [one.conditions for one in part], [one.grid for one in part]),
                self._generator.noise([one.seed for one in part]),
            )
            images = image_grid.decode_all(self._decoder, latents)
            self._drawn.update((one.key, image) for one, image in zip(part, images))
            if progress is not None:
                progress(len(part))
