"""A profile of some steps of a run."""

from __future__ import annotations

import logging
from pathlib import Path

import jax

log = logging.getLogger(__name__)


class Trace:
    """A JAX profile of some steps; look at it in TensorBoard or Perfetto."""

    def __init__(self, directory: Path, steps: range):
        self._directory, self._steps, self._running = directory, steps, False

    def at(self, step: int) -> None:
        """To be called before each step (`step`: steps done so far)."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif step not in self._steps:
            self.stop()

    def stop(self) -> None:
        if self._running:
            self._running = False
            try:
                jax.profiler.stop_trace()
            except Exception as error:  # noqa: BLE001  it raises bare C++ errors; a profile is not worth a run
                log.error("the profile could not be written to %s: %s", self._directory, error)
                return
            log.info("profile of steps %d to %d: %s", self._steps.start, self._steps.stop, self._directory)
