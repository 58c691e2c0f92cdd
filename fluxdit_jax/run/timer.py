"""When something is due: every so many steps, and at least every so many minutes."""

from __future__ import annotations

import time

FIRST = 0.1  # of the minutes, until the first time: a new run has something to show early


class IntervalTimer:
    """A timer that is due every so many minutes, the first time after a tenth of them."""

    def __init__(self, minutes: float):
        """
        Args:
          minutes: 0: never due.
        """
        self._seconds = 60 * minutes
        self._at = time.monotonic() + FIRST * self._seconds

    def due(self) -> bool:
        return self._seconds > 0 and time.monotonic() > self._at

    def done(self) -> None:
        """Restarts the interval."""
        self._at = time.monotonic() + self._seconds
