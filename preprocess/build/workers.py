"""The workers of a build (`preprocess.cluster`) in its `.build` folder: who is at work, and on what."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

from fluxdit_jax.shared.atomic_files import write_whole
from fluxdit_jax.shared.lock import holder_of
from preprocess import PreprocessError
from preprocess.build.lock import DatasetLock

_FOLDER = "workers"


class _WorkerLock(DatasetLock):
    refusal = "{folder}: this worker's number is taken by {owner}; wait for it to end, or give another number"


@contextlib.contextmanager
def worker_locked(work: Path, name: str, of_build: bool = False) -> Iterator[None]:
    """Holds the place of a worker in the `.build` folder `work`, where no other `build` begins before it ends.

    Args:
      of_build: the worker belongs to the build that is going on.

    Raises:
      PreprocessError: another process has this place, or a build is planning or publishing.
    """
    lock = _WorkerLock(work / _FOLDER, f"{name}.lock", temporary=True)
    try:
        for path in sorted((work / _FOLDER).glob("*.lock")):
            other = path.stem.partition("-of-")[2] != name.partition("-of-")[2]
            if other and (owner := holder_of(path)):
                raise PreprocessError(f"worker {path.stem} is at work ({owner}): give all workers the same number N")
        if not of_build and (owner := holder_of(work / "lock")):
            raise PreprocessError(f"{work.parent} is being planned or published by {owner}; wait for it to end")
        yield
    finally:
        lock.release()


def require_no_worker(work: Path) -> None:
    """Raises `PreprocessError`, naming it, if a worker of a build is at work."""
    for path in sorted((work / _FOLDER).glob("*.lock")):
        if owner := holder_of(path):
            raise PreprocessError(
                f"worker {path.stem} of this build is at work ({owner}); wait for it to end, or stop it"
            )


def note_device(work: Path, device: str) -> None:
    """Notes what a process of the build runs on."""
    (work / _FOLDER).mkdir(exist_ok=True)
    noted = {"host": socket.gethostname(), "device": device}
    name = hashlib.sha256(device.encode()).hexdigest()[:16]
    write_whole(work / _FOLDER / f"{name}.json", json.dumps(noted))


def devices_noted(work: Path) -> list[str]:
    """The kinds of device that workers ran on since the last publication."""
    found = set()
    for path in (work / _FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.add(str(json.loads(path.read_text(encoding="utf-8"))["device"]))
    return sorted(found)
