"""Pictures and captions in a WebDataset `.tar`: found by the headers of its members, read in place later."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from preprocess.decoding.formats import EXTENSIONS, OTHER_IMAGES, format_of, not_read
from preprocess.decoding.images import Rejected
from preprocess.input.byte_source import ByteSource
from preprocess.input.findings import Reject, Scan, utf8
from preprocess.input.found import InputImage
from preprocess.input.sidecars import TYPES, Sidecars, extension
from preprocess.input.system_folders import hidden, names_an_image, of_a_system

_PACKED = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".lzma", ".zst", ".tzst", ".lz4", ".br")
COMPRESSED = (*_PACKED, ".zip", ".7z", ".rar")
_MAX_HEADER = 1_000_000  # bytes of a name or of other headers in an archive
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class _Headers:
    """An archive of which only headers are read: tarfile believes one that claims a name of any length."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return self._file.read(size)


def scan_tar(result: Scan, path: Path, prefix: str) -> None:
    """Adds what is in an archive to a scan.

    A picture's captions are the members that share its name without the extension; behind them, those that share it up
    to the first dot, if no other picture does (`Sidecars`). Hidden members and those of system folders are ignored and
    counted.

    Args:
      prefix: the key of the archive, which begins those of its members.
    """
    pictures: dict[str, list[ByteSource]] = {}
    files: list[tuple[str, ByteSource]] = []
    others: list[str] = []

    written: dict[str, tuple[int, int]] = {}  # offset and size of each file, to which hard links lead

    def reject(name: str, why: Rejected) -> None:
        key = f"{prefix}/{name}" if name else prefix
        result.rejects.append(Reject.of(key, str(path), why, counted=extension(name) not in TYPES))

    try:
        with path.open("rb") as file:
            for member in _members(file):
                name = str(PurePosixPath(member.name))
                if member.islnk() and (target := str(PurePosixPath(member.linkname))) in written:
                    member.type = tarfile.REGTYPE
                    member.offset_data, member.size = written[target]
                elif member.isreg() and not member.issparse():
                    written[name] = member.offset_data, member.size
                try:
                    kind = _kind(result, member, file)
                except Rejected as rejected:
                    reject(member.name, rejected)
                    others.append(name)
                    continue
                place = ByteSource(str(path), member.offset_data, member.size)
                if kind == "picture":
                    pictures.setdefault(name, []).append(place)
                elif kind == "caption":
                    files.append((name, place))
    except Exception as error:  # noqa: BLE001  tarfile raises whatever its parser met
        reject("", _damaged(path, error, sum(map(len, pictures.values()))))
    # Members that are counted as ignored claim no caption: a sample may have a `1.cls` beside its `1.json`.
    sidecars = Sidecars(pictures, files, others, first_dot=True)
    for name, places in pictures.items():
        sources = sidecars.sources(name)
        for place in places:
            result.take(InputImage(f"{prefix}/{name}", place, sources))
    for name, _ in sidecars.unused():
        why = Rejected("caption without an image", "no picture of this name was taken")
        result.rejects.append(Reject.of(f"{prefix}/{name}", str(path), why, counted=False))
    result.pass_over("another caption file of the same name", sidecars.repeated())


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    # the stub asks for `write` and `close`, which a reader does not call
    with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
        for member in archive:
            if member.size < 0:  # it would be read again and again
                raise tarfile.ReadError(f"member {member.name!r} has the size {member.size}")
            yield member


def _kind(result: Scan, member: tarfile.TarInfo, file: BinaryIO) -> str:
    """ "picture", "caption" or "": whatever is neither is counted; raises `Rejected`."""
    name = PurePosixPath(member.name)
    if member.isdir():
        return ""
    if name.is_absolute() or ".." in name.parts:
        raise Rejected("path leaves the input", f"member {member.name!r} of the archive")
    if any(hidden(part) for part in name.parts):
        result.ignored["hidden"] += 1
        return ""
    if any(of_a_system(part) for part in name.parts[:-1]):
        result.ignored["in a system's folder"] += 1
        return ""
    if not member.isreg():
        raise Rejected("not a regular file", "a link or device in the archive")
    if member.issparse():  # its bytes do not stand in the archive one after the other
        raise Rejected("not a regular file", "a sparse file in the archive: make it without -S")
    suffix = extension(member.name)
    if suffix in OTHER_IMAGES:
        raise Rejected("image type is not read", not_read(suffix))
    if suffix in TYPES:
        return "caption"
    if suffix in EXTENSIONS or (names_an_image(name.name) and format_of(_head(member, file))):
        if not utf8(member.name):
            raise Rejected("file name is not UTF-8", "a member of the archive")
        return "picture"
    result.ignored[suffix or "no extension"] += 1
    return ""


def _head(member: tarfile.TarInfo, file: BinaryIO) -> bytes:
    position = file.tell()
    file.seek(member.offset_data)
    head = file.read(min(64, member.size))
    file.seek(position)
    return head


def _damaged(path: Path, error: Exception, count: int) -> Rejected:
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as unreadable:
        return Rejected("unreadable file", unreadable.strerror or str(unreadable), transient=True)
    if method := next((name for magic, name in _MAGIC.items() if head.startswith(magic)), ""):
        return Rejected("compressed archive", f"by {method}: unpack it; members are read in place")
    what = str(error)[:200] or type(error).__name__
    return Rejected("damaged archive", f"{what}: {count} images before the damage were read")
