"""Which photographs a gate set is made of: as different as the candidates allow, each variant apart from all others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fluxdit_jax.shared.distances import root_mean_squares
from preprocess.decoding.images import Rejected
from preprocess.input.findings import Reject
from preprocess.subset.candidates import THUMBNAIL, Candidate, SubsetOptions

# RMS difference of two thumbnails, of 255, below which they are one picture. Measured on the demonstration set and 80
# photographs: the same picture in JPEG quality 60, or at half size, differs by 0.2 to 1.9; with 2 % cut off by 4 to 6
# in the median; the most alike of different pictures by 13.
ALIKE = 6.0
_DARK = 12.0  # mean grey level below which a picture is as good as black
_FLAT = 8.0  # standard deviation of grey levels below which a picture shows nothing


def choose(candidates: Sequence[Candidate], options: SubsetOptions) -> tuple[list[Candidate], list[Reject]]:
    """The photographs of the set, at most `options.count`, and the candidates that cannot be in it, with the reason.

    A greedy farthest-point choice (Gonzalez 1985) by `structures`: each is the candidate least like all chosen before.
    The first half is chosen from captions with words of the edit, as far as there are any. No two share a caption, and
    every two variants differ by at least `ALIKE`. Deterministic.
    """
    kept, left_out = _distinct(candidates)
    usable = []
    for candidate in kept:
        if reason := _indistinct(candidate, options):
            left_out.append(_reject(candidate, reason))
        else:
            usable.append(candidate)
    space = structures(np.array([candidate.thumbnail for candidate in usable])) if usable else np.zeros((0, 1))
    nearest = np.full(len(usable), np.inf)
    own_words = np.array([options.has_words(candidate.item.caption) for candidate in usable], bool)
    chosen: list[Candidate] = []
    variants = np.zeros((0, 3 * THUMBNAIL**2), np.float32)
    taken: dict[str, str] = {}
    free = np.ones(len(usable), bool)
    while free.any() and len(chosen) < options.count:
        first = free & own_words if len(chosen) < (options.count + 1) // 2 else free
        allowed = np.flatnonzero(first if first.any() else free)
        row = int(allowed[nearest[allowed].argmax()])
        free[row] = False
        candidate, made = usable[row], usable[row].variants(options)
        texts = [text.casefold() for text in options.captions(candidate.item.caption).values()]
        if twin := next((taken[text] for text in texts if text in taken), ""):
            left_out.append(_reject(candidate, "has the caption of another", twin))
        elif len(variants) and distances(made, variants).min() < ALIKE:
            left_out.append(_reject(candidate, "looks like another under some light"))
        else:
            chosen.append(candidate)
            variants = np.concatenate([variants, made])
            taken |= dict.fromkeys(texts, candidate.item.key)
            nearest = np.minimum(nearest, distances(space, space[row : row + 1])[:, 0])
    return chosen, left_out


def _reject(candidate: Candidate, reason: str, detail: str = "") -> Reject:
    return Reject.of(candidate.item.key, candidate.item.image.path, Rejected(reason, detail))


def _distinct(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Reject]]:
    """One candidate for every picture: the one with the most pixels, of equals the first."""
    flat = np.array([candidate.thumbnail.ravel() for candidate in candidates], np.float64)
    alike = distances(flat, flat) < ALIKE
    kept: list[int] = []
    left_out = []
    headers = [candidate.item.header for candidate in candidates]
    for row in sorted(range(len(candidates)), key=lambda row: (-headers[row].height * headers[row].width, row)):
        twin = next((k for k in kept if alike[row, k]), None)
        if twin is None:
            kept.append(row)
            continue
        same = candidates[row].item.content == candidates[twin].item.content
        reason = "copy of another, byte by byte" if same else "looks like another"
        left_out.append(_reject(candidates[row], reason, candidates[twin].item.key))
    return [candidates[row] for row in sorted(kept)], left_out


def _indistinct(candidate: Candidate, options: SubsetOptions) -> str:
    """Why the variants of a photograph cannot be told apart; "" if they can."""
    made = candidate.variants(options)
    apart = distances(made, made) + np.where(np.eye(len(made)), np.inf, 0)
    if len(made) < 2 or apart.min() >= ALIKE:
        return ""
    if candidate.thumbnail.mean() < _DARK:
        return "black"
    if candidate.thumbnail.std() < _FLAT:
        return "flat"
    views = [view for view, _ in options.variants]
    first, second = np.unravel_index(apart.argmin(), apart.shape)
    return "symmetric" if views[first] != views[second] else "too dark for the lights to be told apart"


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square differences of the rows of [N, D] and [M, D], f64 [N, M], rounded to 1e-6."""
    return np.round(root_mean_squares(a, b), 6)


def structures(thumbnails: np.ndarray) -> np.ndarray:
    """uint8 [N, 32, 32, 3] to f64 [N, 256]: luma in stops on 16 x 16 cells, mean 0, unit L2: brightness and
    contrast of a picture do not count."""
    count = len(thumbnails)
    side = THUMBNAIL // 2
    luma = thumbnails.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    cells = np.log2(luma.reshape(count, side, 2, side, 2).mean((2, 4)) + 4).reshape(count, -1)
    cells -= cells.mean(1, keepdims=True)
    return cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-3)
