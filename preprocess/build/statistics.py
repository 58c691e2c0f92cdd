"""Exact mean and standard deviation per latent channel, in float64, mergeable.

The moments of two sets combine by Chan, Golub and LeVeque (1979), so that every shard keeps its own and an
unchanged shard is never read again. A sum of squares would lose half its digits; centred moments do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of C channels over `count` values each.

    Attributes:
      count: values per channel.
      mean: float64 [C].
      squares: float64 [C], sum of squared distances from the mean.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, latent: np.ndarray) -> Moments:
        """Of one latent, any float [C, h, w]."""
        values = latent.reshape(latent.shape[0], -1).astype(np.float64)  # a copy, changed below
        mean = values.mean(axis=1)
        values -= mean[:, None]
        return cls(values.shape[1], mean, np.einsum("ij,ij->i", values, values))

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments | None:
        """Of everything in `parts`, in their order; None of nothing."""
        total = None
        for part in parts:
            total = part if total is None else total._plus(part)
        return total

    def _plus(self, other: Moments) -> Moments:
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        squares = self.squares + other.squares + np.square(step) * (self.count * other.count / count)
        return Moments(count, mean, squares)

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation, float64 [C]."""
        return np.sqrt(self.squares / self.count)

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Moments:
        return cls(int(raw["count"]), np.array(raw["mean"], np.float64), np.array(raw["squares"], np.float64))
