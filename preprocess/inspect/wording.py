"""What of a dataset's captions decides how well words will steer a model: their length, and how many are alike."""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from fluxdit_jax.shared.sanitize import shown

SHORT = 25  # words: below that a caption leaves most of a picture unsaid
_FEW = 0.05  # of the captions that may be short, or alike but for numbers, without a warning
_OPENING = 4  # words at the beginning of a caption that many may share
# A word, or a character of the scripts that are written without spaces.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
_QUANTILES = (("p5", 0.05), ("median", 0.5), ("p95", 0.95))
_NUMBER = re.compile(r"\d+")


def words(caption: str) -> list[str]:
    """The words of a caption, in lower case; each Chinese, Japanese or Korean character is one."""
    marks_in = "".join("x" if unicodedata.category(c)[0] == "M" else c for c in unicodedata.normalize("NFC", caption))
    return _WORD.findall(marks_in.casefold())


def skeleton(caption: str) -> str:
    """What is left without punctuation, capitals and numbers: equal for captions that are nearly the same."""
    return " ".join(word for word in words(_NUMBER.sub(" ", caption)) if word)


def _nearly_the_same(captions: Sequence[str]) -> str:
    """A caption that another one is nearly, and not quite."""
    first: dict[str, str] = {}
    return next(text for text in captions if first.setdefault(skeleton(text), text) != text)


def wording(captions: Sequence[str]) -> list[str]:
    """Lines about the first captions of all pictures, with a warning for what costs most."""
    lengths, openings, groups = np.zeros(len(captions), int), collections.Counter[str](), collections.Counter[str]()
    for position, caption in enumerate(captions):
        each = words(caption)
        lengths[position] = len(each)
        groups[skeleton(caption)] += 1
        if len(each) > _OPENING:
            openings[" ".join(each[:_OPENING])] += 1
    total = len(captions)
    middle = " ".join(f"{name} {np.quantile(lengths, q):.0f}" for name, q in _QUANTILES)
    lines = [f"  words: min {lengths.min()} {middle} max {lengths.max()} mean {lengths.mean():.1f}"]
    short = int((lengths < SHORT).sum())
    if short > _FEW * total:
        lines.append(
            f"  warning: {short:,} of {total:,} captions have fewer than {SHORT} words. What they do not say cannot be "
            "asked for later, and short captions cost more quality than anything else that was measured "
            "(docs/captions.md)"
        )
    distinct, most = len(groups), groups.most_common(1)[0][1]
    if most > 1:
        lines.append(
            f"  a caption names {total / distinct:.2f} pictures on average, {most:,} at most, if captions that differ "
            "in numbers, capitals and punctuation only are one"
        )
    near = total - distinct - (total - len(set(captions)))
    if near > _FEW * total:
        example = _nearly_the_same(captions)
        lines.append(
            f"  warning: {near:,} captions differ from others in numbers, capitals or punctuation only, as "
            f"{shown(example[:90])!r}: nobody will ask for the number"
        )
    if openings and (common := openings.most_common(1)[0])[1] > max(1, 0.2 * total):
        lines.append(
            f"  {common[1] / total:.0%} of the captions begin with {shown(common[0])!r}: a manner is good, words that "
            "say nothing of the picture are wasted"
        )
    return lines
