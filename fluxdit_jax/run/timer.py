"""When something is due: every so many steps, and at least every so many minutes."""

from __future__ import annotations

import time

FIRST = 0.1  # of the minutes, until the first time: a new run has something to show early


class IntervalTimer:
    """A clock that asks for something every so many minutes, the first time after a tenth of them."""

    def __init__(self, minutes: float):
        """
        Args:
          minutes: 0 asks for nothing.
        """
        self._seconds = 60 * minutes
        self._at = time.monotonic() + FIRST * self._seconds

    def __bool__(self) -> bool:
        return self._seconds > 0 and time.monotonic() > self._at

    def done(self) -> None:
        """It was done now, for whatever reason."""
        self._at = time.monotonic() + self._seconds
