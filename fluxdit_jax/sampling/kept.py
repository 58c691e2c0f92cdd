"""What stays loaded from one picture to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Kept:
    """Parts that are slow to load, by name: of each the last one, with the key that it was loaded for."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Hashable, Any]] = {}

    def get(self, part: str, key: Hashable, load: Callable[[], T]) -> T:
        """The part for this key. That of another key goes first: a GPU may not have room for two."""
        if part not in self._parts or self._parts[part][0] != key:
            self._parts.pop(part, None)
            self._parts[part] = key, load()
        found: T = self._parts[part][1]
        return found
