"""What there is: every image below the input with where its captions stand, and every input that is none.

Only names are looked at here, and the heads of files without an extension; contents are read in `plan`. Nothing
outside the input folder is opened unless that is allowed: links and paths in tables that lead out of it are rejects.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from preprocess import PreprocessError, captions, tables
from preprocess.archive import COMPRESSED, scan_tar
from preprocess.captions import Source
from preprocess.findings import Found, Reject, Scan, utf8
from preprocess.formats import EXTENSIONS, OTHER_IMAGES, format_of, not_read
from preprocess.images import Rejected
from preprocess.place import Place
from preprocess.sidecars import TYPES, Sidecars, extension, normal
from preprocess.system_folders import hidden, is_plot, names_an_image, of_a_system, of_this_project

TABLE = "metadata"  # a table in a folder: of this name, with an extension of `tables.TYPES`
OUTSIDE = "outside"  # first part of the keys of pictures that are not below the input
_ALLOW = "; --allow-outside takes it"
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def scan(
    source: str | Path, caption_field: str = "", exclude: Path | None = None, outside: bool = False
) -> Scan:
    """Lists an input: a folder, a table of image paths and captions, or a `.tar`.

    Args:
      source: the input.
      caption_field: looked for before "caption" and "text".
      exclude: a folder that is not looked into (the dataset, if it lies inside the input).
      outside: follow links to folders, and take links and paths in tables that lead out of the input.

    Raises:
      PreprocessError: there is no such input, or it is none of the three.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise PreprocessError(f"--input {source}: there is no such file or folder")
    names = captions.fields(caption_field)
    if path.is_dir():
        result = Scan(path.resolve())
        _Folder(result, names, exclude.resolve() if exclude else None, outside).scan()
    elif path.suffix.lower() in tables.TYPES:
        result = Scan(path.resolve().parent)
        _scan_table(result, path.resolve(), names, outside)
    elif path.suffix.lower() == ".tar":
        result = Scan(path.resolve().parent)
        scan_tar(result, path.resolve(), _key(result.root, path.resolve()))
    else:
        unpack = "; unpack the archive first" if path.suffix.lower() in COMPRESSED else ""
        raise PreprocessError(
            f"--input {source}: expected a folder of images, a .tar, or a table of image_path and caption "
            f"({', '.join(tables.TYPES)}){unpack}"
        )
    _settle(result)
    return result


def _settle(result: Scan) -> None:
    """Sorts by key and rejects every second use of a key."""
    result.found.sort(key=lambda found: found.key)
    unique: list[Found] = []
    for found in result.found:
        if unique and unique[-1].key == found.key:
            why = Rejected("name used twice", "the first one was taken")
            result.rejects.append(Reject.of(found.key, found.image.path, why))
        else:
            unique.append(found)
    result.found = unique
    result.rejects.sort(key=lambda reject: (reject.key, reject.reason, reject.detail))


# ------------------------------------------------------------------------------------------ a tree of files


class _Folder:
    """A scan of a tree of files; `scan` fills its result."""

    def __init__(self, result: Scan, names: tuple[str, ...], exclude: Path | None, outside: bool) -> None:
        self._result, self._names, self._exclude, self._outside = result, names, exclude, outside
        self._tables: list[Path] = []
        self._entered = {os.path.realpath(result.root)}  # folders, so that links that lead back end

    def scan(self) -> None:
        folders = [self._result.root]
        while folders:
            folders += self._look_into(folders.pop())
        if self._tables:
            rows = _Rows(self._result, self._names, self._outside)
            for path in sorted(self._tables, key=_table_order):
                rows.read(path)
            rows.give()

    def _look_into(self, folder: Path) -> list[Path]:
        """The files of one folder; returns the folders in it."""
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            why = Rejected("unreadable folder", error.strerror or str(error), transient=True)
            self._result.reject(folder, why)
            return []
        names = {entry.name for entry in entries}
        if folder != self._result.root and of_this_project(names):
            self._result.ignored["a dataset or run of this project"] += 1
            return []
        folders, files = [], []
        for entry in entries:
            path = Path(entry.path)
            if hidden(entry.name):
                self._result.ignored["hidden"] += 1
            elif folder == self._result.root and is_plot(folder, entry.name, names):
                self._result.ignored["drawn by this project"] += 1
            elif self._is_folder(entry):
                if of_a_system(entry.name):
                    self._result.ignored["a system's folder"] += 1
                elif path != self._exclude and self._enters(path):
                    folders.append(path)
            elif self._usable(entry):
                files.append(path)
        self._take(folder, files)
        return folders

    def _is_folder(self, entry: os.DirEntry) -> bool:
        try:
            return entry.is_dir(follow_symlinks=self._outside)
        except OSError:
            return False

    def _enters(self, path: Path) -> bool:
        """Whether a folder is looked into: not a second time by another link."""
        real = os.path.realpath(path)
        if self._outside and real in self._entered:
            self._result.reject(
                path, Rejected("link to a folder", f"to {real}, which is looked into already")
            )
            return False
        self._entered.add(real)
        return True

    def _usable(self, entry: os.DirEntry) -> bool:
        """Whether an entry is a regular file inside the input, with a name that can be a key."""
        path, result = Path(entry.path), self._result
        try:
            if entry.is_symlink():
                target = path.resolve(strict=True)
                if target.is_dir():
                    raise Rejected("link to a folder", f"to {target}: not followed{_ALLOW}")
                if not self._outside and not target.is_relative_to(result.root):
                    raise Rejected("path leaves the input", f"a link to {target}{_ALLOW}")
            if not stat.S_ISREG(entry.stat().st_mode):
                raise Rejected("not a regular file")
            _key(result.root, path)
        except Rejected as rejected:
            result.reject(path, rejected)
            return False
        except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads back to itself
            result.reject(path, Rejected("broken link", str(error)))
            return False
        return True

    def _take(self, folder: Path, files: list[Path]) -> None:
        """Sorts the files of one folder into pictures, captions, tables, archives and others."""
        result, pictures, sidecars = self._result, [], []
        for path in files:
            suffix = extension(path.name)
            if suffix == ".tar":
                scan_tar(result, path, _key(result.root, path))
            elif suffix in COMPRESSED:
                result.reject(path, Rejected("compressed archive", f"{suffix}: unpack it"), counted=False)
            elif suffix in OTHER_IMAGES:
                result.reject(path, Rejected("image type is not read", not_read(suffix)))
            elif suffix in EXTENSIONS or (names_an_image(path.name) and format_of(_head(path))):
                pictures.append(path)
            elif suffix in TYPES:
                sidecars.append((path.name, Place(str(path))))
            elif suffix in tables.TYPES and path.stem.lower() == TABLE:
                self._tables.append(path)
            else:
                result.ignored[suffix or "no extension"] += 1
        beside = Sidecars([path.name for path in pictures], sidecars)
        for path in pictures:
            found = Found(_key(result.root, path), Place(str(path)), beside.sources(path.name))
            result.found.append(found)
        for name, _ in beside.unused():
            why = Rejected("caption without an image", "no image of this name beside it")
            result.reject(folder / name, why, counted=False)
        result.pass_over("another caption file of the same name", beside.repeated())


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError:
        return b""


def _table_order(path: Path) -> tuple:
    """The deepest first; in one folder in the order of `tables.TYPES`."""
    return -len(path.parts), path.parent, tables.TYPES.index(extension(path.name)), path.name


# ------------------------------------------------------------------------------------------------- tables


class _Rows:
    """The captions that metadata tables have for the pictures of a folder."""

    def __init__(self, result: Scan, names: tuple[str, ...], outside: bool) -> None:
        self._result, self._names, self._outside = result, names, outside
        self._known = {found.key for found in result.found}
        self._listed = self._known | {reject.key for reject in result.rejects}
        self._spellings: dict[str, str | None] = {}  # None: of several pictures
        for key in self._known:
            at = normal(key)
            self._spellings[at] = None if at in self._spellings else key
        self._of_key: dict[str, list[Source]] = collections.defaultdict(list)

    def read(self, path: Path) -> None:
        """Takes the rows of a table."""
        result = self._result
        table = path.relative_to(result.root).as_posix()
        for number, row in _rows(result, path, self._names):
            try:
                if isinstance(row, Rejected):
                    raise row
                key = self._find(path.parent, tables.path_in(row)) or self._other(
                    path.parent, row, table, number
                )
                if key:
                    texts = _texts(result, row, self._names)
                    self._of_key[key].append(Source(f"{table}:{number}", 0, texts=texts))
            except Rejected as rejected:
                result.reject(path, rejected, number, counted=False)

    def _find(self, folder: Path, name: str) -> str | None:
        """The key of the picture that a row means: by the very path, else as other systems write it."""
        root = self._result.root
        for spelt in dict.fromkeys((name, name.replace("\\", "/"))):
            lexical = os.path.normpath(folder / spelt)
            key = os.path.relpath(lexical, root)
            if key in self._known:
                return key
            if (key := self._spellings.get(normal(key))) is not None:
                return key
        return None

    def _other(self, folder: Path, row: dict, table: str, number: int) -> str | None:
        """The key of a picture that is not in the folder and may be taken all the same; lists what is missing."""
        result = self._result
        key, file = _inside(result.root, folder, tables.path_in(row), self._outside)
        if key in self._listed:
            return None
        self._listed.add(key)
        if file.is_file() and key.startswith(OUTSIDE):
            result.found.append(Found(key, Place(str(file))))
            self._known.add(key)
            return key
        why = Rejected("missing file", f"listed in {table}, line {number}")
        result.rejects.append(Reject.of(key, str(file), why, counted=False))
        return None

    def give(self) -> None:
        """Puts the rows behind the caption files of each picture."""
        for index, found in enumerate(self._result.found):
            if rows := self._of_key.get(found.key):
                first = 1 + max((source.group for source in found.captions), default=-1)
                groups: dict[str, int] = {}
                numbered = tuple(
                    dataclasses.replace(
                        row, group=first + groups.setdefault(row.name.rpartition(":")[0], len(groups))
                    )
                    for row in rows
                )
                self._result.found[index] = dataclasses.replace(found, captions=found.captions + numbered)


def _scan_table(result: Scan, path: Path, names: tuple[str, ...], outside: bool) -> None:
    """A table as the input: paths are below the folder that it is in."""
    rows: dict[str, tuple[str, list[Source]]] = {}
    for number, row in _rows(result, path, names):
        try:
            if isinstance(row, Rejected):
                raise row
            key, file = _listed(result.root, tables.path_in(row), outside)
            sources = rows.setdefault(key, (file, []))[1]
            sources.append(Source(f"{path.name}:{number}", 0, texts=_texts(result, row, names)))
        except Rejected as rejected:
            result.reject(path, rejected, number)
    result.found += [Found(key, Place(file), tuple(sources)) for key, (file, sources) in rows.items()]


def _listed(root: Path, name: str, outside: bool) -> tuple[str, str]:
    """(key, path) of a picture that a table lists: by its very path, else as other systems write it."""
    spellings = dict.fromkeys((name, name.replace("\\", "/")))
    every = [unicodedata.normalize(form, spelt) for form in ("NFC", "NFD") for spelt in spellings]
    found = [_inside(root, root, spelt, outside) for spelt in dict.fromkeys((*spellings, *every))]
    return next(((key, str(path)) for key, path in found if path.exists()), (found[0][0], str(found[0][1])))


# --------------------------------------------------------------------------------------------- small parts


def _rows(result: Scan, path: Path, names: tuple[str, ...]) -> Iterator[tables.Row]:
    try:
        with Place(str(path)).open() as file:
            yield from tables.read_table(file, extension(path.name), names)
    except Rejected as rejected:
        result.reject(path, rejected)
    except OSError as error:
        why = f"{error.strerror}: the rows after it were not read"
        result.reject(path, Rejected("unreadable file", why, transient=True))


def _texts(result: Scan, row: dict, names: tuple[str, ...]) -> tuple[str, ...] | Rejected:
    try:
        return captions.from_mapping(row, names, result.passed_over)
    except Rejected as rejected:
        return rejected


def _inside(root: Path, folder: Path, name: str, outside: bool) -> tuple[str, Path]:
    """(key, path) of a path in a table; raises `Rejected` if it leads out of the root and that is not allowed."""
    if _DRIVE.match(name):
        raise Rejected("path leaves the input", f"{name!r} is one of Windows: write it relative to the table")
    try:
        lexical = Path(os.path.normpath(folder / name))
        target = lexical.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise Rejected("broken link", f"{name!r}: {error}") from error
    if lexical.is_relative_to(root):
        if outside or target.is_relative_to(root):
            return _key(root, lexical), lexical
    elif outside:
        return f"{OUTSIDE}/{_key(Path('/'), lexical)}", lexical
    raise Rejected("path leaves the input", f"{name!r}{_ALLOW}")


def _key(root: Path, path: Path) -> str:
    """Path below the root with forward slashes; raises `Rejected` if it is not UTF-8."""
    key = str(path)[len(str(root).rstrip("/")) + 1 :]  # `relative_to` takes longer than all else
    if not utf8(key):
        raise Rejected("file name is not UTF-8", "rename the file")
    return key
