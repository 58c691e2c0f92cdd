"""The images that a scan has found, in a database, as there may be more of them than memory holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Set
from typing import Any

from preprocess.database import Database
from preprocess.decoding.images import Rejected
from preprocess.input.byte_source import ByteSource
from preprocess.input.captions import Source


@dataclasses.dataclass(frozen=True, slots=True)
class InputImage:
    """An image that may become a record.

    Attributes:
      key: path below the input, with its extension; unique.
      image: its bytes.
      captions: where its captions may stand, in order of preference.
    """

    key: str
    image: ByteSource
    captions: tuple[Source, ...] = ()


class Found:
    """Images by key: what it yields is in the order of the keys."""

    def __init__(self, images: Iterable[InputImage] = ()) -> None:
        self._rows = Database(
            "CREATE TABLE found (key TEXT PRIMARY KEY, row TEXT) WITHOUT ROWID",
            "CREATE TABLE captions (number INTEGER PRIMARY KEY, key TEXT, row TEXT)",  # of tables
            "CREATE INDEX captions_of ON captions (key)",
        )
        self._count, self._tables = 0, False
        for image in images:
            self.add(image)

    def add(self, image: InputImage) -> bool:
        """Takes an image; returns False, and does not, if its key is used."""
        added = self._rows.run("INSERT OR IGNORE INTO found VALUES (?, ?)", image.key, _row(image)) > 0
        self._count += added
        return added

    def add_row(self, key: str, table: str, line: int, texts: tuple[str, ...] | Rejected) -> None:
        """Puts a row of a table behind the captions of an image, in one group with the other rows of that table."""
        last = self._rows.one("SELECT row FROM captions WHERE key = ? ORDER BY number DESC LIMIT 1", key)
        before = [_source(*json.loads(last[0]))] if last else self[key].captions
        group = max((source.group for source in before), default=-1)
        if not (last and before[0].name.rpartition(":")[0] == table):
            group += 1
        row = _caption(Source(f"{table}:{line}", group, texts=texts))
        self._rows.run("INSERT INTO captions (key, row) VALUES (?, ?)", key, json.dumps(row))
        self._tables = True

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: str) -> bool:
        return self._rows.one("SELECT 1 FROM found WHERE key = ?", key) is not None

    def __getitem__(self, key: str) -> InputImage:
        found = self._rows.one("SELECT row FROM found WHERE key = ?", key)
        if found is None:
            raise KeyError(key)
        return self._image(key, found[0])

    def __iter__(self) -> Iterator[InputImage]:
        return self.first(self._count)

    def within(self, limit: int) -> int:
        """How many images a limit takes; 0 takes all."""
        return min(limit or self._count, self._count)

    def first(self, count: int) -> Iterator[InputImage]:
        """The first images."""
        for key, row in self._rows.rows("SELECT key, row FROM found ORDER BY key LIMIT ?", count):
            yield self._image(key, row)

    def all_keys(self) -> Iterator[str]:
        for (key,) in self._rows.rows("SELECT key FROM found ORDER BY key"):
            yield key

    def beyond(self, count: int) -> Set[str]:
        """The keys of all images but the first `count`."""
        if count >= self._count:
            return frozenset()
        ((last,),) = self._rows.rows("SELECT key FROM found ORDER BY key LIMIT 1 OFFSET ?", count - 1)
        return _Beyond(self, last, self._count - count)

    def _image(self, key: str, row: str) -> InputImage:
        place, captions = json.loads(row)
        if self._tables:
            query = "SELECT row FROM captions WHERE key = ? ORDER BY number"
            captions += (json.loads(text) for (text,) in self._rows.rows(query, key))
        return InputImage(key, ByteSource(*place), tuple(_source(*each) for each in captions))


class _Beyond(Set[str]):
    """The keys behind `last`."""

    def __init__(self, found: Found, last: str, count: int) -> None:
        self._found, self._last, self._count = found, last, count

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key > self._last and key in self._found

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._found.all_keys() if key > self._last)


# ------------------------------------------------------------------------------------------------- rows, as JSON


def _row(image: InputImage) -> str:
    return json.dumps([_place(image.image), list(map(_caption, image.captions))])


def _caption(source: Source) -> list[Any]:
    why = source.texts
    texts = [why.reason, why.detail, why.transient] if isinstance(why, Rejected) else {"texts": why}
    return [source.name, source.group, _place(source.place), source.type, texts, source.only]


def _place(source: ByteSource | None) -> list[Any] | None:
    return [source.path, source.offset, source.size] if source else None


def _source(name: str, group: int, place: list[Any] | None, kind: str, texts: Any, only: bool) -> Source:
    told = tuple(texts["texts"]) if isinstance(texts, dict) else Rejected(*texts)
    return Source(name, group, ByteSource(*place) if place else None, kind, told, only)
