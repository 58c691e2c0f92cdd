"""What there is: every image below the input with where its caption stands, and every input that is none.

Only names are looked at here; contents are read in `plan`. Nothing outside the input folder is ever opened:
links that lead out of it and paths in tables that do are rejects.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from preprocess import PreprocessError, captions
from preprocess.images import EXTENSIONS, OTHER_IMAGES, Rejected

CAPTION_EXTENSIONS = (".json", ".txt")
TABLES = ("metadata.jsonl", "metadata.csv")
_MAX_HEADER = 1_000_000  # bytes of a name or of other headers in an archive


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Bytes on disk: a file, or a part of an archive (`size` >= 0)."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self, limit: int) -> bytes:
        """The bytes; raises `Rejected` if they cannot be read or are more than `limit`."""
        with self.open() as file:
            try:
                size = os.fstat(file.fileno()).st_size if self.size < 0 else self.size
                if size > limit:
                    raise Rejected("file too large", f"{size:,} bytes, the limit is {limit:,}")
                file.seek(self.offset)
                data = file.read(size)
            except OSError as error:
                raise Rejected("unreadable file", error.strerror or str(error), transient=True) from error
        if self.size >= 0 and len(data) < self.size:
            raise Rejected("unreadable file", "the archive is cut short", transient=True)
        return data

    def open(self) -> BinaryIO:
        """The open file; raises `Rejected` if it cannot be opened."""
        try:
            if not stat.S_ISREG(Path(self.path).stat().st_mode):  # opening a pipe would wait for ever
                raise Rejected("not a regular file")
            return Path(self.path).open("rb")
        except FileNotFoundError as error:
            raise Rejected("missing file", str(error.filename), transient=True) from error
        except ValueError as error:  # a NUL in the name
            raise Rejected("missing file", repr(self.path)) from error
        except OSError as error:
            raise Rejected("unreadable file", error.strerror or str(error), transient=True) from error


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """An image that may become a record.

    Attributes:
      key: path below the input, with its extension; unique.
      image: its bytes.
      caption: from a table: the text, or why it is none. None without a row in a table.
      caption_file: the caption's bytes if it has a file of its own.
      caption_type: ".json" or ".txt": what that file is.
    """

    key: str
    image: Place
    caption: str | Rejected | None = None
    caption_file: Place | None = None
    caption_type: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Reject:
    """A line of `rejects.jsonl`."""

    key: str
    file: str
    reason: str
    detail: str = ""
    transient: bool = False

    @classmethod
    def of(cls, key: str, file: str, why: Rejected) -> Reject:
        return cls(printable(key), printable(file), why.reason, printable(why.detail), why.transient)


@dataclasses.dataclass
class Scan:
    """All of the input.

    Attributes:
      root: the input folder, resolved.
      found: by key.
      rejects: inputs that can be seen to be none without opening them.
      ignored: other files, counted by extension.
    """

    root: Path
    found: list[Found] = dataclasses.field(default_factory=list)
    rejects: list[Reject] = dataclasses.field(default_factory=list)
    ignored: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def printable(text: str) -> str:
    """The text with bytes that are no UTF-8 written as \\udcNN, so that it can be stored."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def scan(source: str | Path, caption_field: str = "", exclude: Path | None = None) -> Scan:
    """Lists an input: a folder, a `.jsonl` of image_path and caption, or a `.tar`.

    Args:
      source: the input.
      caption_field: looked for before "caption" and "text".
      exclude: a folder that is not looked into (the dataset, if it lies inside the input).

    Raises:
      PreprocessError: there is no such input, or it is none of the three.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise PreprocessError(f"--input {source}: there is no such file or folder")
    names = captions.fields(caption_field)
    if path.is_dir():
        result = Scan(path.resolve())
        _scan_folder(result, names, exclude.resolve() if exclude else None)
    elif path.suffix.lower() == ".jsonl":
        result = Scan(path.resolve().parent)
        _scan_table(result, path.resolve(), names)
    elif path.suffix.lower() == ".tar":
        result = Scan(path.resolve().parent)
        _scan_tar(result, path.resolve())
    else:
        raise PreprocessError(
            f"--input {source}: expected a folder of images, a .jsonl with image_path and caption, or a .tar"
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


def _scan_folder(result: Scan, names: tuple[str, ...], exclude: Path | None) -> None:
    folders, tables = [result.root], []
    while folders:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            why = Rejected("unreadable folder", error.strerror or str(error), transient=True)
            _reject(result, folder, why)
            continue
        files: list[Path] = []
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                result.ignored["hidden"] += 1
            elif entry.is_dir(follow_symlinks=False):
                if path != exclude:
                    folders.append(path)
            elif _usable(result, entry):
                files.append(path)
        tables += [path for path in files if path.name in TABLES]
        _scan_files(result, files)
    _apply_tables(result, sorted(tables, key=lambda path: (len(path.parts), path)), names)


def _usable(result: Scan, entry: os.DirEntry) -> bool:
    """Whether an entry is a regular file inside the input, with a name that can be a key."""
    path = Path(entry.path)
    try:
        if entry.is_symlink():
            target = path.resolve(strict=True)
            if target.is_dir():
                raise Rejected(
                    "link to a folder", f"to {target}: not followed; move that folder here instead"
                )
            if not target.is_relative_to(result.root):
                raise Rejected("path leaves the input", f"a link to {target}")
        if not stat.S_ISREG(entry.stat().st_mode):
            raise Rejected("not a regular file")
        _key(result.root, path)
    except Rejected as rejected:
        _reject(result, path, rejected)
        return False
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads back to itself
        _reject(result, path, Rejected("broken link", str(error)))
        return False
    return True


def _scan_files(result: Scan, files: list[Path]) -> None:
    """The files of one folder."""
    captions_here = {path.name: path for path in files if path.suffix.lower() in CAPTION_EXTENSIONS}
    used: set[str] = set()
    for path in files:
        extension = path.suffix.lower()
        if extension == ".tar":
            _scan_tar(result, path)
        elif extension in OTHER_IMAGES:
            _reject(
                result, path, Rejected("image type is not read", f"{extension}: convert it to png or jpg")
            )
        elif extension in EXTENSIONS:
            used |= {path.stem + e for e in CAPTION_EXTENSIONS}
            kind = next((e for e in CAPTION_EXTENSIONS if path.stem + e in captions_here), "")
            caption_file = Place(str(captions_here[path.stem + kind])) if kind else None
            result.found.append(Found(_key(result.root, path), Place(str(path)), None, caption_file, kind))
        elif extension not in CAPTION_EXTENSIONS and path.name not in TABLES:
            result.ignored[extension or "no extension"] += 1
    for name, path in captions_here.items():
        if name not in used:
            _reject(result, path, Rejected("caption without an image", "no image of this name beside it"))


def _apply_tables(result: Scan, tables: list[Path], names: tuple[str, ...]) -> None:
    """Gives the rows of metadata files to images without a caption file; the deepest table wins."""
    rows: dict[str, str | Rejected] = {}
    for path in tables:
        for number, row in _rows(result, path):
            try:
                if isinstance(row, Rejected):
                    raise row
                rows[_key_inside(result.root, path.parent, captions.path_in(row))] = _caption(row, names)
            except Rejected as rejected:
                _reject(result, path, rejected, number)
    if not rows:
        return
    for index, found in enumerate(result.found):
        if found.caption_file is None and found.key in rows:
            result.found[index] = dataclasses.replace(found, caption=rows[found.key])
    known = {found.key for found in result.found} | {reject.key for reject in result.rejects}
    for key in rows.keys() - known:
        path = str(result.root / key)
        result.rejects.append(Reject.of(key, path, Rejected("missing file", "listed in a metadata table")))


# ----------------------------------------------------------------------------------- one table, one archive


def _scan_table(result: Scan, path: Path, names: tuple[str, ...]) -> None:
    """A .jsonl of image_path and caption: paths are below the folder that the table is in."""
    for number, row in _rows(result, path):
        try:
            if isinstance(row, Rejected):
                raise row
            key = _key_inside(result.root, result.root, captions.path_in(row))
            result.found.append(Found(key, Place(str(result.root / key)), _caption(row, names)))
        except Rejected as rejected:
            _reject(result, path, rejected, number)


class _Headers:
    """An archive of which only headers are read: tarfile believes one that claims a name of any length."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return self._file.read(size)


def _scan_tar(result: Scan, path: Path) -> None:
    """A WebDataset shard: members that share the name up to the first dot are one sample."""
    prefix = _key(result.root, path)
    images: list[tuple[str, str, Place]] = []
    caption_files: dict[str, Place] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=_Headers(file), mode="r:") as archive:
            for member in archive:
                if member.size < 0:  # it would be read again and again
                    raise tarfile.ReadError(f"member {member.name!r} has the size {member.size}")
                name = PurePosixPath(member.name)
                if member.isdir():
                    continue
                if name.is_absolute() or ".." in name.parts:
                    why = Rejected("path leaves the input", f"member {member.name!r} of the archive")
                    result.rejects.append(Reject.of(f"{prefix}/{member.name}", str(path), why))
                    continue
                if not member.isreg():
                    why = Rejected("not a regular file", "a link or device in the archive")
                    result.rejects.append(Reject.of(f"{prefix}/{member.name}", str(path), why))
                    continue
                place = Place(str(path), member.offset_data, member.size)
                sample = str(name.parent / name.name.partition(".")[0])
                extension = name.suffix.lower()
                if extension in EXTENSIONS:
                    images.append((f"{prefix}/{name}", sample, place))
                elif extension in OTHER_IMAGES:
                    why = Rejected("image type is not read", f"{extension}: convert it to png or jpg")
                    result.rejects.append(Reject.of(f"{prefix}/{name}", str(path), why))
                elif extension in CAPTION_EXTENSIONS:
                    caption_files.setdefault(sample + extension, place)
                else:
                    result.ignored[extension or "no extension"] += 1
    except Exception as error:  # noqa: BLE001  tarfile raises whatever its parser met
        what = str(error)[:200] or type(error).__name__
        why = Rejected("damaged archive", f"{what}: {len(images)} images before the damage were read")
        _reject(result, path, why)
    for key, sample, place in images:
        kind = next((e for e in CAPTION_EXTENSIONS if sample + e in caption_files), "")
        if _utf8(key):
            result.found.append(Found(key, place, None, caption_files.get(sample + kind), kind))
        else:
            why = Rejected("file name is not UTF-8", "a member of the archive")
            result.rejects.append(Reject.of(key, str(path), why))


# ----------------------------------------------------------------------------------------------- small parts


def _rows(result: Scan, path: Path) -> Iterator[tuple[int, dict | Rejected]]:
    try:
        with Place(str(path)).open() as file:
            yield from captions.read_table(file, path.suffix.lower())
    except Rejected as rejected:
        _reject(result, path, rejected)
    except OSError as error:
        why = Rejected(
            "unreadable file", f"{error.strerror}: the rows after it were not read", transient=True
        )
        _reject(result, path, why)


def _caption(row: dict, names: tuple[str, ...]) -> str | Rejected:
    try:
        return captions.from_mapping(row, names)
    except Rejected as rejected:
        return rejected


def _key_inside(root: Path, folder: Path, name: str) -> str:
    """The key of a path in a table; raises `Rejected` if it leads out of the root."""
    try:
        lexical = Path(os.path.normpath(folder / name))
        target = lexical.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise Rejected("broken link", f"{name!r}: {error}") from error
    if not lexical.is_relative_to(root) or not target.is_relative_to(root):
        raise Rejected("path leaves the input", repr(name))
    return _key(root, lexical)


def _key(root: Path, path: Path) -> str:
    """Path below the root with forward slashes; raises `Rejected` if it is not UTF-8."""
    key = path.relative_to(root).as_posix()
    if not _utf8(key):
        raise Rejected("file name is not UTF-8", "rename the file")
    return key


def _utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _reject(result: Scan, path: Path, why: Rejected, line: int = 0) -> None:
    key = path.relative_to(result.root).as_posix() + (f":{line}" if line else "")
    result.rejects.append(Reject.of(key, str(path), why))
