"""One build at a time: a lock on the dataset directory that dies with its owner."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from preprocess import PreprocessError
from preprocess.units import disk_errors


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path` while the block runs.

    The kernel holds the lock (flock), so it is gone when the owner is, however it died, and there is no
    stale lock to judge. The file's text only says who owns it. The file is left in place by this function:
    whoever removes its folder does so while holding the lock.

    Raises:
      PreprocessError: another process has it; the message names its pid and host.
    """
    while True:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "an unknown process"
            os.close(descriptor)
            raise PreprocessError(
                f"{path.parent.parent} is being written by {owner}; wait for it to end or choose another --output"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # the owner before us has removed the file: it locks nobody out
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)
