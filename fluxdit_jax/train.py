"""Trains a diffusion transformer: `python -m fluxdit_jax.train --config=configs/demo.py --config.workdir=RUN`.

Read `train` from top to bottom: it is the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from fluxdit_jax import config as configuration
from fluxdit_jax import overview, train_arguments
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.device import devices
from fluxdit_jax.device.hosts import Hosts, require_reachable
from fluxdit_jax.device.memory_plan import OutOfMemory
from fluxdit_jax.device.sharding import MeshError
from fluxdit_jax.gate.requirement import GateError, report_pictures, require_report
from fluxdit_jax.loop import Position, Run, run_stage
from fluxdit_jax.model import dit
from fluxdit_jax.plan import in_words
from fluxdit_jax.prepared import Prepared, of_one_image_set
from fluxdit_jax.program import Program
from fluxdit_jax.run import continuation, reporting
from fluxdit_jax.run.after_save import AfterSave
from fluxdit_jax.run.checkpoint import (
    CHECKPOINTS,
    CheckpointError,
    Checkpoints,
    checkpoint_steps,
    leaves_threads,
    require_same_shapes,
)
from fluxdit_jax.run.differences import check_resume, difference_from, flatten
from fluxdit_jax.run.health import DIVERGED
from fluxdit_jax.run.metrics import LogError, MetricsWriter
from fluxdit_jax.run.profile import Trace
from fluxdit_jax.run.run_directory import RunError, RunLock, require_own
from fluxdit_jax.run.signals import Signals
from fluxdit_jax.run.soundness import BrokenRun
from fluxdit_jax.run.timer import IntervalTimer
from fluxdit_jax.run.tracker import Tracker
from fluxdit_jax.run.weights import Weights, places, restore_weights
from fluxdit_jax.shared import cli
from fluxdit_jax.shared.host_memory import keep_freed_memory
from fluxdit_jax.stages import stages_of
from fluxdit_jax.state import TrainState, shape_difference, without_part
from fluxdit_jax.vae.decoder import require_decoder
from fluxdit_jax.vae.files import DecoderError

log = logging.getLogger("fluxdit_jax")
LOG = "train.log"
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
        # ------------------------------------------------------------ configuration, datasets, run directory
        configuration.check(config)
        stages = _prepared(config)
        first, manifests = stages[0], {each.stage.name: each.manifest for each in stages if each.stage.name}
        report = None
        if config.gate.required:
            report = require_report(config.gate.report, first.settings.model, first.manifest)
        workdir, after, tracker = Path(config.workdir), None, None
        done = max(checkpoint_steps(workdir), default=0)
        begin_with = None
        if config.resume.from_run is not None and not done:
            begin_with = _source(config.resume, first.program)
        if jax.process_index() == 0:
            after = AfterSave(config.checkpoint.after, workdir, config.checkpoint.after_minutes)
            tracker = Tracker(config.log.tracker) if config.log.tracker else None
            if config.log.vae:
                require_decoder(first.manifest.vae, config.log.vae)
            require_own(workdir)
            closing.callback(RunLock(workdir).release)
            closing.callback(reporting.log_to(workdir / LOG))
            closing.push(functools.partial(reporting.note_end, workdir / LOG))
            check_resume(workdir, config, first.manifest, manifests)
            continuation.require_checkpoints(workdir)
            if report is not None:
                report_pictures(report, first.manifest)

        # ------------------------------------------------------------ the compiled steps, if they fit the device
        overview.describe(stages)
        for each in stages:
            if each.stage.last > done:
                overview.describe_memory(each)

        # ------------------------------------------------------------ the state: resumed, continued or new
        saved = closing.enter_context(after).saved if after else None
        checkpoints = closing.enter_context(Checkpoints(workdir, config.checkpoint.keep, saved=saved))
        position = _first_position(config, first, checkpoints, begin_with)
        del begin_with  # as large as the network
        step = int(position.state.step)
        ends = [each.stage.last for each in stages]
        continuation.begin(workdir, config, first.manifest, checkpoints, position.state, ends, manifests)
        signals = closing.enter_context(Signals())  # before the log says that the run has begun
        log.info("step %d of %d%s", step, ends[-1], "" if step < ends[-1] else ": nothing is left to train")
        if done and config.resume.from_run is not None:
            log.info("config.resume.from_run has no effect: the run has checkpoints of its own")
        if after is not None and (newest := checkpoints.latest_step()):
            after.go_on(workdir / CHECKPOINTS / str(newest))
        log.info("curves: tensorboard --logdir %s, best on its Custom Scalars page", workdir / "tensorboard")

        # ------------------------------------------------------------ the stages
        trace = Trace(workdir / "profile", configuration.profile_steps(config.profile) if config.profile else range(0))
        closing.callback(trace.stop)
        save_timer, show_timer = IntervalTimer(config.checkpoint.minutes), IntervalTimer(config.log.minutes)
        if tracker is not None:
            tracker.begin(workdir, flatten(config.to_dict()), step)
        writer = MetricsWriter(workdir, step, enabled=jax.process_index() == 0, tracker=tracker)
        closing.callback(writer.close)
        if step == 0:
            writer.hyperparameters(flatten(config.to_dict()))
        run = Run(workdir, stages, checkpoints, writer, signals, trace, save_timer, show_timer)
        trouble = None
        for each in stages:
            if step >= each.stage.last:
                continue
            overview.announce(stages, each, step)
            ended = run_stage(run, each, position)
            position, step, trouble = ended.position, int(ended.position.state.step), ended.trouble
            if ended.stopped:
                break

        # ------------------------------------------------------------ the end
        checkpoints.poll(wait=True)
        copied = after is None or after.finish()
        if not copied:
            log.error("config.checkpoint.after has not succeeded for the last checkpoint: the same command tries again")
        if step >= run.last and (kept := checkpoints.latest_step() or 0) < step:
            log.error("step %d is the last, but its state is not saved. The same command goes on from %d", step, kept)
            return 1
        if step >= run.last:
            pictures = f"; pictures: {workdir / 'samples'}" if (workdir / "samples").exists() else ""
            log.info("done: %d steps. EMA weights: %s%s", step, workdir / "ema", pictures)
            log.info("next: python -m fluxdit_jax.sample --workdir=%s --prompt TEXT --out FILE.png", workdir)
            return 0 if copied and checkpoints.failures == 0 else 1
        return _stopped(step, checkpoints, signals.received, trouble)


def _prepared(config: ConfigDict) -> list[Prepared]:
    """The stages; raises `DatasetError` if they are not of the same images."""
    stages = [Prepared.of(stage) for stage in stages_of(config)]
    if difference := of_one_image_set(stages):
        raise DatasetError(f"config.train.stages: the stages must have the same images: {difference}")
    return stages


def show_plan(config: ConfigDict) -> int:
    """Prints what the run that `config` describes would take, and whether its steps fit this device; runs nothing."""
    config.workdir = config.workdir or "."
    configuration.check(config)
    stages = _prepared(config)
    lines, warnings = in_words(stages)
    print("\n".join([*lines, *(f"warning: {line}" for line in warnings)]))
    status = 0
    for each in stages:
        name = f"stage {each.stage.name}: " if each.stage.name else ""
        try:
            print(f"{name}{each.planned_memory().total / 1e9:.2f} GB of memory on {jax.devices()[0].device_kind}")
        except OutOfMemory as error:
            print(f"{name}{error}")
            status = 1
    return status


def _stopped(step: int, checkpoints: Checkpoints, received: int | None, trouble: str | None) -> int:
    """Logs why the run ends before its last step, and from where it can be resumed; returns the exit code."""
    why, code = "another process was told to stop", 128 + signal.SIGTERM
    if received is not None:
        why, code = f"signal {received}", 128 + received
    elif trouble is not None:
        why, code = f"health: {trouble}", 3
    saved = checkpoints.latest_step() or 0
    if trouble == DIVERGED:
        words = (
            "stopped at step %d (%s); its state is not saved. Go on from step %d with a lower rate: the same command "
            "with --config.optim.lr=... --config.resume.allow_changes=True. To go back further, move later folders out "
            "of %s"
        )
        log.error(words, step, why, saved, CHECKPOINTS)
    elif saved == step:
        log.info("stopped at step %d (%s), state saved. The same command goes on from there.", step, why)
    else:
        words = "stopped at step %d (%s); its state is not saved. The same command goes on from step %d."
        log.error(words, step, why, saved)
    return code


def _source(resume: ConfigDict, program: Program) -> Weights | None:
    """The weights to begin with; None where the whole state is taken.

    Raises:
      RunError: that run has not what is to be taken of it. CheckpointError: its weights have other shapes.
    """
    source, whole = Path(resume.from_run), resume.take == "state"
    if not (checkpoint_steps(source) if whole else places(source)):
        what = "resumable checkpoint" if whole else "weights of a run"
        raise RunError(f"config.resume.from_run is {resume.from_run!r}: no {what} there")
    if whole:
        return None
    weights = restore_weights(source)
    weights = dataclasses.replace(weights, ema=_with_projector(weights, program))
    require_same_shapes(str(weights.path), weights.ema, program.abstract.params)
    return weights


def _first_position(
    config: ConfigDict, first: Prepared, checkpoints: Checkpoints, begin_with: Weights | None
) -> Position:
    """Where the run begins: at this run's checkpoint, at the state or the weights of another run, or anew."""
    program = first.program
    restored = checkpoints.restore(program.abstract)
    if restored is not None:
        return _whole_steps(*restored)
    if begin_with is not None:
        difference = difference_from(Path(config.resume.from_run), begin_with.step, first.manifest)
        words = "starting from the EMA of %s at step %d; data: %s"
        log.info(words, config.resume.from_run, begin_with.step, difference)
        return Position(program.from_ema(begin_with.ema), 0)
    if config.resume.from_run is not None:
        with Checkpoints(Path(config.resume.from_run), config.checkpoint.keep, read_only=True) as other:
            restored = other.restore(program.abstract)
        if restored is None:
            raise RunError(f"config.resume.from_run: {config.resume.from_run} has no checkpoint")
        position = dataclasses.replace(_whole_steps(*restored), unfinished=None)
        step = int(position.state.step)
        difference = difference_from(Path(config.resume.from_run), step, first.manifest)
        words = "continuing with the full state of %s at step %d; data: %s"
        log.info(words, config.resume.from_run, step, difference)
        return position
    return Position(program.create(), 0)


def _with_projector(weights: Weights, program: Program) -> Any:
    """The weights of another run with a projector if this one has one: theirs, or a new one where theirs differs."""
    wanted = program.abstract.params.get(dit.PROJECTOR)
    own = weights.without_projector().ema
    if wanted is None:
        return own
    theirs = weights.ema.get(dit.PROJECTOR)
    fits = theirs is not None and shape_difference(theirs, wanted) is None
    return own | {dit.PROJECTOR: theirs if fits else program.new_projector()}


def _whole_steps(state: TrainState, meta: dict[str, Any]) -> Position:
    """The position of a checkpoint, without a partly accumulated gradient, which only those of earlier versions hold.

    Their meta has `batch_size`; `samples` is set back by it, so that those micro-batches are drawn again.
    """
    done = int(state.opt_state.mini_step)
    if not done:
        return Position(state, meta["samples"], meta.get("unfinished"))
    log.info("the checkpoint was saved in the middle of a step: %d micro-batch(es) are drawn again", done)
    samples = meta["samples"] - done * meta["batch_size"]
    return Position(without_part(state), samples, meta.get("unfinished"))


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
    try:
        configuration.check_mesh(config.mesh)
    except configuration.ConfigError as error:
        sys.exit(f"error: {error}")
    devices.join_processes(config.mesh.coordinator, config.mesh.num_processes, config.mesh.process_id)
    hosts = Hosts(config.mesh.patience)
    keep_freed_memory(large_too=jax.default_backend() == "cpu")
    why = ""
    try:
        if config.mesh.coordinator not in (None, "auto") and jax.default_backend() == "cpu":
            require_reachable(config.mesh.coordinator)
        code = show_plan(config) if _PLAN.value else train(config)
    except USER_ERRORS as error:
        why = cli.explain(error)
        print(f"error: {why}", file=sys.stderr)
        code = 1
    except BrokenRun:  # already logged by the reporter
        code, why = 1, "an error that its log tells"
    except Exception as error:
        if not hosts.several:
            raise
        code = 1
        if why := hosts.explain(error):
            print(f"error: {why}", file=sys.stderr)
        else:
            traceback.print_exc()  # and not the wait for the others that JAX adds at the end of a process
            why = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from the last checkpoint, if any", file=sys.stderr)
        code, why = 130, "it was stopped at once"
    if hosts.several and why:
        hosts.leave(code, why)
    if leaves_threads() and not hosts.several:
        cli.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    _PLAN = flags.DEFINE_bool("plan", False, "Prints what the run would take, and runs nothing.")
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
    app.run(main, flags_parser=train_arguments.parse)
