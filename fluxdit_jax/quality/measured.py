"""A number with its interval, and what the same measure says of true pictures and of useless ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import norm

RESAMPLES = 1000
LEVEL = 0.95

# What a statistic is of every resample: counts of each item [R, n] to float64 [R].
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A number with its interval and what to hold it against.

    Attributes:
      value: the number.
      low, high: the interval of 95 % by the bootstrap: what it may be with other captions of the same kind.
      count: items that it is of.
      best, worst: by name, the same measure of pictures that could not be better, and of useless ones.
    """

    value: float
    low: float
    high: float
    count: int
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    worst: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def resamples(count: int, seed: int = 0) -> np.ndarray:
    """How often each of `count` items is taken by each resample, float64 [RESAMPLES, count]."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)


def bootstrap(statistic: Statistic, count: int, seed: int = 0) -> tuple[float, float, float]:
    """(value, low, high): a statistic of items and its percentile interval over resamples of them.

    Args:
      statistic: given how often each item is taken [R, n], its values [R].
      count: n.
    """
    value = float(statistic(np.ones((1, count)))[0])
    if count < 2:
        return value, float("nan"), float("nan")
    values = statistic(resamples(count, seed))
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)


def share(found: np.ndarray, **sides: dict[str, float]) -> Measured:
    """The share of items bool [n] that are True, with Wilson's interval, which has a width at 0 and 1 as well."""
    n, value = len(found), float(np.mean(found))
    z = float(norm.ppf((1 + LEVEL) / 2))
    middle = (value + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(value * (1 - value) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return Measured(value, max(0.0, middle - half), min(1.0, middle + half), n, **sides)


def mean(values: np.ndarray, **sides: dict[str, float]) -> Measured:
    """The mean over items [n]."""
    values = np.asarray(values, np.float64)
    value, low, high = bootstrap(lambda counts: counts @ values / len(values), len(values))
    return Measured(value, low, high, len(values), **sides)


def lower_median(values: np.ndarray) -> float:
    """Of items [n]: one of them, of an even number the smaller of the two in the middle."""
    return float(np.sort(np.asarray(values, np.float64))[(len(values) - 1) // 2])


def median(values: np.ndarray, **sides: dict[str, float]) -> Measured:
    """The lower median over items [n]."""
    ordered = np.sort(np.asarray(values, np.float64))

    def of(counts: np.ndarray) -> np.ndarray:
        return ordered[(counts[:, order].cumsum(1) >= len(ordered) / 2).argmax(1)]

    order = np.argsort(np.asarray(values, np.float64), kind="stable")
    value, low, high = bootstrap(of, len(ordered))
    return Measured(value, low, high, len(ordered), **sides)
