"""Pictures named in tables: where a path in a row leads, and the captions that tables have for pictures of a folder."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from preprocess.database import Database
from preprocess.decoding.images import Rejected
from preprocess.input import captions, tables
from preprocess.input.byte_source import ByteSource
from preprocess.input.findings import Reject, Scan, key_of
from preprocess.input.found import InputImage
from preprocess.input.sidecars import extension, normal

ALLOW = "; --allow-outside takes it"
_ELSEWHERE = re.compile(r"[A-Za-z]:[\\/]|\\\\|[a-z]+://")  # Windows' drives and shares, addresses


class Locator:
    """Finds the pictures that rows name.

    Args:
      root: the input folder. outside: whether paths may lead out of it.
    """

    def __init__(self, root: Path, outside: bool) -> None:
        self._root, self._outside = root, outside
        self._listings: dict[Path, dict[str, str]] = {}
        self.prefix = "outside"  # first part of the keys of pictures that are not below the input
        while (root / self.prefix).exists():
            self.prefix += "_"

    def locate(self, folder: Path, name: str) -> tuple[str, Path, bool]:
        """(key, path, whether it is there) of a path in a table of `folder`; spelt as it is or as other systems do.

        Raises:
          Rejected: it leads out of the input and that is not allowed, or is no path.
        """
        if _ELSEWHERE.match(name):
            raise Rejected("path leaves the input", f"{name[:200]!r}: write it relative to the table")
        first, refused = None, None
        for spelt in _spellings(name):
            try:
                key, path = self._inside(folder, spelt)
                there = self._on_disk(path)
                if there is not None and there != path.name:
                    self._inside(path.parent, there)  # it may be a link that leads elsewhere
            except Rejected as rejected:
                refused = refused or rejected
                continue
            if there is not None:
                return key[: len(key) - len(path.name)] + there, path.with_name(there), True
            first = first or (key, path)
        if refused or first is None:
            raise refused or Rejected("no image path", repr(name[:200]))
        return (*first, False)

    def _inside(self, folder: Path, name: str) -> tuple[str, Path]:
        try:
            lexical = Path(os.path.normpath(folder / name))
            target = lexical.resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise Rejected("broken link", f"{name[:200]!r}: {_words(error)}") from error
        if lexical.is_relative_to(self._root):
            if self._outside or target.is_relative_to(self._root):
                return key_of(self._root, lexical), lexical
        elif self._outside:
            return f"{self.prefix}/{key_of(Path('/'), lexical)}", lexical
        raise Rejected("path leaves the input", f"{name[:200]!r}{ALLOW}")

    def _on_disk(self, path: Path) -> str | None:
        """The name of a file as it is, or but for the case of its extension and the composition of its accents."""
        try:
            if path.exists():
                return path.name
            if path.parent not in self._listings:
                found = [entry.name for entry in os.scandir(path.parent)] if path.parent.is_dir() else []
                self._listings[path.parent] = {normal(name): name for name in sorted(found)}
        except (OSError, ValueError) as error:
            raise Rejected("missing file", f"{path.name[:200]!r}: {_words(error)}") from error
        return self._listings[path.parent].get(normal(path.name))


def _spellings(name: str) -> dict[str, None]:
    plain = dict.fromkeys((name, name.replace("\\", "/"), name.strip()))
    composed = (unicodedata.normalize(form, spelt) for form in ("NFC", "NFD") for spelt in plain)
    return dict.fromkeys((*plain, *composed))


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)[:200]


class Rows:
    """The captions that metadata tables have for the pictures of a folder."""

    def __init__(self, result: Scan, names: tuple[str, ...], outside: bool) -> None:
        self._result, self._names = result, names
        self._locator = Locator(result.root, outside)
        self._missing = {reject.key for reject in result.rejects}
        self._spellings = Database("CREATE TABLE spellings (spelling TEXT PRIMARY KEY, key TEXT) WITHOUT ROWID")
        self._spellings.run_many(  # NULL: of several pictures
            "INSERT INTO spellings VALUES (?, ?) ON CONFLICT (spelling) DO UPDATE SET key = NULL",
            ((normal(key), key) for key in result.found.all_keys()),
        )

    def read(self, path: Path) -> None:
        """Takes the rows of a table."""
        table = path.relative_to(self._result.root).as_posix()
        is_picture = lambda name: self._find(path.parent, name) is not None  # noqa: E731
        for number, row in _rows(self._result, path, self._names, is_picture):
            try:
                if isinstance(row, Rejected):
                    raise row
                name = tables.path_in(row)
                key = self._find(path.parent, name) or self._other(path.parent, name, table, number)
                if key:
                    self._result.found.add_row(key, table, number, _texts(self._result, row, self._names))
            except Rejected as rejected:
                self._result.reject(path, rejected, number, counted=False)

    def _find(self, folder: Path, name: str) -> str | None:
        """The key of the picture of the folder that a row means."""
        for spelt in _spellings(name):
            key = os.path.relpath(os.path.normpath(folder / spelt), self._result.root)
            if key in self._result.found:
                return key
            other = self._spellings.one("SELECT key FROM spellings WHERE spelling = ?", normal(key))
            if other and other[0] is not None:
                return other[0]
        return None

    def _other(self, folder: Path, name: str, table: str, number: int) -> str | None:
        """The key of a picture outside, which may be taken; lists what is missing."""
        key, path, there = self._locator.locate(folder, name)
        if key in self._result.found:
            return key
        if there and path.is_file() and key.startswith(self._locator.prefix + "/"):
            self._result.take(InputImage(key, ByteSource(str(path))))
            return key
        if key in self._missing:
            self._result.pass_over("a row for a picture that is missing or was rejected", 1)
        else:
            self._missing.add(key)
            why = Rejected("missing file", f"listed in {table}, line {number}")
            self._result.rejects.append(Reject.of(key, str(path), why, counted=False))
        return None


def scan_table(result: Scan, path: Path, names: tuple[str, ...], outside: bool) -> None:
    """Adds the rows of a table that is the input itself: paths are below the folder that it is in."""
    locator = Locator(result.root, outside)

    def is_picture(name: str) -> bool:
        try:
            return locator.locate(result.root, name)[2]
        except Rejected:
            return False

    for number, row in _rows(result, path, names, is_picture):
        try:
            if isinstance(row, Rejected):
                raise row
            key, file, _ = locator.locate(result.root, tables.path_in(row))
            if key not in result.found:
                result.take(InputImage(key, ByteSource(str(file))))
            result.found.add_row(key, path.name, number, _texts(result, row, names))
        except Rejected as rejected:
            result.reject(path, rejected, number)


def _rows(result: Scan, path: Path, names: tuple[str, ...], is_picture: Callable[[str], bool]) -> Iterator[tables.Row]:
    try:
        with ByteSource(str(path)).open() as file:
            yield from tables.read_table(file, extension(path.name), names, is_picture)
    except Rejected as rejected:
        result.reject(path, rejected)
    except OSError as error:
        why = f"{error.strerror}: the rows after it were not read"
        result.reject(path, Rejected("unreadable file", why, transient=True))


def _texts(result: Scan, row: dict[str, Any], names: tuple[str, ...]) -> tuple[str, ...] | Rejected:
    try:
        return captions.from_mapping(row, names, result.passed_over)
    except Rejected as rejected:
        return rejected
