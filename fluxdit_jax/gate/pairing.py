"""Who is paired with whom: the shuffle of the first test and the swaps of the second."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from scipy.optimize import linear_sum_assignment

from fluxdit_jax.gate.album import Album

# Colour difference (CIE76) of two tones that nobody would call the same; 2.3 is just noticeable.
DISTINCT_TONES_CIE76 = 8.0


def tone_distances(album: Album) -> np.ndarray:
    """Differences in tone of the true pictures, float64 [N, N]."""
    return np.linalg.norm(album.tones[:, None] - album.tones[None], axis=-1)


def may_swap(album: Album) -> np.ndarray:
    """bool [N, N]: pairs of different captions and clearly different tone.

    Clearly is at least `DISTINCT_TONES_CIE76`, and at least the median over pairs of different captions, so that the
    light of the two can be told apart by a measure that also sees the paint.
    """
    captions = np.array([record.caption for record in album.records])
    different = captions[:, None] != captions[None]
    far = tone_distances(album)
    if not different.any():
        return different
    return different & (far >= max(DISTINCT_TONES_CIE76, float(np.median(far[different]))))


def derangements(album: Album) -> Iterator[np.ndarray]:
    """Permutations without a fixed point, int [N], without end; entry i is the partner of record i.

    Each prefers partners that may be swapped with i (`may_swap`) and have its size, at random among those, and
    no pair occurs in two of them while there are others. Deterministic.
    """
    count = len(album)
    grids = np.array([album.grid(index) for index in range(count)])
    cost = np.random.default_rng(album.seed).uniform(size=(count, count))
    cost += 10 * (grids[:, None] != grids[None]).any(-1)
    cost += 100 * ~may_swap(album)
    cost += 10_000 * np.eye(count)
    while True:
        rows, partner = linear_sum_assignment(cost)
        yield partner
        cost[rows, partner] += 1000


def swap_pairs(album: Album, wanted: int) -> list[tuple[int, int]]:
    """Up to `wanted` pairs (A, B) that may be swapped, spread over the records; the first derangement's come first."""
    allowed = may_swap(album)
    if not allowed.any():
        return []
    pairs: dict[tuple[int, int], None] = {}
    for partner in itertools.islice(derangements(album), len(album) - 1):
        fitting = [(int(a), int(b)) for a, b in enumerate(partner) if allowed[a, b]]
        left = wanted - len(pairs)
        step = np.linspace(0, len(fitting) - 1, min(left, len(fitting))).round().astype(int)
        pairs.update(dict.fromkeys(fitting[i] for i in np.unique(step)))
        if len(pairs) >= wanted:
            break
    return list(pairs)
