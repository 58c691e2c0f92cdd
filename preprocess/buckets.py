"""The bucket table: the picture sizes that the VAE ever sees.

Training runs one program for every size (a sample is padded to the run's token count), so a bucket that
fills the token budget badly costs time in every step. Only sizes that fill at least 94 % are in the table.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from preprocess import PreprocessError

FILL = 0.94
TOKEN_SIDE = 16  # pixels per token side: a VAE of factor 8 and patch 2

Size = tuple[int, int]  # (height, width), pixels


@functools.lru_cache
def bucket_table(resolution: int, modulus: int, max_aspect: float = 4.0) -> tuple[Size, ...]:
    """Every (height, width) whose sides are multiples of `modulus` and whose area is `FILL` to 1 of the budget.

    Args:
      resolution: side of the square with the budget's area, pixels.
      modulus: a multiple of 16, pixels.
      max_aspect: longest side over shortest side, at most.

    Returns:
      Sorted from the tallest to the widest.

    Raises:
      PreprocessError: the arguments are impossible, or no size satisfies them.
    """
    if modulus < TOKEN_SIDE or modulus % TOKEN_SIDE:
        raise PreprocessError(f"--modulus must be a multiple of {TOKEN_SIDE}, got {modulus}")
    if not modulus <= resolution <= 16384:
        raise PreprocessError(f"--resolution must be from --modulus ({modulus}) to 16384, got {resolution}")
    if not 1 <= max_aspect <= 100:
        raise PreprocessError(f"--max-aspect must be from 1 to 100, got {max_aspect}")
    budget = resolution * resolution
    longest = math.isqrt(int(budget * max_aspect))
    sides = range(modulus, longest + 1, modulus)
    table = [
        (h, w) for h in sides for w in sides if FILL * budget <= h * w <= budget and max(h, w) <= max_aspect * min(h, w)
    ]
    if not table:
        raise PreprocessError(
            f"no bucket of modulus {modulus} fills {FILL:.0%} of {resolution}x{resolution}: "
            f"use a --resolution that is a multiple of {modulus}, or a smaller --modulus"
        )
    return tuple(sorted(table, key=lambda size: (size[1] / size[0], size)))


def default_modulus(resolution: int) -> int:
    """64 pixels at 1024 and above; below, as many pixels fewer as keep the table that dense (16 at least).

    With 64-pixel steps at 512 the table has 8 x 8 cells: a 3:2 photograph would be bent by 17 %.
    """
    return min(64, max(TOKEN_SIDE, resolution // 16 // TOKEN_SIDE * TOKEN_SIDE))


@functools.lru_cache(maxsize=65536)
def nearest(table: tuple[Size, ...], height: int, width: int) -> Size:
    """The bucket closest in log aspect ratio; of equals, the largest."""
    aspect = math.log(width / height)
    return min(table, key=lambda size: (round(abs(math.log(size[1] / size[0]) - aspect), 12), -size[0] * size[1]))


def distortion(size: Size, bucket: Size) -> float:
    """How much resizing `size` to `bucket` bends the picture: 1.0 not at all, 1.1 by 10 % in one direction."""
    return math.exp(abs(math.log(size[1] / size[0]) - math.log(bucket[1] / bucket[0])))


def enlargement(size: Size, bucket: Size) -> float:
    """Linear factor by which bringing `size` to `bucket` enlarges it (below 1: shrinks)."""
    return math.sqrt(bucket[0] * bucket[1] / (size[0] * size[1]))


def tokens(bucket: Size) -> int:
    """Training tokens of a picture of this size (factor 8, patch 2)."""
    return (bucket[0] // TOKEN_SIDE) * (bucket[1] // TOKEN_SIDE)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a picture is brought to its bucket, in pixels of the upright picture.

    Attributes:
      box: (left, top, right, bottom) of the part of the source that is used.
      size: (height, width) that this part is resized to.
      offset: (top, left) of that in the bucket.
    """

    box: tuple[float, float, float, float]
    size: Size
    offset: tuple[int, int]


def geometry(size: Size, bucket: Size, fit: str) -> Geometry:
    """ "resize" uses everything and bends; "crop" keeps the aspect and cuts the least; "pad" keeps both."""
    (height, width), (rows, columns) = size, bucket
    if fit == "resize":
        return Geometry((0, 0, width, height), bucket, (0, 0))
    if fit == "crop":
        scale = max(rows / height, columns / width)
        keep_h, keep_w = min(height, rows / scale), min(width, columns / scale)
        left, top = (width - keep_w) / 2, (height - keep_h) / 2
        return Geometry((left, top, left + keep_w, top + keep_h), bucket, (0, 0))
    scale = min(rows / height, columns / width)
    inner = (min(rows, max(1, round(height * scale))), min(columns, max(1, round(width * scale))))
    return Geometry((0, 0, width, height), inner, ((rows - inner[0]) // 2, (columns - inner[1]) // 2))
