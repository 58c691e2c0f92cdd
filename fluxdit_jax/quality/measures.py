"""What is measured of drawn pictures, by their vision vectors: f32 [n, V], unit L2, row i drawn for caption i.

All distances are Euclidean ones of unit vectors, so that nearer and a larger cosine are the same.

Sources: the unbiased MMD: Gretton et al. 2012 (JMLR 13), for pictures Jayasumana et al. 2024 (arXiv:2401.09603), who
show why a Fréchet distance of so few pictures is biased; recall@k of retrieval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fluxdit_jax.quality import measured
from fluxdit_jax.quality.measured import Measured, bootstrap

COPY_PERCENTILE = 1.0  # of holdout-to-train distances: nearer than that is a copy
ALIKE_PERCENTILE = 1.0  # of the distances from dataset pictures to their nearest others: nearer is the same picture
TWIN = 1e-3  # distance up to which two vectors are of one picture
_ROWS = 2048  # of a matrix of distances held at a time


def distances(a_NxV: np.ndarray, b_MxV: np.ndarray) -> np.ndarray:
    """float64 [N, M]."""
    return np.sqrt(np.maximum(2 - 2 * (a_NxV.astype(np.float64) @ b_MxV.astype(np.float64).T), 0))


def nearest(a_NxV: np.ndarray, b_MxV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distance float64 [N], row of b int [N]) of the nearest of b to each of a."""
    found = [distances(a_NxV[start : start + _ROWS], b_MxV) for start in range(0, len(a_NxV), _ROWS)]
    return np.concatenate([part.min(1) for part in found]), np.concatenate([part.argmin(1) for part in found])


# ---------------------------------------------------------------------------------------------------- likeness


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """The pictures of the dataset that drawn ones are to be like.

    Attributes:
      vectors: f32 [m, V], of training pictures.
      bandwidth: of the Gaussian kernel: the median distance of two of them, so that runs on one dataset compare.
      within: mean kernel of two of them.
    """

    vectors: np.ndarray
    bandwidth: float
    within: float

    @classmethod
    def of(cls, vectors: np.ndarray) -> Reference:
        """Raises `ValueError` for fewer than two."""
        if len(vectors) < 2:
            raise ValueError(f"likeness needs two training pictures at least, got {len(vectors)}")
        some = vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), _ROWS)).round().astype(int)]
        apart = distances(some, some)[~np.eye(len(some), dtype=bool)]
        bandwidth = max(float(np.median(apart)), 1e-6)
        total = 0.0
        for start in range(0, len(vectors), _ROWS):
            total += _kernel(vectors[start : start + _ROWS], vectors, bandwidth).sum()
        pairs = len(vectors) * (len(vectors) - 1)
        return cls(vectors, bandwidth, (total - len(vectors)) / pairs)

    def mmd(self, vectors: np.ndarray) -> tuple[float, float, float]:
        """(value, low, high) of 1,000 times the squared MMD, unbiased: 0 on average for pictures of the dataset.

        The interval is over other drawn pictures; the reference stays what it is. For pictures that are hardly told
        from the reference it is too wide rather than too narrow.
        """
        return bootstrap(self._squared_mmd(vectors), len(vectors))

    def resampled_mmd(self, vectors: np.ndarray) -> tuple[float, np.ndarray]:
        """(value, float64 [RESAMPLES]): that of the drawn pictures and of resamples, the same for all of one number."""
        return self.value(vectors), self._squared_mmd(vectors)(measured.resamples(len(vectors)))

    def value(self, vectors: np.ndarray) -> float:
        """That of `mmd`, without an interval."""
        return float(self._squared_mmd(vectors)(np.ones((1, len(vectors))))[0])

    def _squared_mmd(self, vectors: np.ndarray) -> measured.Statistic:
        inside = _kernel(vectors, vectors, self.bandwidth)
        np.fill_diagonal(inside, 0.0)
        across = np.concatenate(
            [
                _kernel(vectors[start : start + _ROWS], self.vectors, self.bandwidth).mean(1)
                for start in range(0, len(vectors), _ROWS)
            ]
        )

        def squared(counts_RxN: np.ndarray) -> np.ndarray:
            total = counts_RxN.sum(1)
            pairs = total**2 - np.square(counts_RxN).sum(1)  # without those of an item with itself
            with np.errstate(invalid="ignore"):  # a resample of one item again and again has no pairs
                of_pairs = np.einsum("rn,rn->r", counts_RxN @ inside, counts_RxN) / pairs
            return 1000 * (of_pairs + self.within - 2 * counts_RxN @ across / total)

        return squared


def _kernel(a: np.ndarray, b: np.ndarray, bandwidth: float) -> np.ndarray:
    return np.exp(-np.square(distances(a, b)) / (2 * bandwidth**2))


def likeness(
    drawn: np.ndarray, reference: Reference, best: Mapping[str, np.ndarray], worst: Mapping[str, np.ndarray]
) -> Measured:
    """1,000 times the squared MMD between drawn pictures, at least two, and the dataset's.

    Args:
      best, worst: vectors of true and of useless pictures, by name.
    """
    value, low, high = reference.mmd(drawn)
    sides = [{name: reference.value(vectors) for name, vectors in side.items()} for side in (best, worst)]
    return Measured(value, low, high, len(drawn), *sides)


# --------------------------------------------------------------------------------------- captions and vectors


def ranks(drawn: np.ndarray, true: np.ndarray) -> np.ndarray:
    """int [n]: the rank of picture i among all true ones by its distance to drawn picture i; 1 is the nearest.

    Pictures as near as the true one are the same picture as far as the encoder sees, and not counted.
    """
    found = np.empty(len(drawn), int)
    for start in range(0, len(drawn), _ROWS):
        cosines = drawn[start : start + _ROWS].astype(np.float64) @ true.astype(np.float64).T
        rows = np.arange(len(cosines))
        found[start : start + _ROWS] = 1 + (cosines > cosines[rows, start + rows][:, None] + 1e-9).sum(1)
    return found


def captions(
    drawn: np.ndarray, true: np.ndarray, again: np.ndarray, at: tuple[int, ...] = (1, 10)
) -> dict[str, Measured]:
    """How far drawn pictures follow their captions: recall@k for k in `at`, and the median rank of the true picture.

    Args:
      true: stored vectors of the pictures that the captions are of.
      again: the true pictures, decoded and encoded again: what a perfect model would get.
    """
    found, perfect, other = ranks(drawn, true), ranks(again, true), ranks(np.roll(drawn, 1, axis=0), true)
    result = {
        f"recall@{k}": measured.share(
            found <= k,
            best={"true pictures": float(np.mean(perfect <= k))},
            worst={"another caption's": float(np.mean(other <= k)), "chance": min(1.0, k / len(true))},
        )
        for k in at
        if k < len(true)
    }
    result["median rank"] = measured.median(
        found,
        best={"true pictures": measured.lower_median(perfect)},
        worst={"another caption's": measured.lower_median(other), "chance": (len(true) + 1) / 2},
    )
    return result


def vector(drawn: np.ndarray, given: np.ndarray, again: np.ndarray) -> Measured:
    """Cosine of drawn pictures, at least two, to the vectors that they were drawn with."""

    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.einsum("nv,nv->n", a.astype(np.float64), b.astype(np.float64))

    return measured.mean(
        cosine(drawn, given),
        best={"true pictures": float(cosine(again, given).mean())},
        worst={"another's vector": float(cosine(drawn, np.roll(given, 1, axis=0)).mean())},
    )


# ----------------------------------------------------------------------------------------- copies and diversity


@dataclasses.dataclass(frozen=True, eq=False)
class Copies:
    """Drawn pictures that are copies of training pictures.

    Attributes:
      share: of drawn pictures that are as near to a training picture as only 1 % of the holdout pictures are.
      distance: float64 [n], to the nearest training picture. train: int [n], its row.
      threshold: the distance up to which a picture counts.
    """

    share: Measured
    distance: np.ndarray
    train: np.ndarray
    threshold: float


def copies(drawn: np.ndarray, train: np.ndarray, holdout: np.ndarray, again: np.ndarray) -> Copies:
    """How much of what is drawn is a training picture over again.

    Args:
      train: the training pictures that are looked through; copies of others are not seen.
      holdout: pictures through the VAE, as drawn ones have come; those that are training pictures themselves (`TWIN`)
        do not count.
      again: some of the training pictures through the VAE: what copies look like.
    """
    usual, _ = nearest(holdout, train)
    own = usual[usual > TWIN] if (usual > TWIN).any() else usual
    threshold = float(np.percentile(own, COPY_PERCENTILE))
    distance, row = nearest(drawn, train)
    share = measured.share(
        distance <= threshold,
        best={"holdout pictures": float(np.mean(usual <= threshold))},
        worst={"training pictures": float(np.mean(nearest(again, train)[0] <= threshold))},
    )
    return Copies(share, distance, row, threshold)


def diversity(drawn_GxSxV: np.ndarray, true: np.ndarray) -> Measured:
    """How different drawings of one caption are: their mean distance, as a share of that of two dataset pictures.

    Args:
      drawn_GxSxV: S >= 2 drawings of each of G captions, from other noise.
    """
    within = spread_within(drawn_GxSxV, true)
    return measured.mean(within, best={"pictures of the dataset": 1.0}, worst={"one picture": 0.0})


def spread_within(drawn_GxSxV: np.ndarray, true: np.ndarray) -> np.ndarray:
    """float64 [G]: the mean distance of each caption's drawings, as a share of that of two dataset pictures."""
    upper = np.triu_indices(drawn_GxSxV.shape[1], 1)
    within = np.array([distances(one, one)[upper].mean() for one in drawn_GxSxV])
    return within / max(float(distances(true, true)[np.triu_indices(len(true), 1)].mean()), 1e-9)


@dataclasses.dataclass(frozen=True)
class Mode:
    """Drawings of different captions that are one picture: `rows` of the drawn ones."""

    rows: tuple[int, ...]


def collapsed_modes(
    drawn: np.ndarray, true: np.ndarray, again: np.ndarray, captions: Sequence[str], least: int = 3
) -> list[Mode]:
    """Groups of drawings for at least `least` different captions that are one picture, the largest first.

    As near, directly or by way of others, as a picture is to itself through the VAE, or as only 1 % of as many
    different dataset pictures are to their nearest other one.

    Args:
      true, again: of as many dataset pictures, as they are and through the VAE.
      captions: of the drawn ones.
    """
    some = np.linspace(0, len(true) - 1, min(len(true), len(drawn))).round().astype(int)
    apart = distances(true[some], true[some])
    np.fill_diagonal(apart, np.inf)
    usual = apart.min(1)
    usual = usual[(usual > TWIN) & np.isfinite(usual)]
    itself = float(np.median(np.linalg.norm(true.astype(np.float64) - again, axis=1)))
    threshold = max(float(np.percentile(usual, ALIKE_PERCENTILE)) if len(usual) else 0.0, itself, TWIN)
    a, b = np.nonzero(np.triu(distances(drawn, drawn) < threshold, 1))
    count = len(drawn)
    _, label = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(count, count)), directed=False)
    groups = [tuple(np.flatnonzero(label == each).tolist()) for each in np.unique(label)]
    different = [rows for rows in groups if len({captions[row] for row in rows}) >= least]
    return [Mode(rows) for rows in sorted(different, key=lambda rows: (-len(rows), rows))]
