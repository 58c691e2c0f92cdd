"""Rows that may be more than memory holds: a SQLite database that only this process sees.

SQLite keeps it in memory while it is small, and beyond that in a file of the folder for temporary files (`TMPDIR`, else
/var/tmp), which ends with the process.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from preprocess import PreprocessError

_CACHE = 32 * 1024  # KiB of it in memory, at most


class Database:
    """Tables that are written in one go and then read; its methods raise `PreprocessError` if the disk is full.

    Args:
      tables: statements that make them.
    """

    def __init__(self, *tables: str) -> None:
        # Threads of one build use it in turns, and SQLite is compiled to bear it.
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for statement in ("PRAGMA journal_mode=OFF", f"PRAGMA cache_size=-{_CACHE}", *tables, "BEGIN"):
            self.run(statement)

    def run(self, statement: str, *values: Any) -> int:
        """Runs a statement; returns how many rows it has changed."""
        try:
            return self._connection.execute(statement, values).rowcount
        except sqlite3.DatabaseError as error:
            raise _failed(error) from error

    def run_many(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Runs a statement for each of the rows."""
        try:
            self._connection.executemany(statement, rows)
        except sqlite3.DatabaseError as error:
            raise _failed(error) from error

    def rows(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, one at a time."""
        try:
            yield from self._connection.execute(query, values)
        except sqlite3.DatabaseError as error:
            raise _failed(error) from error

    def one(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        """The first row of a query; None if there is none, as for a text that is no UTF-8."""
        try:
            return next(self.rows(query, *values), None)
        except UnicodeEncodeError:
            return None


class StoredSet:
    """A set of texts in a `Database`."""

    _WAITING = 1000  # texts that are written at once

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._rows = Database("CREATE TABLE texts (text TEXT)")
        self._waiting: list[str] = []
        self._empty, self._sorted = True, False
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        self._waiting.append(text)
        if len(self._waiting) == self._WAITING:
            self._write()

    def _write(self) -> None:
        self._rows.run_many("INSERT INTO texts VALUES (?)", ((text,) for text in self._waiting))
        self._waiting.clear()
        self._empty = False

    def __contains__(self, text: object) -> bool:
        if self._waiting:
            self._write()
        if not (self._empty or self._sorted):
            self._rows.run("CREATE INDEX of_text ON texts (text)")  # of many at once: sorted, not one by one
            self._sorted = True
        return not self._empty and self._rows.one("SELECT 1 FROM texts WHERE text = ?", text) is not None


def _failed(error: sqlite3.DatabaseError) -> PreprocessError:
    return PreprocessError(
        f"temporary files cannot be written or read ({error}): make space in /var/tmp, or set TMPDIR to a "
        "folder that has some, about 2 KB for each image"
    )
