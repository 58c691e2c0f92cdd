"""Sizes of pictures: which ones a data set holds, and which one is drawn."""

from __future__ import annotations

from fluxdit_jax.dataset.manifest import DatasetError, Manifest
from fluxdit_jax.sampling.prompts import SampleError

Size = tuple[int, int]  # (height, width) in pixels, as everywhere in the code; people read width x height


def in_words(size: Size) -> str:
    """(512, 768) -> "768x512"."""
    return f"{size[1]}x{size[0]}"


def pictures_by_size(manifest: Manifest) -> dict[Size, int]:
    """Training pictures of each size of the bucket table, the most common first; of as many, the squarest, the largest.

    Raises:
      DatasetError: a shard's histogram is malformed.
    """
    counts = dict.fromkeys(manifest.buckets, 0)
    for shard in manifest.shards.get("train", ()):
        for name, count in shard.buckets.items():
            height, _, width = name.partition("x")
            if not (height.isdecimal() and width.isdecimal() and type(count) is int):
                raise DatasetError(f"shard {shard.file!r}: {name!r}: {count!r} is no size with its pictures")
            size = int(height), int(width)
            counts[size] = counts.get(size, 0) + count

    def rank(size: Size) -> tuple[int, float, int]:
        return -counts[size], max(size) / min(size), -size[0] * size[1]

    return {size: counts[size] for size in sorted(counts, key=rank)}


def choose_size(wanted: str | None, manifest: Manifest) -> Size:
    """The size asked for, or the most common one of the training pictures. A reference sets the light, not the size.

    Args:
      wanted: "WIDTHxHEIGHT".

    Raises:
      SampleError: it is no size, or is not in the bucket table. One without a training picture is drawn with a note.
    """
    counts = pictures_by_size(manifest)
    if wanted is None:
        return next(iter(counts))
    try:
        width, height = (int(side) for side in wanted.lower().split("x"))
    except ValueError as error:
        raise SampleError(f"--size is {wanted!r}; it must be WIDTHxHEIGHT in pixels, as 768x512") from error
    known = ", ".join(f"{in_words(size)} ({count:,})" for size, count in counts.items() if count)
    trained = f"It was trained on, with their number of pictures: {known}"
    if (height, width) not in counts:
        turned = f"; the width comes first: {height}x{width} is one" if (width, height) in counts else ""
        raise SampleError(
            f"--size {width}x{height} (width x height) is not a size this model was trained on{turned}. {trained}"
        )
    if not counts[height, width]:
        print(f"note: no training picture is {width}x{height} (width x height); expect less. {trained}")
    return height, width
