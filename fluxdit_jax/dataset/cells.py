"""Pooled patches of the vision encoder, as a record stores them: what alignment holds the network's features against.

A picture is divided into cells, each the mean of the patches that it covers. A cell is a row of int8: its values, and
the two bytes of a float16 factor by which they are to be multiplied.
"""

from __future__ import annotations

import math

import numpy as np

from fluxdit_jax.portable.builtin import area_weights

COUNTS = (256, 1024)  # cells of a square picture
FACTOR_BYTES = 2


def grid_of(size: tuple[int, int], resolution: int, count: int) -> tuple[int, int]:
    """(rows, columns) of the cells of a picture.

    Of pictures of one aspect ratio they are the same at every resolution of a build.

    Args:
      size: (height, width) of the bucket, pixels.
      resolution: side of the square with the dataset's pixel budget; it has `count` cells.
    """
    return grid_at(size, side_of(resolution, count))


def side_of(resolution: int, count: int) -> float:
    """Side of a cell in pixels; see `grid_of`."""
    return resolution / math.isqrt(count)


def grid_at(size: tuple[int, int], side: float) -> tuple[int, int]:
    """(rows, columns) of cells of this side."""
    return max(1, round(size[0] / side)), max(1, round(size[1] / side))


def pooled(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """f32 [rows, columns, V] of patches [h, w, V]: the mean over the area of each cell."""
    rows, columns = (area_weights(size, count) for size, count in zip(patches.shape[:2], grid, strict=True))
    return np.einsum("rh,hwv,cw->rcv", rows, patches.astype(np.float32), columns, optimize=True)


def packed(cells: np.ndarray) -> np.ndarray:
    """int8 [n, V + 2] of f32 [..., V], n cells. NaN becomes a factor that is NaN."""
    flat = cells.reshape(-1, cells.shape[-1]).astype(np.float32)
    factors = (np.abs(flat).max(axis=1, keepdims=True) / 127).astype(np.float16)
    with np.errstate(all="ignore"):
        values = np.nan_to_num(np.rint(flat / np.maximum(factors.astype(np.float32), 1e-8)))
    return np.concatenate([np.clip(values, -127, 127).astype(np.int8), factors.view(np.int8)], axis=1)


def factors_of(rows: np.ndarray) -> np.ndarray:
    """f32 [n] of packed cells."""
    return np.ascontiguousarray(rows[:, -FACTOR_BYTES:]).view(np.float16)[:, 0].astype(np.float32)


def unpacked(rows: np.ndarray) -> np.ndarray:
    """f32 [n, V] of packed cells."""
    return rows[:, :-FACTOR_BYTES].astype(np.float32) * factors_of(rows)[:, None]
