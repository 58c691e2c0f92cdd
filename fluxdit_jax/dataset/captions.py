"""The captions of a picture beyond its first: how a record stores them, and which caption a sample is trained on.

A record of one caption has none of these features. One of several has, beside `caption` and `text` of the first:

    other_captions   a JSON array of the further captions, in order, UTF-8
    other_lengths    the number of tokens of each
    other_text       their tokens, bfloat16 rows, one caption after the other

`features.json` does not declare them: TFDS reads the first caption of every record and passes over the rest.
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
FEATURES = {
    b"other_captions": tf_example.BYTES,
    b"other_lengths": tf_example.INTEGERS,
    b"other_text": tf_example.BYTES,
}


def pack(captions: Sequence[str]) -> bytes:
    """The value of `other_captions`."""
    return json.dumps(list(captions), ensure_ascii=False, separators=(",", ":")).encode()


def unpack(
    captions: bytes, lengths: bytes, text: np.ndarray, width: int
) -> tuple[tuple[str, ...], tuple[np.ndarray, ...]]:
    """The further captions and the tokens of each.

    Args:
      captions: the value of `other_captions`. lengths: that of `other_lengths`, packed.
      text: the values of `other_text`, [sum of the lengths * width].
      width: of a token.

    Returns:
      Captions, and as many views into `text` of shape [n, width].

    Raises:
      ValueError: they are damaged or do not agree; the message names the feature.
    """
    if len(lengths) > 10 * MAX_CAPTIONS:  # bytes that so many integers can take
        raise ValueError(f"other_lengths has {len(lengths)} bytes; more than {MAX_CAPTIONS} captions")
    try:
        counts = tf_example.integers(lengths)
    except ValueError as error:
        raise ValueError(f"other_lengths: {error}") from None
    try:
        words = json.loads(captions)
        for word in words:
            word.encode()  # half of a surrogate pair is no text
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"other_captions is not a JSON array of texts: {error}") from None
    if not isinstance(words, list) or not 1 <= len(words) < MAX_CAPTIONS:
        raise ValueError(f"other_captions must be an array of 1 to {MAX_CAPTIONS - 1} captions")
    if len(words) != len(counts) or min(counts) < 1:
        raise ValueError(f"other_captions has {len(words)} captions, other_lengths is {list(counts)[:10]}")
    if sum(counts) * width != text.size:
        raise ValueError(f"other_text has {text.size} values, not {sum(counts)} rows of width {width}")
    rows = text.reshape(-1, width)
    ends = list(itertools.accumulate(counts))
    return tuple(words), tuple(rows[end - count : end] for count, end in zip(counts, ends, strict=True))


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
