"""What there is: every image below the input with where its captions stand, and every input that is none.

Only names are looked at here, and the heads of files without an extension; contents are read in `plan`. Nothing
outside the input folder is opened unless that is allowed: links and paths in tables that lead out of it are rejects.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from preprocess import PreprocessError
from preprocess.decoding.formats import EXTENSIONS, OTHER_IMAGES, format_of, not_read
from preprocess.decoding.images import Rejected
from preprocess.input import captions, tables
from preprocess.input.archive import COMPRESSED, scan_tar
from preprocess.input.byte_source import ByteSource
from preprocess.input.captions import Source
from preprocess.input.findings import Scan, key_of
from preprocess.input.found import InputImage
from preprocess.input.listed import ALLOW, Rows, scan_table
from preprocess.input.sidecars import TYPES, Sidecars, extension
from preprocess.input.system_folders import hidden, is_plot, names_an_image, of_a_system, of_this_project

TABLE = "metadata"  # a table in a folder: of this name, with an extension of `tables.TYPES`


def scan(source: str | Path, caption_field: str = "", exclude: Path | None = None, outside: bool = False) -> Scan:
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
        scan_table(result, path.resolve(), names, outside)
    elif path.suffix.lower() == ".tar":
        result = Scan(path.resolve().parent)
        scan_tar(result, path.resolve(), key_of(result.root, path.resolve()))
    else:
        unpack = "; unpack the archive first" if path.suffix.lower() in COMPRESSED else ""
        raise PreprocessError(
            f"--input {source}: expected a folder of images, a .tar, or a table of image_path and caption "
            f"({', '.join(tables.TYPES)}){unpack}"
        )
    result.rejects.sort(key=lambda reject: (reject.key, reject.reason, reject.detail))
    return result


# ------------------------------------------------------------------------------------------ a tree of files


class _Folder:
    """A scan of a tree of files; `scan` fills its result."""

    def __init__(self, result: Scan, names: tuple[str, ...], exclude: Path | None, outside: bool) -> None:
        self._result, self._names, self._exclude, self._outside = result, names, exclude, outside
        self._tables: list[Path] = []
        self._entered: set[str] = set()  # real paths of folders
        self._links: list[Path] = []  # to folders: looked into behind all others
        self._beside_targets: dict[Path, Sidecars] = {}

    def scan(self) -> None:
        folders = [self._result.root]
        while folders or self._links:
            folder = folders.pop() if folders else self._links.pop(0)
            real = os.path.realpath(folder)
            if real in self._entered:
                self._result.ignored["a folder that is looked into by another name"] += 1
                continue
            self._entered.add(real)
            folders += self._look_into(folder)
        if self._tables:
            rows = Rows(self._result, self._names, self._outside)
            for path in sorted(self._tables, key=_table_order):
                rows.read(path)

    def _look_into(self, folder: Path) -> list[Path]:
        """Takes the files of one folder; returns the folders in it."""
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            why = Rejected("unreadable folder", error.strerror or str(error), transient=True)
            self._result.reject(folder, why)
            return []
        names = {entry.name for entry in entries}
        ours = of_this_project(names)
        if ours and folder != self._result.root:
            self._result.ignored["a dataset or run of this project"] += 1
            return []
        folders: list[Path] = []
        files: list[Path] = []
        for entry in entries:
            path = Path(entry.path)
            if hidden(entry.name):
                self._result.ignored["hidden"] += 1
            elif is_plot(path, ours):
                self._result.ignored["drawn by this project"] += 1
            elif self._is_folder(entry):
                if of_a_system(entry.name):
                    self._result.ignored["a system's folder"] += 1
                elif path != self._exclude:
                    (self._links if entry.is_symlink() else folders).append(path)
            elif self._usable(entry):
                files.append(path)
        self._take(folder, files, names)
        return folders

    def _is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir(follow_symlinks=self._outside)
        except OSError:
            return False

    def _usable(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry is a regular file inside the input, with a name that can be a key."""
        path, result = Path(entry.path), self._result
        try:
            if entry.is_symlink():
                target = path.resolve(strict=True)
                if target.is_dir():
                    raise Rejected("link to a folder", f"to {target}: not followed{ALLOW}")
                if not self._outside and not target.is_relative_to(result.root):
                    raise Rejected("path leaves the input", f"a link to {target}{ALLOW}")
            if not stat.S_ISREG(entry.stat().st_mode):
                raise Rejected("not a regular file")
            key_of(result.root, path)
            return True
        except Rejected as rejected:
            why = rejected
        except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads back to itself
            why = Rejected("broken link", str(error))
        suffix = extension(entry.name)
        result.reject(path, why, counted=suffix not in TYPES and path.stem.lower() != TABLE)
        return False

    def _take(self, folder: Path, files: list[Path], names: set[str]) -> None:
        """Sorts the files of one folder into pictures, captions, tables, archives and others."""
        result, pictures, sidecars = self._result, [], []
        for path in files:
            suffix = extension(path.name)
            if suffix == ".tar":
                scan_tar(result, path, key_of(result.root, path))
            elif suffix in COMPRESSED:
                result.reject(path, Rejected("compressed archive", f"{suffix}: unpack it"), counted=False)
            elif suffix in OTHER_IMAGES:
                result.reject(path, Rejected("image type is not read", not_read(suffix)))
            elif _is_picture(path):
                pictures.append(path)
            elif suffix in TYPES:
                sidecars.append((path.name, ByteSource(str(path))))
            elif suffix in tables.TYPES and path.stem.lower() == TABLE:
                self._tables.append(path)
            else:
                result.ignored[suffix or "no extension"] += 1
        others = names.difference((path.name for path in pictures), (name for name, _ in sidecars))
        beside = Sidecars([path.name for path in pictures], sidecars, others)
        for path in pictures:
            sources = beside.sources(path.name)
            if not sources and path.is_symlink():
                sources = self._sources_of_target(path.resolve())
            result.take(InputImage(key_of(result.root, path), ByteSource(str(path)), sources))
        for name, _ in beside.unused():
            why = Rejected("caption without an image", "no picture of this name was taken")
            result.reject(folder / name, why, counted=False)
        result.pass_over("another caption file of the same name", beside.repeated())

    def _sources_of_target(self, target: Path) -> tuple[Source, ...]:
        """The captions beside the file that a link leads to: who links pictures need not link their captions."""
        folder = target.parent
        if folder not in self._beside_targets:
            paths = [path for path in sorted(folder.iterdir()) if not hidden(path.name) and self._within(path)]
            files = [(path.name, ByteSource(str(path))) for path in paths if extension(path.name) in TYPES]
            names = [path.name for path in paths if extension(path.name) not in TYPES]
            pictures = [name for name in names if extension(name) in EXTENSIONS]
            self._beside_targets[folder] = Sidecars(pictures, files, set(names) - set(pictures))
        return self._beside_targets[folder].sources(target.name)

    def _within(self, path: Path) -> bool:
        """Whether a file is of the input, wherever a link leads, or may be of elsewhere."""
        return self._outside or Path(os.path.realpath(path)).is_relative_to(self._result.root)


def _is_picture(path: Path) -> bool:
    return extension(path.name) in EXTENSIONS or (names_an_image(path.name) and bool(format_of(_head(path))))


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError:
        return b""


def _table_order(path: Path) -> tuple[int, Path, int, str]:
    """The deepest first; in one folder in the order of `tables.TYPES`."""
    return -len(path.parts), path.parent, tables.TYPES.index(extension(path.name)), path.name
