"""One process per folder: a lock that dies with its owner, and whose owner can be named.

Imports neither JAX nor PyTorch; `preprocess` uses it too.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from fluxdit_jax.shared.cli import explain, undoing

log = logging.getLogger(__name__)
_PATIENCE = 2.0  # seconds to wait for the gate, and for an owner's line where there is no gate


class LockError(Exception):
    """Another process has the lock, or its file cannot be made; the message names the owner and what to do."""


class Lock:
    """Held from construction to `release`. The kernel releases it when its owner dies, however it dies.

    So there is no stale lock to judge: the line in the file only tells whom the kernel refuses the lock who owns it.
    A process takes the lock and writes its line, or is refused and reads the line, while it holds the lock of the
    folder itself (the gate). A refused process therefore reads the line of the present owner, never an empty file
    or the line of the owner before.

    Attributes:
      error: what is raised. refusal: its message. line: what the file says of its owner. A subclass may change them.
    """

    error: type[Exception] = LockError
    refusal = "{folder} is in use by {owner}; wait for it to end, stop it, or give another {option}"
    line = "pid {pid} on {host}"

    def __init__(self, folder: Path, name: str = ".lock", temporary: bool = False, option: str = "workdir"):
        """
        Args:
          folder: is made if it is not there. name: of the lock's file in it; may lie in a folder of its own.
          temporary: the file is removed by `release`. option: what another folder is given by.

        Raises:
          self.error: another process has the lock, or the folder cannot be made or written.
        """
        self._path, self._temporary, self._option = folder / name, temporary, option
        while True:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with _gate(folder) as gated:
                    if self._take(folder, gated):
                        break
            except OSError as error:
                raise self.error(f"{folder} cannot be made or written: {explain(error)}") from error
        self._undoing = contextlib.ExitStack()
        self._undoing.enter_context(undoing(self._unlink))

    def _take(self, folder: Path, gated: bool) -> bool:
        """Whether the lock was taken on the file that is there now; False: the owner before has removed it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        self._descriptor: int | None = descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _read_owner(descriptor, 0.0 if gated else _PATIENCE)
            os.close(descriptor)
            raise self.error(self.refusal.format(folder=folder, owner=owner, option=self._option)) from error
        except OSError as error:
            log.warning(
                "%s: this file system knows no locks (%s): take care that nothing else writes there",
                folder,
                error.strerror,
            )
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == os.fstat(descriptor).st_ino:
                with contextlib.suppress(OSError):  # a full disk does not keep the lock from being held
                    os.ftruncate(descriptor, 0)
                    os.write(
                        descriptor,
                        self.line.format(pid=os.getpid(), host=socket.gethostname()).encode(),
                    )
                return True
        os.close(descriptor)
        return False

    def release(self) -> None:
        """May be called twice."""
        if self._descriptor is None:
            return
        self._unlink()
        self._undoing.close()
        os.close(self._descriptor)
        self._descriptor = None

    def _unlink(self) -> None:
        if self._temporary:
            self._path.unlink(missing_ok=True)


def holder_of(path: Path) -> str | None:
    """Who holds the lock file `path`, as its line says; None: nobody, or there is no such file.

    Asking does not disturb others that ask; a process that takes the lock at that very moment is refused.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _read_owner(descriptor, _PATIENCE)
    except OSError:  # a file system without locks, of which `Lock` warns
        return None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _gate(folder: Path) -> Iterator[bool]:
    """Holds the lock of the folder itself for the moment of taking or asking; False where that cannot be had."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _take_gate(descriptor)
    finally:
        os.close(descriptor)


def _take_gate(descriptor: int) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:  # another process is taking or asking just now; it may have been suspended
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        except OSError:  # a file system that locks no folders
            return False


def _read_owner(descriptor: int, patience: float) -> str:
    """The owner's line. It stays empty where the disk was full."""
    deadline = time.monotonic() + patience
    while not (line := os.pread(descriptor, 200, 0)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return line.decode("utf-8", "replace").strip() or "another process"
