"""What a scan of the input finds: pictures with the places of their captions, and what is none, with the reason."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

from preprocess.decoding.images import Rejected
from preprocess.input.found import Found, InputImage

_LONGEST = 4096  # characters of a name or detail in `rejects.jsonl`: what a table says may be of any length


@dataclasses.dataclass(frozen=True, slots=True)
class Reject:
    """A line of `rejects.jsonl`.

    Attributes:
      transient: it may be different next time, so it is tried again.
      counted: it is an input that was to become a record; a lone caption or a row for no picture is only listed.
    """

    key: str
    file: str
    reason: str
    detail: str = ""
    transient: bool = False
    counted: bool = True

    @classmethod
    def of(cls, key: str, file: str, why: Rejected, counted: bool = True) -> Reject:
        texts = (printable(text)[:_LONGEST] for text in (key, file, why.detail))
        key, file, detail = texts
        return cls(key, file, why.reason, detail, why.transient, counted)

    def to_dict(self) -> dict[str, Any]:
        """All fields, `counted` only where it is False."""
        raw = dataclasses.asdict(self)
        if self.counted:
            del raw["counted"]
        return raw


def counted(rejects: list[Reject]) -> int:
    """How many of them were to become records."""
    return sum(reject.counted for reject in rejects)


@dataclasses.dataclass
class Scan:
    """All of the input.

    Attributes:
      root: the input folder, resolved.
      found: images by key.
      rejects: inputs that can be seen to be none without opening them.
      ignored: other files and folders, counted by extension or kind.
      passed_over: captions and rows that were not taken because another one was, counted by reason.
    """

    root: Path
    found: Found = dataclasses.field(default_factory=Found)
    rejects: list[Reject] = dataclasses.field(default_factory=list)
    ignored: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    passed_over: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def take(self, image: InputImage) -> None:
        """Adds an image; its key may be used by another one, then it is rejected."""
        if not self.found.add(image):
            why = Rejected("name used twice", "the first one was taken")
            self.rejects.append(Reject.of(image.key, image.image.path, why))

    def reject(self, path: Path, why: Rejected, line: int = 0, counted: bool = True) -> None:
        """Adds a path below the root, or a line of the table that it is, to the rejects."""
        key = path.relative_to(self.root).as_posix() + (f":{line}" if line else "")
        self.rejects.append(Reject.of(key, str(path), why, counted))

    def pass_over(self, reason: str, count: int) -> None:
        """Counts captions that were not taken, if there are any."""
        if count:
            self.passed_over[reason] += count


def printable(text: str) -> str:
    """The text with bytes that are no UTF-8 written as \\udcNN, so that it can be stored."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def key_of(root: Path, path: Path) -> str:
    """Path below the root with forward slashes; raises `Rejected` if it is not UTF-8."""
    key = str(path)[len(str(root).rstrip("/")) + 1 :]  # `relative_to` takes longer than all else
    if not utf8(key):
        raise Rejected("file name is not UTF-8", "rename the file")
    return key


def utf8(text: str) -> bool:
    """Whether a name can be stored as it is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
