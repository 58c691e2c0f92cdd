"""When to stop: signals, and agreement between processes."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from typing import Any

import jax
import numpy as np

log = logging.getLogger(__name__)
_ECHO_SECONDS = 1.0  # a terminal and a launcher in it both pass on one Ctrl-C


class Signals(contextlib.AbstractContextManager["Signals"]):
    """The first SIGINT, SIGTERM or SIGHUP asks the loop to save and stop; a second SIGINT or SIGTERM acts as usual.

    SIGHUP never insists: when a terminal closes, the kernel sends one and the shell another. And what comes within a
    second of the first signal is the same one again, passed on by a launcher.

    Attributes:
      received: number of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._first_at = 0.0

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` has it ignored, and means it
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if number == signal.SIGHUP and self.received is not None:
            return
        if self.received in (signal.SIGINT, signal.SIGTERM):
            if time.monotonic() - self._first_at > _ECHO_SECONDS:
                signal.signal(number, self._before[number])
                signal.raise_signal(number)
            return
        self.received = number
        self._first_at = time.monotonic()
        with contextlib.suppress(OSError):  # a closed terminal cannot be told
            log.info("%s: saving; again to stop at once", signal.Signals(number).name)


def any_process(flags: list[bool]) -> list[bool]:
    """Each flag, true if it is true in any process of the run: clocks and signals differ between machines.

    With several processes this waits for all of them, so every process must call it at the same points.
    """
    if jax.process_count() == 1:
        return flags
    from jax.experimental import multihost_utils

    return list(np.any(multihost_utils.process_allgather(np.asarray(flags)), axis=0))
