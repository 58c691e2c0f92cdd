"""One build at a time: a lock on the dataset directory that dies with its owner."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fluxdit_jax.shared.lock import Lock
from preprocess import PreprocessError


class DatasetLock(Lock):
    error = PreprocessError
    refusal = "{folder} is being written by {owner}; wait for it to end or choose another {option}"
    line = "pid {pid} on host {host}"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path` while the block runs; the folder that it locks is two levels above.

    The file is left in place by this function: whoever removes its folder does so while holding the lock.

    Raises:
      PreprocessError: another process has it; the message names its pid and host. Or it cannot be made.
    """
    lock = DatasetLock(path.parent.parent, f"{path.parent.name}/{path.name}", option="--output")
    try:
        yield
    finally:
        lock.release()
