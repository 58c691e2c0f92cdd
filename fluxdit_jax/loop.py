"""The loop over the steps of a stage: accumulate, update, and what is measured, drawn and saved meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fluxdit_jax import overview
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.device import devices, sharding
from fluxdit_jax.loader import reader
from fluxdit_jax.looks import Look, looks_of
from fluxdit_jax.model import dit
from fluxdit_jax.optimizer import learning_rate
from fluxdit_jax.plan import training_flops
from fluxdit_jax.prepared import Prepared, open_source
from fluxdit_jax.run import reporting
from fluxdit_jax.run.checkpoint import Checkpoints
from fluxdit_jax.run.health import DEAD_STEPS, DIVERGED, WINDOW, Diagnosis, Monitor
from fluxdit_jax.run.metrics import ACCUMULATE, PLAIN, UPDATE, MetricsWriter
from fluxdit_jax.run.profile import Trace
from fluxdit_jax.run.signals import Signals, any_process
from fluxdit_jax.run.soundness import BrokenRun, Watchdog
from fluxdit_jax.run.timer import IntervalTimer
from fluxdit_jax.settings import Settings
from fluxdit_jax.state import TrainState, without_part

log = logging.getLogger("fluxdit_jax")


@dataclasses.dataclass(frozen=True, eq=False)
class Position:
    """Where a run is.

    Attributes:
      state: at a step.
      samples: drawn so far.
      unfinished: see `Reporter.unfinished`; None for nothing.
    """

    state: TrainState
    samples: int
    unfinished: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What all stages of a run share."""

    workdir: Path
    stages: list[Prepared]
    checkpoints: Checkpoints
    writer: MetricsWriter
    signals: Signals
    trace: Trace
    save_timer: IntervalTimer
    show_timer: IntervalTimer

    @property
    def last(self) -> int:
        """The last step."""
        return self.stages[-1].stage.last


@dataclasses.dataclass(frozen=True, eq=False)
class Ended:
    """How a stage ended: where the run is then, whether it stops there, and the diagnosis that it stops for."""

    position: Position
    stopped: bool = False
    trouble: str | None = None


class _Feed:
    """The micro-batches of a stage from a sample on, to those of its last step; one is ahead on the devices.

    Attributes:
      batch: the present one.
    """

    def __init__(self, present: Prepared, samples: int, steps: int) -> None:
        self._mesh = present.mesh
        self._batches = itertools.islice(
            _batches(present, samples), steps * present.settings.optimizer.grad_accum_steps
        )
        self.advance()

    def advance(self) -> None:
        """Raises `DatasetError` if the next one cannot be read."""
        if (batch := next(self._batches, None)) is not None:
            self.batch = sharding.put_batch(self._mesh, batch)


def run_stage(run: Run, present: Prepared, position: Position) -> Ended:
    """Trains from a position before the end of a stage to it, or until a signal or a diagnosis stops the run."""
    stage = present.stage
    state, samples = position.state, position.samples
    first = int(state.step)
    feed = _Feed(present, samples, stage.last - first)
    looks = looks_of(run.stages, present, run.workdir, run.writer)
    with _reporter(run, present, position) as reporter:
        # The metrics of a program are read after the next one is dispatched, so that the device never waits for
        # the host. The host waits for the device only when it needs the state.
        stopping = False
        for step in range(first + 1, stage.last + 1):
            run.trace.at(step - 1)
            state, whole = _trained(run, present, reporter, feed, state, samples, step)
            if not whole:
                state = _whole(reporter, state)
                _visit(run, present, reporter, _STOP, state, samples, step - 1)
                return Ended(Position(state, samples), stopped=True)
            samples += present.settings.global_batch_size
            due = _due(run, present, reporter, looks, step)
            if not due.anything:
                run.checkpoints.poll()
                continue
            stopping = _visit(run, present, reporter, due, state, samples, step)
            if stopping:
                break
        trouble = _trouble(present, reporter)
        return Ended(Position(state, samples), stopping, trouble.kind if trouble else None)


def _trained(
    run: Run, present: Prepared, reporter: reporting.Reporter, feed: _Feed, state: TrainState, samples: int, step: int
) -> tuple[TrainState, bool]:
    """The state after a step: its micro-batches, then the update. `samples` were drawn before.

    A signal ends it after a micro-batch, as a step may take longer than a process is left after it; then the second
    value is False. Of several processes it does not: the others go on.
    """
    programs, alignment = present.compiled, present.settings.alignment
    aligned = alignment is None or alignment.at(step)
    accumulate = programs.accumulate if aligned else programs.plain
    for _ in range(present.settings.optimizer.grad_accum_steps):
        if run.signals.received is not None and jax.process_count() == 1 and step > 1:
            return state, False
        state, values = accumulate(state, feed.batch)
        asked = time.monotonic()
        try:
            feed.advance()
        except DatasetError as error:
            raise _saved(run, reporter, state, samples, error) from error
        if values.is_ready():  # the device was done before the data came
            reporter.waited(time.monotonic() - asked)
        reporter.take(ACCUMULATE if aligned else PLAIN, values)
    state, values = programs.update(state)
    reporter.take(UPDATE, values)
    return state, True


@dataclasses.dataclass(frozen=True)
class _Due:
    """What a step calls for.

    Attributes:
      stopping: the run ends here.
      save, averages: the state, and its averages alone.
      show: what is looked at by time.
    """

    stopping: bool
    save: bool
    averages: bool
    show: bool
    looks: list[Look]

    @property
    def anything(self) -> bool:
        return self.stopping or self.save or self.averages or bool(self.looks)


_STOP = _Due(stopping=True, save=False, averages=False, show=False, looks=[])


def _due(run: Run, present: Prepared, reporter: reporting.Reporter, looks: list[Look], step: int) -> _Due:
    last = step == present.stage.last
    to_stop = run.signals.received is not None or _trouble(present, reporter) is not None
    stopping, save, show = any_process([to_stop, last or run.save_timer.due(), last or run.show_timer.due()])
    show = show and (last or not stopping)
    return _Due(
        stopping=stopping,
        save=save,
        averages=last or step % present.stage.config.checkpoint.ema_every == 0,
        show=show,
        looks=[look for look in looks if look.due(step, last, show, stopping)],
    )


def _trouble(present: Prepared, reporter: reporting.Reporter) -> Diagnosis | None:
    """The diagnosis that ends the run; None if there is none."""
    return reporter.trouble if present.stage.config.health.action == "stop" else None


def _visit(
    run: Run, present: Prepared, reporter: reporting.Reporter, due: _Due, state: TrainState, samples: int, step: int
) -> bool:
    """Saves and looks at the state of a step, as far as it is due; returns whether the run stops there."""
    last = step == present.stage.last
    reporter.read()  # waits for the device
    if step == run.last:
        reporter.end()
    trouble = _trouble(present, reporter)
    diverged = trouble is not None and trouble.kind == DIVERGED
    if not diverged:
        _keep_good(run, reporter)
    suspect = (reporter.suspect or diverged) and step < run.last
    asked = time.monotonic()
    meta = {"samples": samples, "unfinished": reporter.unfinished()}

    def show(late: bool) -> None:
        for look in (look for look in due.looks if look.late == late):
            with reporter.progress.doing(look.doing):
                look.show(state, step, last)

    if suspect and (due.stopping or due.save):
        why = "it has diverged" if diverged else "no finite gradient in the last micro-batches"
        log.warning("the state of step %d is not saved: %s", step, why)
    elif due.stopping:  # first, so that pictures do not delay the end
        run.checkpoints.save(step, state, meta)
    show(late=False)
    if due.show:
        run.show_timer.done()
    if due.averages and not suspect:
        run.checkpoints.save_averages(step, state)
    if due.save and not (due.stopping or suspect):
        with reporter.progress.doing("saving"):
            run.checkpoints.save(step, state, meta)
        run.save_timer.done()
    show(late=True)
    reporter.pause(time.monotonic() - asked)
    if due.stopping:
        return True
    # Either may have come meanwhile; the next stage has a monitor of its own.
    to_stop = run.signals.received is not None or (last and _trouble(present, reporter) is not None)
    if step < run.last and any_process([to_stop])[0]:
        if not (due.save or suspect):
            run.checkpoints.save(step, state, meta)
        return True
    return False


def _whole(reporter: reporting.Reporter, state: TrainState) -> TrainState:
    """The state of the last whole step, of one within a step; raises `BrokenRun` as reading does."""
    reporter.read()
    return without_part(state, reporter.of_part("skipped"))


def _keep_good(run: Run, reporter: reporting.Reporter) -> None:
    """Before a state is saved that has diverged: keeps one from before."""
    if (found := reporter.diverged) is not None and (kept := run.checkpoints.keep_before(found, WINDOW)) is not None:
        why = f"it is from {found - kept} steps before the weights were found to have diverged"
        log.warning("checkpoints/%d is kept beside newer ones: %s", kept, why)


def _saved(
    run: Run, reporter: reporting.Reporter, state: TrainState, samples: int, error: DatasetError
) -> DatasetError:
    """Saves the last whole step before an error of the data ends the run; returns the error with what is saved.

    Of several processes the others are within a step, and nothing is saved.
    """
    step = int(state.step)
    if jax.process_count() > 1 or not step:
        return error
    with contextlib.suppress(BrokenRun):
        state = _whole(reporter, state)
        _keep_good(run, reporter)
        run.checkpoints.save(step, state, {"samples": samples, "unfinished": reporter.unfinished()})
        run.checkpoints.poll(wait=True)
        if run.checkpoints.latest_step() == step:
            return DatasetError(f"{error}. The state of step {step} is saved: the same command goes on from there")
    return error


def _batches(present: Prepared, samples: int) -> Iterator[dict[str, np.ndarray]]:
    """The micro-batches of a stage from a sample on."""
    config = present.stage.config
    return reader.batches(
        open_source(config, present.manifest),
        seed=config.seed,
        start=samples,
        batch_size=config.data.micro_batch_size,
        layout=present.settings.batch,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        caption_weights=config.data.caption_weights,
        process=jax.process_index(),
        processes=jax.process_count(),
    )


def _reporter(run: Run, present: Prepared, position: Position) -> reporting.Reporter:
    """What follows a stage from a position on."""
    step = int(position.state.step)
    config, settings = present.stage.config, present.settings
    return reporting.Reporter(
        writer=run.writer,
        monitor=Monitor(config.optim.lr, config.optim.warmup_steps, _untrained(settings)),
        watchdog=Watchdog(config.health.max_skipped, dit.count_parameters(settings.model), config.optim.lr),
        schedule=learning_rate(settings.optimizer, config.optim.lr),
        metric_shapes=present.program.metric_shapes,
        batch_size=config.data.micro_batch_size,
        flops_per_token=training_flops(settings) / settings.tokens,
        peak_flops=1e12 * (devices.peak_tflops(config.log.peak_tflops) or 0) * present.mesh.size,
        step=step,
        length=overview.length(run.stages, present, step, position.samples),
        every=config.log.every,
        unfinished=position.unfinished,
        comparable=_comparable(present),
        constants=_constants(run, present),
    )


def _comparable(present: Prepared) -> str:
    """What losses must have in common to be compared: all that shifts them and is not learned."""
    settings, manifest = present.settings, present.manifest
    return repr((present.stage.first, settings.flow, settings.routing, manifest.latent_mean, manifest.records("train")))


def _untrained(settings: Settings) -> frozenset[str]:
    """What may get no gradient for long: nulls of conditions that are rarely or never dropped, and the projector once
    alignment has ended."""
    nulls = set()
    for condition in settings.model.conditions:
        dropped = sum(share for subset, share in settings.flow.drop if condition.name in subset)
        if (1 - dropped) ** (DEAD_STEPS * settings.global_batch_size) > 1e-6:  # chance that none is in all that time
            nulls.add(f"null_{condition.name}")
    ends = settings.alignment is None or settings.alignment.until is not None
    return frozenset(nulls | ({dit.PROJECTOR} if ends else set()))


def _constants(run: Run, present: Prepared) -> dict[str, float]:
    """What is logged of a stage with every measured scalar, so that curves show the switch."""
    if not present.stage.name:
        return {}
    return {"stage": run.stages.index(present) + 1, "resolution": present.manifest.resolution}
