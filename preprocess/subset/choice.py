"""Which pictures make a small set to overfit: poses as different, light as alike as the candidates allow.

    distinct      no picture twice, by bytes or to the eye
    neighbourhood the candidates of one light: those round the picture whose neighbours in light are nearest
    couples       captions that the gate's edit turns into each other, in one light
    choose        up to half of the set as couples, then whoever is farthest from all chosen so far

Numbers only: who the candidates are is the business of `preprocess.subset.subset`. Distances are rounded before they
are compared, and ties go to the first candidate, so the last bit of a matrix product decides nothing.

Letters in names: N candidates, D features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from fluxdit_jax.shared.edit_rules import Rule, edited

THUMBNAIL = 32  # side, pixels
# RMS difference of two thumbnails, of 255, below which they are one picture. Measured on the demonstration set and 80
# photographs: the same picture in JPEG quality 60, or at half size, differs by 0.2 to 1.9; with 2 % cut off by 4 to 6
# in the median; the most alike of different pictures by 13.
ALIKE = 6.0
SPARE = 1.25  # candidates of the light for each picture wanted, at least
_DRAWS = 200  # random choices behind "by chance"


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What is known of N candidates, sorted by key.

    Attributes:
      captions: N texts.
      contents: N hashes of the files.
      pixels: N sizes of the sources, pixels.
      text: f64 [N, D], pooled text features, unit L2.
      vision: f64 [N, D], what is seen of the pose.
      light: f64 [N, D], what is seen of the light, unit L2.
      thumbnails: uint8 [N, 32, 32, 3].
    """

    captions: Sequence[str]
    contents: Sequence[str]
    pixels: Sequence[int]
    text: np.ndarray
    vision: np.ndarray
    light: np.ndarray
    thumbnails: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)

    def at(self, rows: Sequence[int]) -> Candidates:
        """Those of these rows."""
        rows = list(rows)
        return Candidates(
            [self.captions[row] for row in rows],
            [self.contents[row] for row in rows],
            [self.pixels[row] for row in rows],
            self.text[rows],
            self.vision[rows],
            self.light[rows],
            self.thumbnails[rows],
        )


@dataclasses.dataclass(frozen=True)
class Couple:
    """Rows of a candidate with the old words of a rule and of one with the new words.

    `twins`: the rule turns the first caption into the second.
    """

    old: int
    new: int
    twins: bool


@dataclasses.dataclass(frozen=True)
class Choice:
    """Attributes:
    rows: chosen candidates, couples first and side by side.
    couples: among them.
    distances: how far each was in pose from all chosen before it; 1 is the root mean square of all candidates.
    centre: the candidate whose light the others were to have.
    neighbours: candidates of that light.
    radius: of the light, chord between unit vectors.
    """

    rows: list[int]
    couples: list[Couple]
    distances: list[float]
    centre: int
    neighbours: int
    radius: float


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances of the rows of [N, D] and [M, D], f64 [N, M], rounded to 1e-6."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.round(np.sqrt(np.maximum(squares, 0)), 6)


# -------------------------------------------------------------------------------------------- no picture twice


def distinct(candidates: Candidates, rules: Sequence[Rule]) -> tuple[list[int], dict[int, int], int]:
    """One row for every picture: the one with the most pixels, of equals the first.

    Pictures that look alike but whose captions have different words of an edit are kept: a small head that turns
    changes few pixels.

    Returns:
      Rows kept, in order; the row kept in the place of each row left out; how many of these equal it byte by byte.
    """
    sides = [tuple(side_of(caption, rule) for rule in rules) for caption in candidates.captions]
    flat = candidates.thumbnails.reshape(len(candidates), -1).astype(np.float64)
    alike = distances(flat, flat) < ALIKE * math.sqrt(flat.shape[1])
    kept: list[int] = []
    instead: dict[int, int] = {}
    first: dict[str, int] = {}
    copies = 0
    for row in sorted(range(len(candidates)), key=lambda row: (-candidates.pixels[row], row)):
        twin = first.get(candidates.contents[row])
        if twin is not None:
            copies += 1
            instead[row] = instead.get(twin, twin)
            continue
        first[candidates.contents[row]] = row
        twin = next((k for k in kept if alike[row, k] and sides[k] == sides[row]), None)
        if twin is None:
            kept.append(row)
        else:
            instead[row] = twin
    return sorted(kept), instead, copies


# ------------------------------------------------------------------------------------------------------- light


def neighbourhood(light: np.ndarray, size: int) -> tuple[int, np.ndarray]:
    """The densest place: the row whose `size` nearest rows are nearest on average, and its distances [N]."""
    spans = distances(light, light)
    mean = np.round(np.partition(spans, size - 1, axis=1)[:, :size].mean(1), 6)
    centre = int(mean.argmin())
    return centre, spans[centre]


# ------------------------------------------------------------------------------------------------------- couples


def side_of(caption: str, rule: Rule) -> str:
    """Which words of a rule a caption has: "old", "new", or "" for none or both."""
    old = edited(caption, rule.old, rule.new) is not None
    new = edited(caption, rule.new, rule.old) is not None
    return "" if old == new else "old" if old else "new"


def couples(candidates: Candidates, rules: Sequence[Rule]) -> list[Couple]:
    """Candidates one to one: first those whose captions a rule turns into each other, then those with captions
    that are near; among these in one light as far as it goes."""
    found: list[Couple] = []
    taken: set[int] = set()
    for rule in rules:
        sides = [side_of(caption, rule) for caption in candidates.captions]
        old, new = ([r for r, s in enumerate(sides) if s == side and r not in taken] for side in ("old", "new"))
        if not old or not new:
            continue
        cost = distances(candidates.light[old], candidates.light[new])
        cost += distances(candidates.text[old], candidates.text[new])
        wanted = [(edited(candidates.captions[row], rule.old, rule.new) or "").casefold() for row in old]
        twins = np.array(wanted)[:, None] == np.array([candidates.captions[r].casefold() for r in new])[None]
        cost -= 100 * twins  # more than any distance: they are unit vectors
        for i, j in zip(*linear_sum_assignment(cost)):
            found.append(Couple(old[i], new[j], bool(twins[i, j])))
            taken |= {old[i], new[j]}
    return sorted(found, key=lambda couple: (couple.old, couple.new))


# --------------------------------------------------------------------------------------------------------- poses


def poses(candidates: Candidates) -> np.ndarray:
    """Text and vision as one space f64 [N, D] in which both count the same: the root mean square distance of two
    candidates is 1 in each. What is the same for all is left out."""
    parts = []
    for part in (candidates.text, candidates.vision):
        centred = part - part.mean(0)
        scale = math.sqrt(2 * (centred**2).sum(1).mean())
        if scale > 1e-4:
            parts.append(centred / scale)
    return np.concatenate(parts, 1) if parts else np.zeros((len(candidates), 1))


class _Farthest:
    """Greedy farthest-point choice (Gonzalez 1985) among the rows of a space [N, D]."""

    def __init__(self, space: np.ndarray) -> None:
        self._space = space
        self.nearest = np.full(len(space), np.inf)  # distance of each row to what was taken

    def take(self, row: int) -> float:
        """Counts a row as chosen; returns how far it was from all before, inf for the first."""
        far = float(self.nearest[row])
        self.nearest = np.minimum(self.nearest, distances(self._space, self._space[row : row + 1])[:, 0])
        return far

    def next(self, allowed: Sequence[int]) -> int:
        """The allowed row that is farthest from all taken; of equals the first allowed."""
        return allowed[int(self.nearest[list(allowed)].argmax())]


def choose(candidates: Candidates, count: int, rules: Sequence[Rule], light_share: float) -> Choice:
    """The set. Deterministic.

    It is chosen from the candidates of one light. If their poses are less different than those of a random set of all
    (a small or mixed input: the light of its greatest part may be one subject), more of them are let in.

    Args:
      candidates: distinct ones, at least `count`.
      count: pictures wanted.
      rules: of the gate's text edit. Up to half of the set are couples of captions that a rule concerns.
      light_share: part of the candidates, the densest in light, that is chosen from; at least `SPARE` times
        `count` are, and couples of another light where there are not enough in this one.
    """
    total = len(candidates)
    size = min(total, max(math.ceil(light_share * total), math.ceil(SPARE * count)))
    space, known = poses(candidates), couples(candidates, rules)
    by_chance = spread(space, range(total))
    while True:
        choice = _choose_in_light(candidates.light, space, known, count, size)
        if size == total or spread(space, choice.rows) >= by_chance:
            return choice
        size = min(total, math.ceil(1.2 * size))


def _choose_in_light(light: np.ndarray, space: np.ndarray, known: list[Couple], count: int, size: int) -> Choice:
    """`choose` from the `size` candidates that are densest in light."""
    centre, far = neighbourhood(light, size)
    near = np.argsort(far, kind="stable")[:size]
    inside = set(near.tolist())
    search = _Farthest(space)
    rows: list[int] = []
    steps: list[float] = []

    def take(row: int) -> None:
        steps.append(search.take(row))
        rows.append(row)

    quota = count // 4
    chosen: list[Couple] = []
    for twins in (True, False):
        kind = sorted((c for c in known if c.twins == twins), key=lambda c: (max(far[c.old], far[c.new]), c.old))
        here = sum(c.old in inside and c.new in inside for c in kind)
        left = {c.old: c for c in kind[: max(here, quota - len(chosen))]}  # the nearest in light come first
        while left and len(chosen) < quota:
            couple = left.pop(search.next(list(left)) if rows else next(iter(left)))
            chosen.append(couple)
            take(couple.old)
            take(couple.new)
    rest = [int(row) for row in near if row not in set(rows)]
    while len(rows) < count:
        take(rest.pop(rest.index(search.next(rest)) if rows else 0))
    return Choice(rows, chosen, steps, centre, size, float(far[near[-1]]))


# ------------------------------------------------------------------------------------------------------- figures


def spread(space: np.ndarray, rows: Sequence[int]) -> float:
    """Mean distance of two different rows."""
    if len(rows) < 2:
        return 0.0
    part = space[list(rows)]
    return float(distances(part, part).sum() / (len(rows) * (len(rows) - 1)))


def spacing(space: np.ndarray, rows: Sequence[int]) -> float:
    """Mean distance of a row to the nearest other: near 0 if many are alike."""
    if len(rows) < 2:
        return 0.0
    part = space[list(rows)]
    spans = distances(part, part)
    np.fill_diagonal(spans, np.inf)
    return float(spans.min(1).mean())


def figures(candidates: Candidates, choice: Choice, any_light: Choice) -> dict[str, dict[str, float]]:
    """How the choice compares: `chosen`, `any_light` (the same choice from all the candidates), and `by_chance`
    (the mean of 200 random sets of that size)."""
    space = poses(candidates)
    measures = {
        "light_spread": lambda rows: spread(candidates.light, rows),
        "caption_spread": lambda rows: spread(candidates.text, rows),
        "captions": lambda rows: len({candidates.captions[row] for row in rows}),
        "pose_spread": lambda rows: spread(space, rows),
        "pose_spacing": lambda rows: spacing(space, rows),
    }
    rng = np.random.default_rng(0)
    draws = [rng.permutation(len(candidates))[: len(choice.rows)].tolist() for _ in range(_DRAWS)]
    return {
        name: {
            "chosen": round(measure(choice.rows), 4),
            "any_light": round(measure(any_light.rows), 4),
            "by_chance": round(float(np.mean([measure(rows) for rows in draws])), 4),
        }
        for name, measure in measures.items()
    }
