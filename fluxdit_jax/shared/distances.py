"""Distances of all rows to all rows."""

from __future__ import annotations

import numpy as np


def root_mean_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square differences of the rows of [A, D] and [B, D], float64 [A, B]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0) / a.shape[1])
