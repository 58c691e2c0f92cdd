"""The one measure of the gate: is the picture that was drawn nearest to the known answer, among all of the set?

Pictures are uint8 [H, W, 3] of any size, compared as thumbnails, so that those of different buckets can be. A true
picture of the set retrieves itself, whatever the set shows: the measure has no constant that was fitted to one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.pages.charts import Chart
from fluxdit_jax.shared.distances import root_mean_squares
from fluxdit_jax.shared.psnr import psnr

THUMBNAIL = 32  # side, pixels
# Grey levels between thumbnails below which two originals are one picture, which nobody can tell apart.
DUPLICATE_GREY_LEVELS = 2.0


def thumbnails(images: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of any sizes as float32 [B, THUMBNAIL * THUMBNAIL * 3], grey levels."""
    size = (THUMBNAIL, THUMBNAIL)
    small = [Image.fromarray(image).resize(size, Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image).ravel() for image in small]).astype(np.float32)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square differences of `thumbnails` [A, F] and [B, F]: float64 [A, B], grey levels."""
    return root_mean_squares(a, b)


class Library:
    """All pictures of a set, to retrieve from."""

    def __init__(self, eval_set: EvalSet):
        self.set = eval_set
        self._thumbnails = thumbnails(eval_set.truths)
        self._apart = distances(self._thumbnails, self._thumbnails)
        self.twins = self._apart < DUPLICATE_GREY_LEVELS  # each is its own, too

    @functools.cached_property
    def usual_distance(self) -> float:
        """Between two pictures of the set, grey levels; the median."""
        return float(np.median(self._apart[~np.eye(len(self.set), dtype=bool)])) if len(self.set) > 1 else 0.0

    def retrieve(self, images: Sequence[np.ndarray], answers: Sequence[int]) -> Retrieval:
        """
        Args:
          images: drawn ones.
          answers: index of the picture that each should be.
        """
        right = np.asarray(answers, int)
        distance = distances(thumbnails(images), self._thumbnails) if len(images) else np.zeros((0, len(self.set)))
        own = np.where(self.twins[right], distance, np.inf).min(1)
        others = np.where(self.twins[right], np.inf, distance)
        truths = [self.set.truths[index] for index in right]
        return Retrieval(
            set=self.set,
            answers=right,
            nearest=np.where(own <= others.min(1, initial=np.inf), right, distance.argmin(1)),
            rank=1 + (others < own[:, None]).sum(1),
            own=own,
            other=others.min(1, initial=np.inf),
            psnr=np.array([psnr(t, i) if t.shape == i.shape else np.nan for t, i in zip(truths, images, strict=True)]),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Retrieval:
    """What was retrieved for K drawn pictures.

    Attributes:
      answers: int [K], index of the right picture.
      nearest: int [K], index of the nearest; the answer where that or a twin of it is.
      rank: int [K] of the answer among all, 1 is the nearest.
      own, other: f64 [K], distance to the answer, and to the nearest other picture, grey levels.
      psnr: f64 [K], to the answer, decibels; NaN where the sizes differ.
    """

    set: EvalSet
    answers: np.ndarray
    nearest: np.ndarray
    rank: np.ndarray
    own: np.ndarray
    other: np.ndarray
    psnr: np.ndarray

    @property
    def hit(self) -> np.ndarray:
        """bool [K]."""
        return self.nearest == self.answers

    @property
    def share(self) -> float:
        """Of the pictures that retrieve their answer; 0 of none."""
        return float(self.hit.mean()) if len(self.hit) else 0.0

    @property
    def margin(self) -> np.ndarray:
        """f64 [K], how much farther the nearest other picture is than the answer, grey levels."""
        return self.other - self.own

    def share_alike(self, name: str) -> float | None:
        """Of the pictures that retrieve one with the answer's "row" or "light"; None without a grid."""
        places = self.set.places
        if not len(self.answers) or any(places[index] is None for index in self.answers):
            return None
        pairs = [(places[found], places[answer]) for found, answer in zip(self.nearest, self.answers)]
        return float(np.mean([a is not None and getattr(a, name) == getattr(b, name) for a, b in pairs]))

    def numbers(self) -> dict[str, Any]:
        """For the report."""
        finite = self.psnr[np.isfinite(self.psnr)]
        margins = self.margin[np.isfinite(self.margin)]
        return {
            "questions": len(self.answers),
            "retrieved": self.share,
            "chance": 1 / len(self.set),
            "rank_median": float(np.median(self.rank)) if len(self.rank) else None,
            "rank_worst": int(self.rank.max(initial=0)),
            "margin_median": float(np.median(margins)) if len(margins) else None,
            "psnr_median_db": float(np.median(finite)) if len(finite) else None,
            "psnr_worst_db": float(finite.min()) if len(finite) else None,
            "right_row": self.share_alike("row"),
            "right_light": self.share_alike("light"),
        }

    def note(self, k: int) -> str:
        """Case k in words."""
        decibels = f"{self.psnr[k]:.1f} dB, " if np.isfinite(self.psnr[k]) else ""
        if self.hit[k]:
            return f"{decibels}nearest to the answer, the next is {self.margin[k]:.1f} grey levels farther"
        return f"{decibels}rank {self.rank[k]}: nearest to {self.set.records[self.nearest[k]].key}"

    def chart(self) -> Chart:
        """A point for each picture."""
        return Chart(
            "How near is the answer, and how near the next best?",
            "distance to the answer (grey levels)",
            "distance to the nearest other",
            tuple(float(v) for v in self.own),
            tuple(float(v) if np.isfinite(v) else 255.0 for v in self.other),
            tuple(bool(v) for v in self.hit),
        )
