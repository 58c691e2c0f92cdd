"""Messages are tested by what they name (keys, files, numbers, commands), in whatever words."""

from __future__ import annotations

import re


def naming(*parts: object) -> str:
    """A pattern, for `match=` and `re.search`, of a text with all of `parts` in any order; a number stands alone."""
    return "(?s)" + "".join(f"(?=.*{_part(part)})" for part in parts)


def lines_naming(text: str, *parts: object) -> list[str]:
    """Lines of `text` that have all of `parts`."""
    return [line for line in text.splitlines() if re.search(naming(*parts), line)]


def numbers(*values: float) -> str:
    """A pattern of these numbers one after the other in a line, with any words between them."""
    return r"[^\d\n]+".join(map(_part, values))


def _part(part: object) -> str:
    if isinstance(part, int | float):
        return rf"(?<![\w.]){re.escape(f'{part:,}').replace(',', ',?')}(?![^\W_e]|\.\d)"
    return re.escape(str(part))
