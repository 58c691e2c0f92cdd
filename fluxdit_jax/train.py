"""Trains a diffusion transformer: `python -m fluxdit_jax.train --config=configs/demo.py --config.workdir=RUN`.

Read `train` from top to bottom: it is the run.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from fluxdit_jax import config as configuration
from fluxdit_jax import train_arguments
from fluxdit_jax.config import Settings
from fluxdit_jax.dataset.manifest import DatasetError, Manifest, load_manifest
from fluxdit_jax.device import devices, sharding
from fluxdit_jax.device.memory_plan import OutOfMemory, require_fit
from fluxdit_jax.device.sharding import MeshError
from fluxdit_jax.gate.requirement import GateError, report_pictures, require_report
from fluxdit_jax.loader import reader
from fluxdit_jax.model import dit
from fluxdit_jax.optimizer import learning_rate
from fluxdit_jax.program import Program
from fluxdit_jax.run import continuation, overview, reporting
from fluxdit_jax.run.checkpoint import CheckpointError, Checkpoints, leaves_threads, require_same_shapes
from fluxdit_jax.run.health import Monitor
from fluxdit_jax.run.metrics import LogError, MetricsWriter
from fluxdit_jax.run.profile import Trace
from fluxdit_jax.run.run_directory import RunError, RunLock, check_resume, difference_from, flatten
from fluxdit_jax.run.signals import Signals, any_process
from fluxdit_jax.run.soundness import BrokenRun, Watchdog
from fluxdit_jax.run.timer import IntervalTimer
from fluxdit_jax.run.validation_loss import ValidationLoss
from fluxdit_jax.run.weights import places, restore_weights
from fluxdit_jax.sampling.preview import Preview, make_preview
from fluxdit_jax.shared import cli, image_grid
from fluxdit_jax.shared.host_memory import keep_freed_memory
from fluxdit_jax.state import TrainState
from fluxdit_jax.train_step import patch_statistics
from fluxdit_jax.vae.files import DecoderError

log = logging.getLogger("fluxdit_jax")
USER_ERRORS = (
    configuration.ConfigError,
    DatasetError,
    RunError,
    MeshError,
    CheckpointError,
    DecoderError,
    GateError,
    LogError,
    OutOfMemory,
    OSError,
)


def train(config: ConfigDict) -> int:
    """Starts or resumes the run that `config` describes; returns the process's exit code."""
    with contextlib.ExitStack() as closing:
        # ------------------------------------------------------------ configuration, data set, run directory
        configuration.check(config)
        manifest = load_manifest(config.data.path)
        settings = configuration.resolve(config, manifest)
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.data.micro_batch_size)
        source = reader.RecordSource(config.data.path, manifest, "train", config.data.on_corrupt)
        statistics = patch_statistics(manifest.latent_mean, manifest.latent_std, settings.model.patch)
        report = require_report(config.gate.report, settings.model, manifest) if config.gate.required else None
        if config.resume.from_run is not None and not places(Path(config.resume.from_run)):
            raise RunError(f"config.resume.from_run is {config.resume.from_run!r}: no weights of a run there")
        workdir = Path(config.workdir)
        primary = jax.process_index() == 0
        if primary:
            closing.callback(RunLock(workdir).release)
            closing.callback(reporting.log_to(workdir / "train.log"))
            check_resume(workdir, config, manifest)
            continuation.require_checkpoints(workdir)
            if report is not None:
                report_pictures(report, manifest)

        # ------------------------------------------------------------ the compiled step, if it fits the device
        program = Program(settings, mesh, statistics)
        overview.describe(config, settings, manifest, mesh)
        log.info("compiling the step (a minute or two on a GPU, unless it is in the compilation cache)")
        accumulate, update = compiled = program.compile()
        plan = program.memory(compiled)
        log.info("memory of a device: %.2f GB (%s)", plan.total / 1e9, plan)
        require_fit(plan, config.device_memory_gb, devices.memory_limit_gb(), program.smaller())

        # ------------------------------------------------------------ the state: resumed, continued or new
        checkpoints = closing.enter_context(Checkpoints(workdir, config.checkpoint.keep))
        state, meta = _first_state(config, manifest, program, checkpoints)
        samples = meta["samples"]  # drawn so far
        step = first = int(state.step)
        continuation.begin(workdir, config, manifest, checkpoints, state)
        signals = closing.enter_context(Signals())  # before the log says that the run has begun
        log.info("step %d of %d", step, config.train.steps)

        # ------------------------------------------------------------ data, and what is written and shown
        batches = reader.batches(
            source,
            seed=config.seed,
            start=samples,
            batch_size=config.data.micro_batch_size,
            layout=settings.batch,
            threads=config.data.threads,
            prefetch=config.data.prefetch,
            caption_weights=config.data.caption_weights,
            process=jax.process_index(),
            processes=jax.process_count(),
        )
        batch = sharding.put_batch(mesh, next(batches))
        heldout = _make_heldout(config, settings, manifest, mesh, statistics)
        preview = make_preview(config.data.path, manifest, settings, **_preview_options(config))
        writer = MetricsWriter(workdir, step, enabled=primary)
        log.info("curves: tensorboard --logdir %s, best on its Custom Scalars page", workdir / "tensorboard")
        if step == 0:
            writer.hyperparameters(flatten(config.to_dict()))
        reporter = closing.enter_context(
            reporting.Reporter(
                writer=writer,
                monitor=Monitor(config.optim.lr, config.optim.warmup_steps, _untrained_nulls(settings)),
                watchdog=Watchdog(config.health.max_skipped, dit.count_parameters(settings.model), config.optim.lr),
                schedule=learning_rate(settings.optimizer, config.optim.lr),
                metric_shapes=program.metric_shapes,
                batch_size=config.data.micro_batch_size,
                flops_per_token=overview.training_flops(settings) / settings.tokens,
                peak_flops=1e12 * (devices.peak_tflops(config.log.peak_tflops) or 0) * mesh.size,
                step=step,
                length=overview.length(config, manifest),
                every=config.log.every,
                unfinished=meta.get("unfinished"),
            )
        )
        trace = Trace(workdir / "profile", configuration.profile_steps(config.profile) if config.profile else range(0))
        closing.callback(trace.stop)

        # ------------------------------------------------------------ the loop
        # The metrics of a program are read after the next one is dispatched, so that the device never waits for
        # the host. The host waits for the device only when it needs the state.
        save_timer, show_timer = IntervalTimer(config.checkpoint.minutes), IntervalTimer(config.log.minutes)
        for step in range(first + 1, config.train.steps + 1):
            trace.at(step - 1)
            for _ in range(settings.optimizer.grad_accum_steps):
                state, values = accumulate(state, batch)
                samples += config.data.micro_batch_size
                asked = time.monotonic()
                batch = sharding.put_batch(mesh, next(batches))
                if values.is_ready():  # the device was done before the data came
                    reporter.waited(time.monotonic() - asked)
                reporter.take("accumulate", values)
            state, values = update(state)
            reporter.take("update", values)

            last = step == config.train.steps
            troubled = reporter.trouble is not None and config.health.action == "stop"
            asked_to_stop = signals.received is not None or troubled
            stopping, save_due, show_due = any_process(
                [asked_to_stop, last or save_timer.due(), last or show_timer.due()]
            )
            show_due = show_due and (last or not stopping)
            ema_due = last or step % config.checkpoint.ema_every == 0
            preview_due = preview is not None and (show_due or step % config.log.preview_every == 0)
            heldout_due = heldout is not None and (show_due or step % config.log.heldout_every == 0)
            if not (stopping or save_due or ema_due or preview_due or heldout_due):
                checkpoints.poll()
                continue
            reporter.read()  # waits for the device
            if last:
                reporter.end()
            suspect = reporter.suspect and not last
            asked = time.monotonic()
            state_meta = {"samples": samples, "unfinished": reporter.unfinished()}
            if suspect and (stopping or save_due):
                log.warning("no finite gradient in the last micro-batches: the state of step %d is not saved", step)
            elif stopping:  # first, so that pictures do not delay the end
                checkpoints.save(step, state, state_meta)
            if heldout is not None and heldout_due:
                with reporter.progress.doing("measuring the held-out loss"):
                    _measure_heldout(heldout, state, step, writer)
            if preview is not None and preview_due:
                with reporter.progress.doing("drawing pictures"):
                    _write_preview(preview, state.ema, step, workdir, writer)
            if show_due:
                show_timer.done()
            if ema_due and not suspect:
                checkpoints.save_averages(step, state)
            if save_due and not stopping and not suspect:
                with reporter.progress.doing("saving"):
                    checkpoints.save(step, state, state_meta)
                save_timer.done()
            reporter.pause(time.monotonic() - asked)
            if stopping:
                break
            if not last and any_process([signals.received is not None])[0]:  # it arrived meanwhile
                if not (save_due or suspect):
                    checkpoints.save(step, state, state_meta)
                break

        # ------------------------------------------------------------ the end
        checkpoints.poll(wait=True)
        reporter.close()
        if step >= config.train.steps:
            log.info("done: %d steps. EMA weights: %s; pictures: %s", step, workdir / "ema", workdir / "samples")
            log.info("next: python -m fluxdit_jax.sample --workdir=%s --prompt TEXT --out FILE.png", workdir)
            return 0 if checkpoints.failures == 0 else 1
        trouble = reporter.trouble.kind if reporter.trouble is not None and config.health.action == "stop" else None
        return _stopped(step, checkpoints, signals.received, trouble)


def _stopped(step: int, checkpoints: Checkpoints, received: int | None, trouble: str | None) -> int:
    """Logs why the run ends before its last step, and from where it can be resumed; returns the exit code."""
    why, code = "another process was told to stop", 128 + signal.SIGTERM
    if received is not None:
        why, code = f"signal {received}", 128 + received
    elif trouble is not None:
        why, code = f"health: {trouble}", 3
    saved = checkpoints.latest_step() or 0
    if saved == step:
        log.info("stopped at step %d (%s), state saved. The same command goes on from there.", step, why)
    else:
        words = "stopped at step %d (%s); its state is not saved. The same command goes on from step %d."
        log.error(words, step, why, saved)
    return code


def _first_state(
    config: ConfigDict, manifest: Manifest, program: Program, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
    """(state, meta with the samples drawn so far): from this run's checkpoint, from another run, or new."""
    restored = checkpoints.restore(program.abstract)
    if restored is not None:
        return _whole_steps(*restored)
    if config.resume.from_run is None:
        return program.create(), {"samples": 0}
    if config.resume.take == "state":
        with Checkpoints(Path(config.resume.from_run), config.checkpoint.keep, read_only=True) as other:
            restored = other.restore(program.abstract)
        if restored is None:
            raise RunError(f"config.resume.from_run: {config.resume.from_run} has no checkpoint")
        log.info("continuing with the full state of %s", config.resume.from_run)
        state, meta = _whole_steps(*restored)
        return state, {"samples": meta["samples"]}
    weights = restore_weights(Path(config.resume.from_run))
    require_same_shapes(str(weights.path), weights.ema, program.abstract.params)
    difference = difference_from(Path(config.resume.from_run), manifest)
    log.info("starting from the EMA of %s at step %d; data: %s", config.resume.from_run, weights.step, difference)
    return program.from_ema(weights.ema), {"samples": 0}


def _whole_steps(state: TrainState, meta: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
    """Drops a partly accumulated gradient, which only checkpoints of earlier versions hold.

    Their meta has `batch_size`; `samples` is set back by it, so that those micro-batches are drawn again.
    """
    done = int(state.opt_state.mini_step)
    if not done:
        return state, meta
    log.info("the checkpoint was saved in the middle of a step: %d micro-batch(es) are drawn again", done)
    zeros = jax.tree.map(jnp.zeros_like, (state.opt_state.mini_step, state.opt_state.acc_grads))
    opt_state = state.opt_state._replace(mini_step=zeros[0], acc_grads=zeros[1])
    return state._replace(opt_state=opt_state), meta | {"samples": meta["samples"] - done * meta["batch_size"]}


def _untrained_nulls(settings: Settings) -> frozenset[str]:
    """Nulls of conditions that are never dropped: they get no gradient."""
    dropped = {name for subset, share in settings.flow.drop for name in subset if share}
    return frozenset(f"null_{each.name}" for each in settings.model.conditions if each.name not in dropped)


def _make_heldout(
    config: ConfigDict, settings: Settings, manifest: Manifest, mesh: Any, statistics: Any
) -> ValidationLoss | None:
    if not config.log.heldout_every or not manifest.records("holdout"):
        return None
    return ValidationLoss(
        settings.model,
        settings.flow,
        reader.RecordSource(config.data.path, manifest, "holdout", config.data.on_corrupt),
        mesh=mesh,
        statistics=statistics,
        layout=settings.batch,
        batch_size=settings.micro_batch_size,
        pictures=config.log.heldout_count,
    )


def _preview_options(config: ConfigDict) -> dict[str, Any]:
    return {
        "count": config.log.preview_count if config.log.preview_every else 0,
        "steps": config.log.preview_steps,
        "guidance": config.log.preview_guidance,
        "vae": config.log.vae,
        "on_corrupt": config.data.on_corrupt,
    }


def _measure_heldout(heldout: ValidationLoss, state: TrainState, step: int, writer: MetricsWriter) -> None:
    values = heldout(state.ema)
    log.info("step %d: held-out loss %.4f (EMA, %d pictures)", step, values["heldout_loss"], heldout.pictures)
    writer.scalars(step, values)
    if state.short_ema is not None:
        values = heldout(state.short_ema)
        writer.scalars(step, {f"short_ema/{name}": value for name, value in values.items()})


def _write_preview(preview: Preview, ema: Any, step: int, workdir: Path, writer: MetricsWriter) -> None:
    ema = sharding.gather(ema)
    if jax.process_index():
        return
    sheet = preview.draw(ema)
    path = workdir / "samples" / f"step_{step:07d}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        image_grid.save(sheet, path)
    except OSError as error:
        log.error("no picture of this step, the run goes on: %s", cli.explain(error))
    else:
        log.info("step %d: pictures by the EMA in %s", step, path)
    writer.image(step, "samples", np.asarray(sheet))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; overrides are written --config.group.key=value")
    if _CONFIG.value is None:
        sys.exit("error: give a configuration, as --config=configs/demo.py")
    cli.outlive_readers()
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax narrates every save at INFO
    absl_logging.get_absl_logger().addFilter(cli.without_traceback)  # and a failed one with pages
    threading.excepthook = cli.thread_error
    cli.without_pages()
    config = _CONFIG.value
    devices.use_compilation_cache()
    devices.use_most_memory()
    devices.join_processes(config.mesh.coordinator, config.mesh.num_processes, config.mesh.process_id)
    keep_freed_memory(large_too=jax.default_backend() == "cpu")
    try:
        code = train(config)
    except USER_ERRORS as error:
        print(f"error: {cli.explain(error)}", file=sys.stderr)
        code = 1
    except BrokenRun:  # already logged by the reporter
        code = 1
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from the last checkpoint, if any", file=sys.stderr)
        code = 130
    if leaves_threads() and jax.process_count() == 1:
        cli.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
    app.run(main, flags_parser=train_arguments.parse)
