"""Reads the metrics of each step and reports them: terminal, log, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm.contrib.logging import logging_redirect_tqdm

from fluxdit_jax.device.devices import peak_memory_gb
from fluxdit_jax.flow import TIME_BINS
from fluxdit_jax.run.health import DIVERGED, Diagnosis, Monitor, Observation
from fluxdit_jax.run.metrics import UPDATE, MetricsWriter, unpack
from fluxdit_jax.run.progress import Length, Progress
from fluxdit_jax.run.soundness import SUSPECT_MICRO_BATCHES, BrokenRun, Watchdog
from fluxdit_jax.shared.atomic_files import Appended
from fluxdit_jax.shared.cli import explain
from fluxdit_jax.shared.sanitize import shown

log = logging.getLogger(__name__)
_PACKAGE = logging.getLogger("fluxdit_jax")


class Reporter:
    """Follows a run. Use as a context manager.

    What the device measured is read after the next program is dispatched, so that it never waits for the host.

    Attributes:
      trouble: the last serious diagnosis, or None; the loop decides what to do about it.
      diverged: the step at which the weights were found to have diverged, or None.
      progress: the bar and the lines of the log.
    """

    def __init__(
        self,
        *,
        writer: MetricsWriter,
        monitor: Monitor,
        watchdog: Watchdog,
        schedule: optax.Schedule,
        metric_shapes: dict[str, Any],
        batch_size: int,
        flops_per_token: float,
        peak_flops: float,
        step: int,
        length: Length,
        every: int,
        unfinished: dict[str, Any] | None = None,
        comparable: str = "",
        constants: Mapping[str, float] = types.MappingProxyType({}),
    ):
        """
        Args:
          metric_shapes: of the packed metrics of each program of a step; see `metrics.unpack`.
          batch_size: samples per micro-batch.
          flops_per_token: of forward and backward pass, recomputation not counted.
          peak_flops: of all devices per second; 0 if not known.
          step: optimizer steps already done; length: of the whole run.
          every: steps between logged scalars.
          unfinished: what `unfinished` gave when the checkpoint was written that the run goes on from.
          comparable: equal for runs whose losses compare; see `Monitor.recall`.
          constants: what is logged beside every measured scalar.
        """
        self._writer, self._monitor, self._watchdog, self._schedule = writer, monitor, watchdog, schedule
        self._shapes, self._batch_size, self._every = metric_shapes, batch_size, every
        self._nothing_finite = False  # of the last step
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._last, self._constants = length.last, constants
        self.trouble: Diagnosis | None = None
        self.diverged: int | None = None
        self._comparable = comparable
        self._redirect = logging_redirect_tqdm([_PACKAGE]) if _shows_bar() else None
        self.progress = Progress(length, step, bar=_shows_bar())
        self._step = step
        self._unread: tuple[str, Any] | None = None
        self._start_step()
        self._start_window()
        if unfinished is not None:
            self._losses: list[float] = unfinished["losses"]
            self._bins = np.asarray(unfinished["bins"])
            self._window_skipped = unfinished["skipped"]
            self._window_replaced = unfinished.get("replaced", 0)
            if (levels := unfinished.get("levels")) and unfinished.get("comparable") == comparable:
                monitor.recall(levels)

    def __enter__(self) -> Reporter:
        if self._redirect:
            self._redirect.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if isinstance(exception[1], BrokenRun):  # what ends a run by itself stands in its log too
            log.error("%s", exception[1])
        self.close()
        if self._redirect:
            self._redirect.__exit__(*exception)

    def close(self) -> None:
        """Ends the progress bar; may be called twice."""
        self.progress.close()

    @property
    def suspect(self) -> bool:
        """Whether the last step gives reason not to save the state: all its micro-batches were skipped, or many."""
        return self._nothing_finite or self._watchdog.in_a_row >= SUSPECT_MICRO_BATCHES

    def end(self) -> None:
        """After the last step of a run; raises `BrokenRun` if that was one of many without a finite gradient."""
        self._watchdog.end(self._step)

    def unfinished(self) -> dict[str, Any]:
        """What has been read since the last logged line, as JSON: a resumed run logs the same losses."""
        return {
            "losses": self._losses,
            "bins": self._bins.tolist(),
            "skipped": self._window_skipped - self.of_part("skipped"),
            "replaced": self._window_replaced - self.of_part("replaced"),
            "levels": self._monitor.levels(),
            "comparable": self._comparable,
        }

    def of_part(self, metric: str) -> int:
        """The sum of a metric over the micro-batches read of a step that is not whole."""
        return sum(int(micro[metric]) for micro in self._micro_batches)

    def _start_step(self) -> None:
        self._micro_batches: list[dict[str, Any]] = []  # of this step
        self._step_started = time.monotonic()
        self._step_waited = 0.0

    def _start_window(self) -> None:
        self._losses = []
        self._bins = np.zeros((2, TIME_BINS))
        self._window_samples = 0
        self._window_tokens = 0
        self._window_skipped = 0
        self._window_replaced = 0
        self._window_started = time.monotonic()
        self._window_waited = 0.0

    def waited(self, seconds: float) -> None:
        """Counts time in which the device had nothing to do because the data was late."""
        self._step_waited += seconds
        self._window_waited += seconds

    def pause(self, seconds: float) -> None:
        """Leaves time spent on pictures and the like out of the throughput."""
        self.progress.pause(seconds)
        self._window_started += seconds
        self._step_started += seconds

    def take(self, program: str, values: Any) -> None:
        """Keeps the packed metrics of a program that was dispatched, and reads those before.

        Raises:
          BrokenRun: see `Watchdog`.
        """
        self.read()
        self._unread = program, values

    def read(self) -> None:
        """Reads what is not read yet, waiting for the device; raises `BrokenRun`."""
        if self._unread is None:
            return
        (program, values), self._unread = self._unread, None
        metrics = unpack(np.asarray(values), self._shapes[program])
        try:
            (self._read_update if program == UPDATE else self._read_micro_batch)(metrics)
        except BrokenRun as error:
            self._writer.text(self._step, "health/broken", str(error))
            raise

    def _read_micro_batch(self, metrics: dict[str, Any]) -> None:
        self._micro_batches.append(metrics)
        self.progress.micro_batch(self._step, len(self._micro_batches), self._batch_size)
        self._window_samples += self._batch_size
        self._window_tokens += int(metrics["tokens"])
        self._window_replaced += int(metrics["replaced"])
        self._window_skipped += int(metrics["skipped"])
        self._watchdog.micro_batch(self._step, bool(metrics["skipped"]))

    def _read_update(self, metrics: dict[str, Any]) -> None:
        self._step = step = int(metrics["step"])
        elapsed = max(1e-9, time.monotonic() - self._step_started)
        finite = [micro for micro in self._micro_batches if not micro["skipped"]]
        self._nothing_finite = not finite
        loss = norm = ratio = float("nan")  # of a step without a finite micro-batch, whose norms are of the step before
        groups: dict[str, float] = {}
        if not finite:
            metrics = metrics | {"grad_norm": norm, "update_norm": norm, "grad_norm_groups": groups}
        if finite:
            self._watchdog.update(metrics)
            loss, norm = float(np.mean([micro["loss"] for micro in finite])), float(metrics["grad_norm"])
            ratio = float(finite[-1]["prediction_rms"] / finite[-1]["target_rms"])
            groups = {name: float(norm) for name, norm in metrics["grad_norm_groups"].items()}
            self._losses.append(loss)
            self._bins += sum(np.stack([micro["bin_loss"], micro["bin_count"]]) for micro in finite)
        skipped = len(self._micro_batches) - len(finite)
        waited = self._step_waited / elapsed
        for diagnosis in self._monitor.observe(Observation(step, loss, norm, groups, ratio, skipped, waited)):
            (log.warning if diagnosis.serious else log.info)("health: %s", diagnosis.message)
            self._writer.text(step, f"health/{diagnosis.kind}", diagnosis.message)
            if diagnosis.kind == DIVERGED and diagnosis.serious and self.diverged is None:
                self.diverged = step
            if diagnosis.serious and (self.trouble is None or self.trouble.kind != DIVERGED):  # which weighs most
                self.trouble = diagnosis
        self.progress.finished(step, loss, norm, self._monitor.summary())
        if step % self._every == 0 or step == self._last:
            self._log(step, metrics | {"velocity_rms_ratio": ratio}, finite)
        self._start_step()

    def _log(self, step: int, metrics: dict[str, Any], finite: list[dict[str, Any]]) -> None:
        elapsed = max(1e-9, time.monotonic() - self._window_started)
        rate = self._window_samples / elapsed
        scalars = {
            "loss": float(np.mean(self._losses)) if self._losses else float("nan"),
            "gradient_norm": float(metrics["grad_norm"]),
            "learning_rate": float(self._schedule(step - 1)),
            "images_per_second": rate,
            "tokens_per_second": self._window_tokens / elapsed,
            "data_wait": self._window_waited / elapsed,
            "velocity_rms_ratio": metrics["velocity_rms_ratio"],
            "update_norm": float(metrics["update_norm"]),
            "parameter_norm": float(metrics["param_norm"]),
            "ema_distance": float(metrics["ema_distance"]),
            "skipped": self._window_skipped,
            "replaced_samples": self._window_replaced,
        }
        if self._peak_flops:
            scalars["mfu"] = self._window_tokens / elapsed * self._flops_per_token / self._peak_flops
        memory = peak_memory_gb()
        if memory is not None:
            scalars["device_memory_gb"] = memory
        for index, (total, count) in enumerate(self._bins.T):
            if count:
                scalars[f"loss_by_time/{index / TIME_BINS:.3f}"] = float(total / count)
        if aligned := [micro["alignment"] for micro in finite if "alignment" in micro]:
            scalars |= {f"alignment_{name}": float(np.mean([each[name] for each in aligned])) for name in aligned[0]}
        for name, norm in metrics["grad_norm_groups"].items():
            scalars[f"gradient_norm_by_group/{name.replace('/', '.')}"] = float(norm)
        self._writer.scalars(step, scalars | dict(self._constants))
        self._start_window()


def _shows_bar() -> bool:
    return sys.stderr.isatty() and jax.process_index() == 0


class _LogFile(logging.Handler):
    """A log in a file that outlives a full disk."""

    def __init__(self, path: Path):
        self._file = Appended(path)  # first: a handler that exists is closed at the end, whole or not
        super().__init__()

    def emit(self, record: logging.LogRecord) -> None:
        self._file.write(self.format(record) + "\n")

    def close(self) -> None:
        self._file.close()
        super().close()


class _Lines(logging.Formatter):
    """Messages may hold what strangers wrote: it cannot colour a terminal, nor begin a line like one of ours."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), lines=True).replace("\n", "\n    ")


def note_end(path: Path, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
    """Writes to a log the error that ends a run, which its program prints: a terminal may be gone by then."""
    if error is not None and not isinstance(error, BrokenRun):  # that one is logged where it is found
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
            words = explain(error) or type(error).__name__
            file.write(shown(f"{time.strftime('%H:%M:%S')} E ended by an error: {words}", lines=True) + "\n")


def log_to(path: Path) -> Callable[[], None]:
    """Sends the package's log to stderr and to a file; returns how to undo it."""
    formatter = _Lines("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    handlers = [logging.StreamHandler(sys.stderr), _LogFile(path)]
    before = _PACKAGE.level, _PACKAGE.propagate
    for handler in handlers:
        handler.setFormatter(formatter)
        _PACKAGE.addHandler(handler)
    _PACKAGE.setLevel(logging.INFO)
    _PACKAGE.propagate = False

    def undo() -> None:
        for handler in handlers:
            _PACKAGE.removeHandler(handler)
            handler.close()
        _PACKAGE.setLevel(before[0])
        _PACKAGE.propagate = before[1]

    return undo
