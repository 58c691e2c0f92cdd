"""Where a run is, for a person: a bar on a terminal, and a line in the log at least every minute."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

from fluxdit_jax.shared.cli import duration

log = logging.getLogger(__name__)
LINE_SECONDS = 20.0  # between the lines of finished steps without a bar
BAR_LINE_SECONDS = 60.0  # ... beside a bar
MEASURED_STEPS = 100  # after which the plan is held against what was measured
SILENT_SECONDS = 55.0  # after so long without a line, one says what the run is doing


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a run is.

    Attributes:
      steps: optimizer steps. micro_batches, global_batch: of each, and the pictures in it.
      images: pictures of an epoch.
      until: the last step of the present stage, None for `steps`.
      later: what the stages after it take, in steps of the present one.
      planned: seconds of a step of the present stage; None: not planned.
      besides: pictures drawn beside `global_batch` in each step so far, of a run whose batch was changed.
    """

    steps: int
    micro_batches: int
    global_batch: int
    images: int
    until: int | None = None
    later: float = 0.0
    planned: float | None = None
    besides: int = 0

    @property
    def last(self) -> int:
        """The last step of the present stage."""
        return self.steps if self.until is None else self.until

    def epochs(self, step: int) -> float:
        return (step * self.global_batch + self.besides) / self.images


class Progress:
    """The bar and the progress lines of a run. Close it: a thread watches that the log never stays silent."""

    def __init__(self, length: Length, step: int, bar: bool | None = None):
        """
        Args:
          step: optimizer steps already done. bar: None shows one where stderr is a terminal.
        """
        self._length = length
        self._bar = tqdm(
            total=length.steps,
            initial=step,
            unit="step",
            smoothing=0.05,
            disable=not (sys.stderr.isatty() if bar is None else bar),
            leave=True,
        )
        self._step, self._mini, self._doing = step, 0, "training"
        self._began = time.monotonic(), step
        self._start_line()
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._break_silence, name="progress", daemon=True)
        self._watch.start()

    def _start_line(self) -> None:
        self._line_at = time.monotonic()
        self._losses: list[float] = []
        self._samples = 0
        self._paused = 0.0

    def micro_batch(self, step: int, mini: int, samples: int) -> None:
        """A micro-batch is done: the run is at `mini` micro-batches of the step after `step`."""
        self._step, self._mini = step, mini
        self._samples += samples

    def pause(self, seconds: float) -> None:
        """Leaves time spent on pictures and the like out of the images per second."""
        self._paused += seconds

    def finished(self, step: int, loss: float, gradient_norm: float, health: str) -> None:
        """An optimizer step is done."""
        self._mini = 0
        if math.isfinite(loss):
            self._losses.append(loss)
        self._step = step
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if step - self._began[1] == MEASURED_STEPS and self._length.planned:
            self._compare(now, self._length.planned)
        rate = self._samples / max(1e-9, now - self._line_at - self._paused)
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.4f}, grad {gradient_norm:.3f}, {rate:.1f} img/s")
        if now - self._line_at < self._seconds() and step < self._length.last:
            return
        log.info(
            "step %d/%d (epoch %.3g of %.3g)  loss %.4f  gradient norm %.3f  %.1f images/s  ETA %s  %s",
            step,
            self._length.steps,
            self._length.epochs(step),
            self._length.epochs(self._length.steps),
            sum(self._losses) / len(self._losses) if self._losses else math.nan,
            gradient_norm,
            rate,
            duration(self._left(step)),
            health,
        )
        self._start_line()

    def _compare(self, now: float, planned: float) -> None:
        """Holds the plan against the first steps, pictures and saving included; the ETA is by measurement always."""
        started, first = self._began
        found = (now - started) / MEASURED_STEPS
        log.info(
            "the first %d steps took %.3g s each, planned were %.3g (%+.0f %%): the run ends in %s",
            *(
                MEASURED_STEPS,
                found,
                planned,
                100 * (found / planned - 1),
                duration(self._left(first + MEASURED_STEPS)),
            ),
        )

    def _seconds(self) -> float:
        return LINE_SECONDS if self._bar.disable else BAR_LINE_SECONDS

    def _left(self, step: int) -> float:
        """Seconds to the end of the run at the pace so far, pictures and saving included."""
        started, first = self._began
        steps = self._length.last - step + self._length.later
        return (time.monotonic() - started) / max(1, step - first) * steps

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Something that takes a while: a log that would be silent names it."""
        self._doing = what
        try:
            yield
        finally:
            self._doing = "training"

    def _break_silence(self) -> None:
        silent_since = self._line_at
        while not self._closed.wait(SILENT_SECONDS / 20):
            silent_since = max(silent_since, self._line_at)
            if time.monotonic() - silent_since < SILENT_SECONDS:
                continue
            silent_since = time.monotonic()
            within = f", micro-batch {self._mini} of {self._length.micro_batches}" if self._mini else ""
            log.info("at step %d/%d%s: %s", self._step, self._length.steps, within, self._doing)

    def close(self) -> None:
        """Ends the bar and the thread; may be called twice."""
        self._closed.set()
        self._watch.join()
        self._bar.close()
