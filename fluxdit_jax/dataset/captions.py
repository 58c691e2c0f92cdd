"""The captions of a picture beyond its first: how a record stores them, and which caption a sample is trained on.

A record of one caption has none of these features. One of several has, beside `caption` and what is made from the
first:

    other_captions   a JSON array of the further captions, in order, UTF-8
    other_lengths    the number of text tokens of each
    other_text       their tokens, bfloat16 rows, one caption after the other

and the same of every further condition that is made from the caption. `features.json` does not declare them: TFDS reads
the first caption of every record and passes over the rest.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence

import numpy as np

from fluxdit_jax.dataset import tf_example

MAX_CAPTIONS = 100  # of one picture; what a damaged record may claim is bounded


def feature(name: str) -> str:
    """Of what is made from the further captions."""
    return f"other_{name}"


def lengths_feature(name: str) -> str:
    """Of the lengths of a sequence that is made from them."""
    return "other_lengths" if name == "text" else f"other_{name}_lengths"


def pack(captions: Sequence[str]) -> bytes:
    """The value of `other_captions`."""
    return json.dumps(list(captions), ensure_ascii=False, separators=(",", ":")).encode()


def unpack(data: bytes) -> tuple[str, ...]:
    """The further captions; raises `ValueError` if the value of `other_captions` is damaged."""
    try:
        words = json.loads(data)
        for word in words:
            word.encode()  # half of a surrogate pair is no text
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"other_captions is not a JSON array of texts: {error}") from None
    if not isinstance(words, list) or not 1 <= len(words) < MAX_CAPTIONS:
        raise ValueError(f"other_captions must be an array of 1 to {MAX_CAPTIONS - 1} captions")
    return tuple(words)


def split(
    name: str, values: np.ndarray, count: int, lengths: bytes | None, width: int | None
) -> tuple[np.ndarray, ...]:
    """What was made from each of the further captions.

    Args:
      values: of all of them, flat.
      count: of captions.
      lengths: of a sequence, the packed value of `lengths_feature`; None: of vectors.
      width: of a sequence's token.

    Returns:
      As many views into `values`.

    Raises:
      ValueError: they are damaged or do not agree; the message names the feature.
    """
    if lengths is None or width is None:
        if values.size % count:
            raise ValueError(f"{feature(name)} has {values.size} values, which are not {count} vectors")
        return tuple(values.reshape(count, -1))
    said = lengths_feature(name)
    if len(lengths) > 10 * MAX_CAPTIONS:  # bytes that so many integers can take
        raise ValueError(f"{said} has {len(lengths)} bytes; more than {MAX_CAPTIONS} captions")
    try:
        counts = tf_example.integers(lengths)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from None
    if count != len(counts) or min(counts) < 1:
        raise ValueError(f"other_captions has {count} captions, {said} is {list(counts)[:10]}")
    if sum(counts) * width != values.size:
        raise ValueError(f"{feature(name)} has {values.size} values, not {sum(counts)} rows of width {width}")
    rows = values.reshape(-1, width)
    ends = list(itertools.accumulate(counts))
    return tuple(rows[end - length : end] for length, end in zip(counts, ends, strict=True))


def draw(seed: int, number: int, count: int, weights: Sequence[float] = ()) -> int:
    """Which of a picture's `count` captions a sample is trained on, from 0: a pure function of the arguments.

    Args:
      seed: of the run. number: the sample's, counted from the start of the run.
      weights: relative weight of the first, second, ... caption; the last one holds for all further captions.
        (): all alike. Where all `count` of them are 0, the first caption is taken.
    """
    known = list(weights[:count]) or [1.0]
    sums = list(itertools.accumulate(known + known[-1:] * (count - len(known))))
    if not sums[-1]:
        return 0
    place = int.from_bytes(hashlib.sha256(f"caption {seed} {number}".encode()).digest()[:8]) >> 11
    # The last bound is 2**53 exactly and `place` is below it; a weight of 0 gives an interval without a place.
    return bisect.bisect_right([2**53 * (part / sums[-1]) for part in sums], place)
