"""Two models that were asked the same: paired differences with their standard errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

from fluxdit_jax.quality import measures
from fluxdit_jax.quality.answers import Answers
from fluxdit_jax.quality.exam import Exam

FEW = 10  # items; fewer tell nothing apart


@dataclasses.dataclass(frozen=True)
class Difference:
    """The second model's number less the first's.

    Attributes:
      first, second: the numbers. error: standard error of the difference, over captions.
      better: "low" or "high": which is; "": neither.
    """

    first: float
    second: float
    error: float
    count: int
    better: str

    @property
    def value(self) -> float:
        return self.second - self.first

    @property
    def verdict(self) -> str:
        """Which model is ahead, if the difference is beyond the interval of 95 % around 0 (Student's t)."""
        if self.count < FEW or not self.better or not abs(self.value) > student.ppf(0.975, self.count - 1) * self.error:
            return "not told apart"
        return "second" if (self.value > 0) == (self.better == "high") else "first"

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "difference": self.value, "ahead": self.verdict}


def paired(both: Sequence[np.ndarray], better: str) -> Difference:
    """Of means over the same items, [n] of each model."""
    first, second = (each.astype(np.float64) for each in both)
    apart = second - first
    error = apart.std(ddof=1) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return Difference(float(first.mean()), float(second.mean()), float(error), len(apart), better)


def compare(exam: Exam, first: Answers, second: Answers) -> dict[str, Difference]:
    """Differences by name: of all measures that are means over captions, and of the likeness."""
    both = (first, second)
    ranks = [measures.ranks(one.drawn, exam.true) for one in both]
    found = {
        "likeness": _of_likeness(exam, first, second),
        "recall@1": paired([each <= 1 for each in ranks], "high"),
        **({"recall@10": paired([each <= 10 for each in ranks], "high")} if len(exam.true) > 10 else {}),
        "cosine to the true picture": paired([_cosines(one.drawn, exam.true) for one in both], "high"),
    }
    if len(first.rows) > 1:
        found["vector"] = paired([_cosines(one.with_vector, exam.true[one.rows]) for one in both], "high")
    copied = [measures.copies(one.drawn, exam.reference.vectors, exam.again, exam.train_again) for one in both]
    found["copies"] = paired([each.distance <= each.threshold for each in copied], "low")
    if len(first.several) and first.several.shape[1] > 1:
        found["diversity"] = paired([measures.spread_within(one.several, exam.true) for one in both], "")
    return found


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("nv,nv->n", a.astype(np.float64), b.astype(np.float64))


def _of_likeness(exam: Exam, first: Answers, second: Answers) -> Difference:
    """Its error is that of the bootstrap, over the same resamples of captions for both."""
    resampled = [exam.reference.resampled_mmd(one.drawn) for one in (first, second)]
    (a, many), (b, other) = resampled
    return Difference(a, b, float((other - many).std(ddof=1)), len(first.drawn), "low")
