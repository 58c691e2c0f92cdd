"""Patches: latents as sequences of tokens, and back. On the bytes, so that any dtype is as fast as any other."""

from __future__ import annotations

import numpy as np


def patchify(latent_CxHxW: np.ndarray, patch: int, out_NxP: np.ndarray | None = None) -> np.ndarray:
    """[C, h, w] -> [h/p * w/p, p * p * C], tokens row by row, patches as (row, column, channel).

    Args:
      out_NxP: contiguous memory of the result, of the latent's dtype; None: new memory.
    """
    C, h, w = latent_CxHxW.shape
    rows, columns = h // patch, w // patch
    if out_NxP is None:
        out_NxP = np.empty((rows * columns, patch * patch * C), latent_CxHxW.dtype)
    # The order "C" makes the loop over a channel the inner one: an assignment would take that over the columns, and
    # twice the time. One call, since each lets go of the interpreter's lock and waits for it again: with two threads
    # that costs more than a second pass over the values. numpy copies its own integers faster than bfloat16.
    same_size = np.dtype(f"u{latent_CxHxW.dtype.itemsize}")
    tiles = latent_CxHxW.view(same_size).reshape(C, rows, patch, columns, patch)
    out_tiles = out_NxP.view(same_size).reshape(rows, columns, patch, patch, C)
    np.positive(tiles.transpose(1, 3, 2, 4, 0), out=out_tiles, order="C")
    return out_NxP


def unpatchify(tokens_NxP: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """The inverse of `patchify` for the first rows * columns tokens: [C, h, w]."""
    rows, columns = grid
    channels = tokens_NxP.shape[-1] // patch**2
    tiles = tokens_NxP[: rows * columns].reshape(rows, columns, patch, patch, channels)
    return tiles.transpose(4, 0, 2, 1, 3).reshape(channels, rows * patch, columns * patch)
