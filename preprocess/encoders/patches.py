"""The patches of a vision encoder, pooled to the cells that a record stores (`fluxdit_jax.dataset.cells`)."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from fluxdit_jax.dataset import cells
from fluxdit_jax.dataset.manifest import EncoderIdentity


class PatchEncoder(Protocol):
    """A vision encoder that has a vector for each patch of a picture, too."""

    identity: EncoderIdentity
    also_patches: bool

    def encode_patches(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] to float32 [B, h, w, width], whose patches cover the picture."""


class Cells:
    """Images to packed cells each.

    Attributes:
      identity: that of the vision encoder, with the number of cells; its width is that of a packed row.
    """

    def __init__(self, vision: PatchEncoder, resolution: int, count: int) -> None:
        """
        Args:
          resolution: side of the square with the pixel budget of the pictures. count: its cells, of `cells.COUNTS`.
        """
        self._vision, self._resolution, self._count = vision, resolution, count
        vision.also_patches = True
        own = vision.identity
        self.identity = dataclasses.replace(
            own, width=own.width + cells.FACTOR_BYTES, options=own.options | {"cells": count}
        )

    def encode(self, images: np.ndarray) -> list[np.ndarray]:
        """uint8 [B, H, W, 3], the whole pictures as the vision encoder sees them, to int8 [n, width] each."""
        grid = cells.grid_of(images.shape[1:3], self._resolution, self._count)
        return [cells.packed(cells.pooled(patches, grid)) for patches in self._vision.encode_patches(images)]
