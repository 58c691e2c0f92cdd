"""The captions of a photograph and of its mirrored picture: they differ in the words of the gate's text edit only."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from preprocess import PreprocessError

ORIGINAL, MIRRORED = "original", "mirrored"
_DIRECTIONS = ("right", "left", "up", "down")


@dataclasses.dataclass(frozen=True)
class Edit:
    """Words that mirroring exchanges, both ways: `old` becomes `new` and `new` becomes `old`."""

    old: str
    new: str

    @classmethod
    def parse(cls, text: str) -> Edit:
        """From "looking left=>looking right".

        Raises:
          PreprocessError: it is not of that form.
        """
        old, _, new = (part.strip() for part in text.partition("=>"))
        before, _, direction = new.rpartition(":")
        if before and direction in _DIRECTIONS:
            raise PreprocessError(f"--edit {text!r} names a direction, which is not asked for: '{old}=>{before}'")
        if not (old and new) or old.casefold() == new.casefold():
            raise PreprocessError(f"--edit {text!r} must be 'OLD WORDS=>NEW WORDS'")
        return cls(old, new)


USUAL = Edit("looking left", "looking right")
_SIDES = Edit("left", "right")  # exchanged anywhere


def mirrored(caption: str, edits: Sequence[Edit]) -> str:
    """The caption with the words of the edits, and left and right, exchanged; the same if it has none of them.

    Whole words, whatever their case; an exchanged word takes the case of the first letter it replaces.
    """
    words: dict[str, str] = {}
    for edit in [_SIDES, *edits]:
        taken = {edit.old.lower(), edit.new.lower()}
        words = {old: new for old, new in words.items() if not taken & {old, new.lower()}}
        words |= {edit.old.lower(): edit.new, edit.new.lower(): edit.old}
    longest = sorted(words, key=len, reverse=True)
    pattern = "|".join(_whole(phrase) for phrase in longest)

    def exchanged(match: re.Match[str]) -> str:
        new = words.get(match[0].lower(), match[0])  # to `re`, "i" is equal to a dotless one
        if match[0].isupper():
            return new.upper()
        return new[0].upper() + new[1:] if match[0][0].isupper() else new

    return re.sub(pattern, exchanged, caption, flags=re.IGNORECASE)


def captions_of_views(caption: str, edits: Sequence[Edit]) -> tuple[str, str]:
    """(original, mirrored). To a caption without words to exchange those of the first edit are added."""
    other = mirrored(caption, edits)
    if other != caption:
        return caption, other
    body = caption.rstrip()
    end = "." if body.endswith(".") else ""
    body = body.rstrip(".").rstrip()
    return f"{body}, {edits[0].old}{end}", f"{body}, {edits[0].new}{end}"


def _whole(words: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", words) else ""
    after = r"(?!\w)" if re.search(r"\w$", words) else ""
    return before + re.escape(words) + after
