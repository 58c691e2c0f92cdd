"""How far the subject of a picture moved when the picture was changed: block matching where the two differ.

Nothing is detected and nothing is known of the subject. Two pictures of the same scene and light are reduced to
their structure (`image_metrics.structure_map`). Where their structures differ, something left or something arrived;
the shift at which what left one place is found again at another place that changed is the displacement. The
background that is uncovered on one side and covered on the other has no counterpart and does not vote.

Shapes in names: h x w pixels of the structure map.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.ndimage import gaussian_filter

from fluxdit_jax.gate.image_metrics import structure_map

WINDOW = 4.0  # of a block: standard deviation in pixels of the structure map
REACH = 0.6  # largest displacement looked for, as a share of the side
DIFFERENT = 0.3  # dissimilarity of a block above which it counts as changed
FAINT = 0.1  # power of a block below which it has too little structure to be matched
STILL = 0.02  # a shift that explains less than this share of the structure is no movement
RECOGNISED = 0.18  # below this share of structure found again, the two are not one scene


@dataclasses.dataclass(frozen=True)
class Displacement:
    """How the second picture came from the first.

    Attributes:
      shift: of what moved, as a share of the side, positive to the right (or down); 0 if nothing moved; None if too
        little of one picture is found in the other to say.
      found: share of the structure, 0 to 1, found again in place or at the shift. On the demonstration set it is
        above 0.98 for the same picture with noise of 8 grey levels, 0.24 to 0.64 when the subject moved before its
        background, below 0.18 for noise of any grain, 0 for grey.
      in_place: the part of `found` that is where it was.
    """

    shift: float | None
    found: float
    in_place: float

    def along(self, sign: int) -> float | None:
        """The shift in the direction of `sign` (+1 or -1)."""
        return None if self.shift is None else sign * self.shift + 0.0  # 0, not -0


def displacement(before: np.ndarray, after: np.ndarray, axis: str = "horizontal") -> Displacement:
    """Measures two uint8 [H, W, 3] pictures of one size.

    Args:
      axis: "horizontal" or "vertical".

    Raises:
      ValueError: the sizes differ, or the axis is unknown.
    """
    if before.shape != after.shape:
        raise ValueError(f"displacement needs pictures of one size, got {before.shape} and {after.shape}")
    if axis not in ("horizontal", "vertical"):
        raise ValueError(f"axis must be horizontal or vertical, got {axis!r}")
    a_hxw, b_hxw = structure_map(before), structure_map(after)
    if axis == "vertical":
        a_hxw, b_hxw = a_hxw.T, b_hxw.T
    return _match(a_hxw, b_hxw)


def _match(a_hxw: np.ndarray, b_hxw: np.ndarray) -> Displacement:
    power_a, power_b = _blocks(a_hxw * a_hxw), _blocks(b_hxw * b_hxw)
    if min(power_a.max(), power_b.max()) < FAINT:  # plain grey
        return Displacement(None, 0.0, 0.0)
    here = _correlation(a_hxw, b_hxw, power_a, power_b)
    textured = np.maximum(power_a, power_b) > FAINT
    changed = np.where(textured & (1 - here > DIFFERENT), 1 - here, 0.0)
    in_place = _share(here, here, power_a, power_b)

    best_votes, best_shift, best_found = 0.0, 0, in_place
    width = a_hxw.shape[1]
    reach = int(REACH * width)
    for shift in range(-reach, reach + 1):
        there = _correlation(a_hxw, _moved(b_hxw, shift), power_a, _moved(power_b, shift))
        # what left a place that changed for another that changed
        votes = float((changed * _moved(changed, shift) * np.square(there)).sum())
        if votes > best_votes:
            arrived = _moved(there, -shift)
            best_votes, best_shift = votes, shift
            best_found = _share(np.maximum(here, there), np.maximum(here, arrived), power_a, power_b)

    if best_found < RECOGNISED:
        return Displacement(None, best_found, in_place)
    if best_found - in_place < STILL:
        return Displacement(0.0, best_found, in_place)
    return Displacement(best_shift / width, best_found, in_place)


def _blocks(values_hxw: np.ndarray) -> np.ndarray:
    """Weighted mean over the block around each pixel; nothing lies beyond the edge."""
    return gaussian_filter(values_hxw, WINDOW, mode="constant")


def _correlation(a: np.ndarray, b: np.ndarray, power_a: np.ndarray, power_b: np.ndarray) -> np.ndarray:
    """Normalised correlation of the blocks around each pixel, 0 to 1; what is opposite counts as unlike."""
    return np.clip(_blocks(a * b) / np.sqrt(power_a * power_b + 1e-4), 0.0, 1.0)


def _moved(values_hxw: np.ndarray, shift: int) -> np.ndarray:
    """At each pixel the value that stands `shift` pixels to its right; 0 beyond the edge."""
    moved = np.zeros_like(values_hxw)
    if shift > 0:
        moved[:, :-shift] = values_hxw[:, shift:]
    elif shift < 0:
        moved[:, -shift:] = values_hxw[:, :shift]
    else:
        moved[:] = values_hxw
    return moved


def _share(at_a: np.ndarray, at_b: np.ndarray, power_a: np.ndarray, power_b: np.ndarray) -> float:
    """Share of the structure that is explained, of the picture that has more left unexplained."""
    shares = ((at**2 * power).sum() / power.sum() for at, power in ((at_a, power_a), (at_b, power_b)))
    return float(min(shares))
