"""What strangers wrote: names of files, keys and captions, before they reach a path, a terminal or a log."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# What moves, colours or forges the lines of a terminal or log: control characters, other line ends, turns of the
# writing direction. Also halves of surrogate pairs, which cannot be written at all.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str, lines: bool = False) -> str:
    """Text of a stranger (a file's name, a key, a caption) as a terminal or log may show it: controls as \\x1b.

    Args:
      lines: line ends and tabs may stay, because the text is a whole message of ours.
    """

    def escape(found: re.Match[str]) -> str:
        if lines and found[0] in "\n\t":
            return found[0]
        return found[0].encode("unicode_escape").decode()

    return _CONTROLS.sub(escape, text)


def plain_name(name: Any) -> bool:
    """Whether metadata may name a file so: printable, no way to another folder, not too long for a file system."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", "..")
        and Path(name).name == name
        and len(name.encode()) <= 255
    )
