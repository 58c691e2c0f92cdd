"""What is looked at while a run trains: the held-out loss, pictures and the score, all by the EMA."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from fluxdit_jax.config import ConfigError
from fluxdit_jax.device import sharding
from fluxdit_jax.prepared import Prepared, open_source
from fluxdit_jax.run.metrics import MetricsWriter
from fluxdit_jax.run.signals import any_process
from fluxdit_jax.run.validation_loss import ValidationLoss
from fluxdit_jax.sampling.preview import Preview, make_preview
from fluxdit_jax.shared import cli, image_grid
from fluxdit_jax.state import TrainState

log = logging.getLogger("fluxdit_jax")
_Made = TypeVar("_Made")


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


def looks_of(stages: list[Prepared], present: Prepared, workdir: Path, writer: MetricsWriter) -> list[Look]:
    """Those of a stage: held-out loss, then pictures, then the score, as far as they are asked for and can be had.

    Args:
      stages: all of the run.
      workdir: pictures and scores are written into it.
    """
    config = present.stage.config
    looks = []
    if (heldout := _make_heldout(present)) is not None:
        looks.append(_heldout_look(stages, present, heldout, writer))
    preview, there = _on_first("log.preview_every", lambda: _make_preview(present))
    if there:

        def draw(state: TrainState, step: int, last: bool) -> None:
            _write_preview(preview, state.ema, step, workdir, writer)

        looks.append(Look("drawing pictures", config.log.preview_every, draw))
    if config.score.every and (scoring := _scoring(present, workdir, writer)) is not None:
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


def _scoring(present: Prepared, workdir: Path, writer: MetricsWriter) -> Look | None:
    from fluxdit_jax.quality.scorer import Scorer  # late: few runs are scored while they train

    config, settings = present.stage.config, present.settings
    scorer, there = _on_first("score.every", lambda: Scorer.make(config, present.manifest, settings, workdir))
    if not there:
        return None

    def score(state: TrainState, step: int, last: bool) -> None:
        ema = sharding.gather(state.ema)
        if scorer is not None:
            pictures = (step - present.stage.first) * settings.global_batch_size
            values = scorer.visit(ema, step, pictures / present.manifest.records("train"))
            if values:
                writer.scalars(step, values)

    return Look("scoring", config.score.every, score, late=True)


def _heldout_look(stages: list[Prepared], present: Prepared, heldout: ValidationLoss, writer: MetricsWriter) -> Look:
    def measure(state: TrainState, step: int, last: bool) -> None:
        _measure_heldout(heldout, state, step, writer, present.stage.name)
        # At a switch of all stages, so that what a switch changes is seen.
        for other in (each for each in stages if last and each is not present):
            if (of_other := _make_heldout(other)) is not None:
                loss, name = of_other(state.ema)["heldout_loss"], other.stage.name
                log.info("step %d: held-out loss %.4f at the resolution of %s", step, loss, name)
                writer.scalars(step, {f"heldout_loss/{name}": loss})

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
