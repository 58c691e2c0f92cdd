"""The loop over the steps of a stage: accumulate, update, and what is measured, drawn and saved meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from fluxdit_jax import overview
from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.device import devices, sharding
from fluxdit_jax.loader import reader
from fluxdit_jax.model import dit
from fluxdit_jax.optimizer import learning_rate
from fluxdit_jax.plan import training_flops
from fluxdit_jax.prepared import Prepared, open_source
from fluxdit_jax.run import reporting
from fluxdit_jax.run.checkpoint import Checkpoints
from fluxdit_jax.run.health import DIVERGED, Monitor
from fluxdit_jax.run.metrics import ACCUMULATE, PLAIN, UPDATE, MetricsWriter
from fluxdit_jax.run.profile import Trace
from fluxdit_jax.run.signals import Signals, any_process
from fluxdit_jax.run.soundness import BrokenRun, Watchdog
from fluxdit_jax.run.timer import IntervalTimer
from fluxdit_jax.run.validation_loss import ValidationLoss
from fluxdit_jax.sampling.preview import Preview, make_preview
from fluxdit_jax.settings import Settings
from fluxdit_jax.shared import cli, image_grid
from fluxdit_jax.state import TrainState, without_part

log = logging.getLogger("fluxdit_jax")
_Made = TypeVar("_Made")


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


def run_stage(run: Run, present: Prepared, position: Position) -> Ended:
    """Trains from a position before the end of a stage to it, or until a signal or a diagnosis stops the run."""
    config, settings, stage = present.stage.config, present.settings, present.stage
    with contextlib.ExitStack() as closing:
        # ------------------------------------------------------------ data, and what is written and shown
        programs = present.compiled
        state, samples = position.state, position.samples
        step = first = int(state.step)
        count = (stage.last - first) * settings.optimizer.grad_accum_steps
        batches = itertools.islice(_batches(present, samples), count)  # none beyond the end is read
        batch = sharding.put_batch(present.mesh, next(batches))
        looks = _looks(run, present)
        reporter = closing.enter_context(_reporter(run, present, step, position.unfinished))

        # ------------------------------------------------------------ the loop
        # The metrics of a program are read after the next one is dispatched, so that the device never waits for
        # the host. The host waits for the device only when it needs the state.
        stopping = False
        for step in range(first + 1, stage.last + 1):
            run.trace.at(step - 1)
            alignment = settings.alignment
            aligned = alignment is None or alignment.at(step)
            accumulate = programs.accumulate if aligned else programs.plain
            begun = samples
            for _ in range(settings.optimizer.grad_accum_steps):
                state, values = accumulate(state, batch)
                samples += config.data.micro_batch_size
                asked = time.monotonic()
                try:
                    following = next(batches, None)
                except DatasetError as error:
                    raise _saved(run, reporter, state, begun, error) from error
                if following is not None:
                    batch = sharding.put_batch(present.mesh, following)
                if values.is_ready():  # the device was done before the data came
                    reporter.waited(time.monotonic() - asked)
                reporter.take(ACCUMULATE if aligned else PLAIN, values)
            state, values = programs.update(state)
            reporter.take(UPDATE, values)

            last = step == stage.last
            troubled = reporter.trouble is not None and config.health.action == "stop"
            asked_to_stop = run.signals.received is not None or troubled
            stopping, save_due, show_due = any_process(
                [asked_to_stop, last or run.save_timer.due(), last or run.show_timer.due()]
            )
            show_due = show_due and (last or not stopping)
            ema_due = last or step % config.checkpoint.ema_every == 0
            looks_due = [look for look in looks if look.due(step, last, show_due, stopping)]
            if not (stopping or save_due or ema_due or looks_due):
                run.checkpoints.poll()
                continue
            reporter.read()  # waits for the device
            if step == run.last:
                reporter.end()
            diverged = troubled and reporter.trouble is not None and reporter.trouble.kind == DIVERGED
            suspect = (reporter.suspect or diverged) and step < run.last
            asked = time.monotonic()
            state_meta = {"samples": samples, "unfinished": reporter.unfinished()}
            if suspect and (stopping or save_due):
                why = "it has diverged" if diverged else "no finite gradient in the last micro-batches"
                log.warning("the state of step %d is not saved: %s", step, why)
            elif stopping:  # first, so that pictures do not delay the end
                run.checkpoints.save(step, state, state_meta)
            for look in looks_due:
                if not look.late:
                    with reporter.progress.doing(look.doing):
                        look.show(state, step, last)
            if show_due:
                run.show_timer.done()
            if ema_due and not suspect:
                run.checkpoints.save_averages(step, state)
            if save_due and not stopping and not suspect:
                with reporter.progress.doing("saving"):
                    run.checkpoints.save(step, state, state_meta)
                run.save_timer.done()
            for look in looks_due:
                if look.late:
                    with reporter.progress.doing(look.doing):
                        look.show(state, step, last)
            reporter.pause(time.monotonic() - asked)
            if stopping:
                break
            # Either may have come meanwhile; the next stage has a monitor of its own.
            troubled = last and reporter.trouble is not None and config.health.action == "stop"
            if step < run.last and any_process([run.signals.received is not None or troubled])[0]:
                if not (save_due or suspect):
                    run.checkpoints.save(step, state, state_meta)
                stopping = True
                break
        trouble = reporter.trouble.kind if reporter.trouble is not None and config.health.action == "stop" else None
        return Ended(Position(state, samples), stopping, trouble)


def _saved(
    run: Run, reporter: reporting.Reporter, state: TrainState, samples: int, error: DatasetError
) -> DatasetError:
    """Saves the last whole step before an error of the data ends the run; returns the error with what is saved.

    Of several processes the others are within a step, and nothing is saved.
    """
    state = without_part(state)
    step = int(state.step)
    if jax.process_count() > 1 or not step:
        return error
    with contextlib.suppress(BrokenRun):
        reporter.read()
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


def _reporter(run: Run, present: Prepared, step: int, unfinished: dict[str, Any] | None) -> reporting.Reporter:
    """What follows a stage from a step on."""
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
        length=overview.length(run.stages, present),
        every=config.log.every,
        unfinished=unfinished,
        constants=_constants(run, present),
    )


def _untrained(settings: Settings) -> frozenset[str]:
    """What may get no gradient: nulls of conditions that are never dropped, and the projector once alignment ended."""
    dropped = {name for subset, share in settings.flow.drop for name in subset if share}
    nulls = {f"null_{each.name}" for each in settings.model.conditions if each.name not in dropped}
    ends = settings.alignment is None or settings.alignment.until is not None
    return frozenset(nulls | ({dit.PROJECTOR} if ends else set()))


def _constants(run: Run, present: Prepared) -> dict[str, float]:
    """What is logged of a stage with every measured scalar, so that curves show the switch."""
    if not present.stage.name:
        return {}
    return {"stage": run.stages.index(present) + 1, "resolution": present.manifest.resolution}


@dataclasses.dataclass(frozen=True)
class Look:
    """What is looked at while a run trains.

    Attributes:
      doing: it, in words.
      every: steps.
      show: given the state, the step, and whether it is the last of the stage.
      late: it takes long: after all is saved, not when a run stops, and not by `log.minutes`.
    """

    doing: str
    every: int
    show: Callable[[TrainState, int, bool], None]
    late: bool = False

    def due(self, step: int, last: bool, show_due: bool, stopping: bool) -> bool:
        if self.late:
            return (last or step % self.every == 0) and not stopping
        return last or step % self.every == 0 or show_due


def _looks(run: Run, present: Prepared) -> list[Look]:
    """Held-out loss first, then pictures, then the score, as far as they are asked for and can be had."""
    config = present.stage.config
    looks = []
    if (heldout := _make_heldout(present)) is not None:
        looks.append(_heldout_look(run, present, heldout))
    preview, there = _on_first("log.preview_every", lambda: _make_preview(present))
    if there:

        def draw(state: TrainState, step: int, last: bool) -> None:
            _write_preview(preview, state.ema, step, run.workdir, run.writer)

        looks.append(Look("drawing pictures", config.log.preview_every, draw))
    if config.score.every and (scoring := _scoring(run, present)) is not None:
        looks.append(scoring)
    return looks


def _on_first(key: str, make: Callable[[], _Made | None]) -> tuple[_Made | None, bool]:
    """(what process 0 has made, None on the others; whether there is one), so that all or none gather for it.

    Raises:
      ConfigError: process 0 cannot make it; there it is its own error.
    """
    made, failure = None, None
    if jax.process_index() == 0:
        try:
            made = make()
        except Exception as error:  # noqa: BLE001  raised again below, once all processes know
            failure = error
    there, failed = any_process([made is not None, failure is not None])
    if failed:
        raise failure or ConfigError(f"config.{key}: process 0 cannot do it, and says why")
    return made, there


def _scoring(run: Run, present: Prepared) -> Look | None:
    from fluxdit_jax.quality.scorer import Scorer  # late: few runs are scored while they train

    config, settings = present.stage.config, present.settings
    scorer, there = _on_first("score.every", lambda: Scorer.make(config, present.manifest, settings, run.workdir))
    if not there:
        return None

    def score(state: TrainState, step: int, last: bool) -> None:
        ema = sharding.gather(state.ema)
        if scorer is not None:
            pictures = (step - present.stage.first) * settings.global_batch_size
            values = scorer.visit(ema, step, pictures / present.manifest.records("train"))
            if values:
                run.writer.scalars(step, values)

    return Look("scoring", config.score.every, score, late=True)


def _heldout_look(run: Run, present: Prepared, heldout: ValidationLoss) -> Look:
    def measure(state: TrainState, step: int, last: bool) -> None:
        _measure_heldout(heldout, state, step, run.writer, present.stage.name)
        # At a switch of all stages, so that what a switch changes is seen.
        for other in (each for each in run.stages if last and each is not present):
            if (of_other := _make_heldout(other)) is not None:
                loss, name = of_other(state.ema)["heldout_loss"], other.stage.name
                log.info("step %d: held-out loss %.4f at the resolution of %s", step, loss, name)
                run.writer.scalars(step, {f"heldout_loss/{name}": loss})

    return Look("measuring the held-out loss", present.stage.config.log.heldout_every, measure)


def _make_heldout(each: Prepared) -> ValidationLoss | None:
    """The held-out loss of a stage, at its own resolution and times; None without a holdout split."""
    config = each.stage.config
    if not config.log.heldout_every or not each.manifest.records("holdout"):
        return None
    return ValidationLoss(
        each.settings.model,
        each.settings.flow,
        open_source(config, each.manifest, "holdout"),
        mesh=each.mesh,
        statistics=each.statistics,
        layout=each.settings.batch,
        batch_size=each.settings.micro_batch_size,
        pictures=config.log.heldout_count,
    )


def _measure_heldout(measure: ValidationLoss, state: TrainState, step: int, writer: MetricsWriter, stage: str) -> None:
    """Measures and reports; in a run with stages under the stage's name, too, so that one name is one curve."""
    values = measure(state.ema)
    log.info("step %d: held-out loss %.4f (EMA, %d pictures)", step, values["heldout_loss"], measure.pictures)
    writer.scalars(step, values | ({f"heldout_loss/{stage}": values["heldout_loss"]} if stage else {}))
    if state.short_ema is not None:
        values = measure(state.short_ema)
        writer.scalars(step, {f"short_ema/{name}": value for name, value in values.items()})


def _make_preview(present: Prepared) -> Preview | None:
    log_ = present.stage.config.log
    return make_preview(
        present.stage.config.data.path,
        present.manifest,
        present.settings,
        count=log_.preview_count if log_.preview_every else 0,
        steps=log_.preview_steps,
        guidance=log_.preview_guidance,
        vae=log_.vae,
        on_corrupt=present.stage.config.data.on_corrupt,
    )


def _write_preview(preview: Preview | None, ema: Any, step: int, workdir: Path, writer: MetricsWriter) -> None:
    ema = sharding.gather(ema)
    if preview is None:
        return
    path = workdir / "samples" / f"step_{step:07d}.png"
    try:
        sheet = preview.draw(ema)
        path.parent.mkdir(exist_ok=True)
        image_grid.save(sheet, path)
    except Exception as error:  # noqa: BLE001  disk, device memory: the run is worth more
        log.error("no picture of this step, the run goes on: %s: %s", type(error).__name__, cli.explain(error))
        return
    log.info("step %d: pictures by the EMA in %s", step, path)
    writer.image(step, "samples", np.asarray(sheet))
