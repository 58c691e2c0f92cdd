"""Files that are whole or not there, and files that only grow, on disks that may be full for a while."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fluxdit_jax.shared.cli import undoing

log = logging.getLogger(__name__)
_REMIND_SECONDS = 600.0


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path; what was written there becomes `path` when the block ends well, and else is removed.

    The name is `path` with .tmp after it, so that what a killed process left is overwritten by the next one.

    Raises:
      OSError: the disk; its message names the path.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with undoing(lambda: temporary.unlink(missing_ok=True)):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a write does not know its file
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(folder: Path, longest: str = "") -> None:
    """Checks, before hours of work, that files can be made in a folder, which may not be there yet. Makes nothing.

    Args:
      longest: name of a file that will be made there.

    Raises:
      OSError: it is no folder, or lies in none; it cannot be written; or the name is too long.
    """
    nearest = folder
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    number = 0
    if not nearest.is_dir():
        number = errno.ENOTDIR
    elif os.statvfs(nearest).f_flag & os.ST_RDONLY:
        number = errno.EROFS
    elif not os.access(nearest, os.W_OK | os.X_OK):
        number = errno.EACCES
    elif len(f".{longest}.lock".encode()) > os.pathconf(nearest, "PC_NAME_MAX"):
        nearest, number = nearest / longest, errno.ENAMETOOLONG
    if number:
        raise OSError(number, os.strerror(number), str(nearest))


def write_whole(path: Path, text: str) -> None:
    """Writes a text file as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class Appended:
    """A log file. What cannot be written now, because the disk is full or gone, waits in memory and is tried again.

    Attributes:
      failures: how often writing failed.
    """

    def __init__(self, path: Path, limit: int = 64 << 20):
        """
        Args:
          limit: bytes that may wait; the latest lines beyond it are dropped, counted and reported.

        Raises:
          OSError: the file cannot be opened.
        """
        self.failures = 0
        self._path, self._limit = path, limit
        self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._waiting = bytearray()
        self._dropped = 0
        self._told_at: float | None = None

    def write(self, text: str) -> None:
        """Appends whole lines. A disk that fails raises nothing: it is logged, at first and every ten minutes."""
        if self._descriptor is None:
            raise ValueError(f"{self._path} is closed")
        line = text.encode("utf-8")
        if len(self._waiting) + len(line) > self._limit:
            self._dropped += len(line)
        else:
            self._waiting += line
        try:
            while self._waiting:  # a part may be written before the disk is full; the rest of the line follows it
                del self._waiting[: os.write(self._descriptor, self._waiting)]
        except OSError as error:
            self.failures += 1
            self._report(error)
            return
        if self._told_at is not None:
            self._told_at = None  # before it is told: this may be the file that the log goes to
            log.warning("%s can be written again%s", self._path, self._lost())

    def close(self) -> None:
        """Tries once more and tells what is lost. May be called twice."""
        if self._descriptor is None:
            return
        if self._waiting:
            self.write("")
        if self._waiting or self._dropped:
            self._dropped += len(self._waiting)
            log.error("%s is incomplete%s", self._path, self._lost())
        os.close(self._descriptor)
        self._descriptor = None

    def _report(self, error: OSError) -> None:
        now = time.monotonic()
        if self._told_at is not None and now - self._told_at < _REMIND_SECONDS:
            return
        self._told_at = now
        log.error(
            "cannot write to %s: %s. The run goes on; %d bytes wait in memory to be written there. Make space",
            self._path,
            error.strerror,
            len(self._waiting),
        )

    def _lost(self) -> str:
        return f"; {self._dropped} bytes are lost" if self._dropped else ""
