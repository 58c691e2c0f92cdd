"""What a plan's pictures and captions suffer, and which option would spare it: for `build` and its `--dry-run`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from fluxdit_jax.shared.sanitize import shown
from preprocess import PreprocessError, buckets
from preprocess.build.items import Repeated
from preprocess.build.options import Options
from preprocess.build.plan import Plan

VISIBLE = 0.1  # a change of aspect ratio that is seen in faces and circles
_FEW = 0.01  # images that may be bent or enlarged without a word
_SIDES = tuple(64 * n for n in range(2, 33))  # sides that --resolution is advised to take
_REPEATED = 0.1  # images that share a caption, from where on it is a warning


def bend(size: buckets.Size, bucket: buckets.Size, fit: str) -> float:
    """How much `fit` costs a picture, 0 = nothing.

    For "resize" the relative change of aspect ratio, for "crop" the share cut off, for "pad" the share that is noise.
    """
    if fit == "resize":
        return buckets.distortion(size, bucket) - 1
    plan = buckets.geometry(size, bucket, fit)
    if fit == "crop":
        left, top, right, bottom = plan.box
        return 1 - (right - left) * (bottom - top) / (size[0] * size[1])
    return 1 - plan.size[0] * plan.size[1] / (bucket[0] * bucket[1])


def bends(plan: Plan) -> np.ndarray:
    """`bend` of every image, in the order of the plan."""
    return _of_sizes(plan, plan.options.buckets(), functools.partial(bend, fit=plan.options.fit))


def _of_sizes(
    plan: Plan, table: tuple[buckets.Size, ...], measure: Callable[[buckets.Size, buckets.Size], float]
) -> np.ndarray:
    """f64 [N]: a measure of each picture's size and its bucket in a table."""
    sizes = ((int(height), int(width)) for height, width in plan.items.sizes)
    of_size = (measure(size, buckets.nearest(table, *size)) for size in sizes)
    return np.fromiter(of_size, np.float64)[plan.items.size_of]


def report_bends(plan: Plan, say: Callable[[str], None], several: bool = False) -> None:
    """Warns of pictures that are visibly distorted, and names the options that would not; of `several` resolutions not
    other tables, which they share."""
    if plan.options.fit != "resize":
        return
    found = bends(plan)
    count = int((found > VISIBLE).sum())
    if count <= _FEW * len(plan.items):
        return
    item = plan.items[int(found.argmax())]
    say(
        f"  warning: {count:,} of {len(plan.items):,} images are stretched or squeezed by more than {VISIBLE:.0%}, "
        f"which is visible (worst {found.max():.1%}: {shown(item.key)}, {item.header.width}x{item.header.height} to "
        f"{item.bucket[1]}x{item.bucket[0]}, width x height)"
    )
    ways = [*([] if several else _other_tables(plan)), "--fit crop cuts instead", "--fit pad fills with noise"]
    say(f"  to keep their shape: {'; '.join(ways)}")


def _other_tables(plan: Plan) -> list[str]:
    """The gentlest change of --modulus, else of --resolution, that bends few pictures visibly."""
    options = plan.options
    smaller = range(options.modulus - buckets.TOKEN_SIDE, 0, -buckets.TOKEN_SIDE)
    larger = [side for side in _SIDES if options.resolution < side <= 2 * options.resolution]
    tries = [("--modulus", options.resolution, modulus) for modulus in smaller]
    tries += [("--resolution", side, 0) for side in larger]
    for name, resolution, modulus in tries:
        tried = _tried(plan, resolution, modulus or min(options.modulus, buckets.default_modulus(resolution)))
        if tried and tried[0] <= _FEW * len(plan.items):
            worse, soft = tried
            left = f"{worse} would be" if worse else "none would be"
            left += f", {soft} enlarged more than {options.max_upscale:g} times" if soft else ""
            return [f"{name} {modulus if name == '--modulus' else resolution} ({left})"]
    return []


def _tried(plan: Plan, resolution: int, modulus: int) -> tuple[int, int] | None:
    """(images bent visibly, images enlarged beyond --max-upscale) in another bucket table; None if there is none."""
    try:
        table = buckets.bucket_table(resolution, modulus, plan.options.max_aspect)
    except PreprocessError:
        return None
    bent = _of_sizes(plan, table, functools.partial(bend, fit="resize")) > VISIBLE
    return int(bent.sum()), int((_of_sizes(plan, table, buckets.enlargement) > plan.options.max_upscale).sum())


def report_enlarged(plan: Plan, say: Callable[[str], None], several: bool = False) -> int:
    """Warns of pictures that are enlarged, and names a --resolution that fits them, unless there are `several`; returns
    how many."""
    options = plan.options
    enlargements = _of_sizes(plan, options.buckets(), buckets.enlargement)
    enlarged = int((enlargements > options.max_upscale).sum())
    if not enlarged:
        return 0
    worst = plan.items[int(enlargements.argmax())]
    say(
        f"  warning: {enlarged:,} images are enlarged more than {options.max_upscale:g} times (worst "
        f"{shown(worst.key)}, {enlargements.max():.1f} times): they will look soft"
    )
    if enlarged > _FEW * len(plan.items) and not several and (fitting := fitting_resolution(plan)):
        side, bent, count = fitting
        left = f"{count:,} are" if count else "none is"
        also = f", {bent:,} stretched by more than {VISIBLE:.0%}" if bent and options.fit == "resize" else ""
        say(f"  --resolution {side} would fit: at that size {left} enlarged so much{also}")
    return enlarged


def fitting_resolution(plan: Plan) -> tuple[int, int, int] | None:
    """The largest --resolution at which few images are enlarged beyond --max-upscale; (it, images bent, enlarged)."""
    options = plan.options
    sides = np.sort(np.sqrt(plan.items.sizes.prod(axis=1))[plan.items.size_of])
    most = options.max_upscale * sides[int(_FEW * len(sides))]
    for side in reversed(_SIDES):
        if side < options.resolution and side <= 1.03 * most:  # a bucket may be 6 % smaller than its budget
            tried = _tried(plan, side, _modulus(options, side))
            if tried and tried[1] <= _FEW * len(plan.items):
                return side, *tried
    return None


def _modulus(options: Options, resolution: int) -> int:
    """--modulus at another resolution: the default follows, what was given does not."""
    given = options.modulus != buckets.default_modulus(options.resolution)
    return options.modulus if given else buckets.default_modulus(resolution)


def repeated_captions(found: Repeated) -> list[str]:
    """Lines about captions that several images share; none if each has its own."""
    if not found.sharing:
        return []
    word = "warning: " if found.sharing > _REPEATED * found.images else ""
    lines = [
        f"  {word}{found.sharing:,} of {found.images:,} images share their caption with another; {found.captions:,} "
        "captions in all. What differs between images of one caption cannot be asked for in words. The commonest:"
    ]
    return lines + [f"    {count:7,}  {shown(_short(text))}" for text, count in found.commonest]


def _short(text: str) -> str:
    return text if len(text) <= 90 else text[:87] + "..."
