"""Trains a diffusion transformer: `python -m fluxdit_jax.train --config=configs/demo.py --config.workdir=RUN`.

Read `train` from top to bottom: it is the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from fluxdit_jax import config as configuration
from fluxdit_jax import data, model, sharding
from fluxdit_jax.allocator import keep_freed_memory
from fluxdit_jax.checkpoint import CheckpointError, Checkpoints
from fluxdit_jax.flow import FlowConfig
from fluxdit_jax.generation import Generator
from fluxdit_jax.health import Monitor
from fluxdit_jax.metrics import MetricsWriter, pack
from fluxdit_jax.optimizer import build_optimizer, learning_rate
from fluxdit_jax.preview import Preview, spread
from fluxdit_jax.records import DatasetError, Manifest, load_manifest
from fluxdit_jax.reporting import Reporter
from fluxdit_jax.run_directory import RunError, RunLock, start_or_resume
from fluxdit_jax.sharding import MeshError
from fluxdit_jax.state import TrainState, create_state
from fluxdit_jax.train_step import make_train_step, patch_statistics
from fluxdit_jax.vae import DecoderError, load_decoder

log = logging.getLogger("fluxdit_jax")
USER_ERRORS = (configuration.ConfigError, DatasetError, RunError, MeshError, CheckpointError, DecoderError)


def train(config: ConfigDict) -> int:
    """Starts or resumes the run that `config` describes; returns the process's exit code."""
    # ---------------------------------------------------------------- configuration, data set, run directory
    configuration.check(config)
    manifest = load_manifest(config.data.path)
    settings = configuration.resolve(config, manifest)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.data.batch_size)
    source = data.RecordSource(config.data.path, manifest, "train")
    workdir = Path(config.workdir)
    with contextlib.ExitStack() as closing:
        closing.callback(RunLock(workdir).release)
        closing.callback(_log_to(workdir / "train.log"))
        start_or_resume(workdir, config, manifest)

        # ------------------------------------------------------------ model, optimizer, state: new or restored
        graph, shapes = model.build(settings.model)
        optimizer = build_optimizer(settings.optimizer)
        abstract = jax.eval_shape(lambda params: create_state(params, optimizer), shapes)
        placed = sharding.tree_sharding(mesh, abstract)
        checkpoints = closing.enter_context(Checkpoints(workdir, config.checkpoint.keep))
        restored = checkpoints.restore(
            jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed)
        )
        if restored is None:
            samples = 0
            key = jax.random.key(config.seed)
            create = jax.jit(
                lambda key: create_state(model.initialize(settings.model, key), optimizer),
                out_shardings=placed,
            )
            state = create(key)
        else:
            state, meta = restored
            samples = meta["samples"]
        step, mini = int(state.step), int(state.opt_state.mini_step)
        _describe(config, settings, manifest, mesh, step)

        # ------------------------------------------------------------ the step and the data
        statistics = patch_statistics(manifest.latent_mean, manifest.latent_std, settings.model.patch)
        train_step = make_train_step(
            graph,
            settings.model.dtype,
            optimizer,
            settings.flow,
            statistics,
            config.seed,
            config.optim.effective_batch,
            config.ema.decay,
        )

        def packed_step(state: TrainState, batch: dict) -> tuple[TrainState, jax.Array]:
            state, metrics = train_step(state, batch)
            return state, pack(metrics)

        run = jax.jit(packed_step, donate_argnums=0)
        batches = data.batches(
            source,
            seed=config.seed,
            start=samples,
            batch_size=config.data.batch_size,
            patch=settings.model.patch,
            tokens=settings.tokens,
            text_tokens=settings.text_tokens,
            threads=config.data.threads,
            prefetch=config.data.prefetch,
            process=jax.process_index(),
            processes=jax.process_count(),
        )
        batch = sharding.put_batch(mesh, next(batches))

        # ------------------------------------------------------------ what is written and shown
        preview = _make_preview(config, settings, manifest, source, statistics)
        writer = MetricsWriter(workdir, step)
        reporter = closing.enter_context(
            Reporter(
                writer=writer,
                monitor=Monitor(config.optim.lr, config.optim.warmup_steps, _without_gradient(settings.flow)),
                schedule=learning_rate(settings.optimizer, config.optim.lr),
                metric_shapes=jax.eval_shape(train_step, state, batch)[1],
                batch_size=config.data.batch_size,
                step=step,
                total_steps=config.train.steps,
                every=config.log.every,
            )
        )
        stop = closing.enter_context(_Signals())

        # ------------------------------------------------------------ the loop: one micro-batch a turn
        # The metrics of a micro-batch are read after the next one is dispatched, so that the device never
        # waits for the host. Only where something is to be done with the state is the device waited for.
        accumulate = settings.optimizer.accumulate
        saved_at = time.monotonic()
        unread = None
        while step < config.train.steps:
            state, values = run(state, batch)
            samples += config.data.batch_size
            asked = time.monotonic()
            batch = sharding.put_batch(mesh, next(batches))
            if values.is_ready():  # the device was done before the data came
                reporter.waited(time.monotonic() - asked)
            if unread is not None:
                step, mini = reporter.read(unread)
            unread = values
            # where the micro-batch in flight will lead, unless it is skipped
            step, mini = (step + 1, 0) if mini + 1 == accumulate else (step, mini + 1)

            last = step == config.train.steps
            save_due = last or time.monotonic() - saved_at > 60 * config.checkpoint.minutes
            ema_due = last or step % config.checkpoint.ema_every == 0
            preview_due = preview is not None and (last or step % config.log.preview_every == 0)
            stop_due = stop.signal is not None or (reporter.trouble and config.health.action == "stop")
            if not (stop_due or (mini == 0 and (save_due or ema_due or preview_due))):
                continue
            promised = step
            step, mini = reporter.read(unread)
            unread = None
            asked = time.monotonic()
            if mini == 0 and step == promised:
                if ema_due:
                    checkpoints.save_ema(step, state.ema)
                if preview_due:
                    _write_preview(preview, state.ema, step, workdir, writer)
            if stop_due or (mini == 0 and step == promised and save_due):
                checkpoints.save(step, state, {"samples": samples})
                saved_at = time.monotonic()
            reporter.pause(time.monotonic() - asked)
            checkpoints.poll()
            if stop_due:
                break

    # -------------------------------------------------------------------- everything is written: say so
    if step >= config.train.steps:
        log.info("done: %d steps. EMA weights: %s; pictures: %s", step, workdir / "ema", workdir / "samples")
        return 0 if checkpoints.failures == 0 else 1
    why = f"signal {stop.signal}" if stop.signal else f"health: {reporter.trouble.kind}"
    log.info("stopped at step %d (%s), state saved. The same command goes on from there.", step, why)
    return 128 + stop.signal if stop.signal else 3


def _describe(config: ConfigDict, settings: Any, manifest: Manifest, mesh: Any, step: int) -> None:
    m = settings.model
    log.info(
        "model: %.1f M parameters, width %d, depth %d, heads %d, %s, attention %s, remat %s",
        model.count_parameters(m) / 1e6,
        m.width,
        m.depth,
        m.heads,
        m.dtype,
        m.attention,
        m.remat,
    )
    log.info(
        "data: %d images of %s, up to %d image tokens and %d text tokens each, VAE %s",
        manifest.records("train"),
        config.data.path,
        settings.tokens,
        settings.text_tokens,
        manifest.vae.id,
    )
    if manifest.text_tokens > settings.text_tokens:
        log.warning(
            "captions longer than %d tokens are cut; the longest has %d",
            settings.text_tokens,
            manifest.text_tokens,
        )
    log.info(
        "batch: %d x %d = %d on %d %s device(s); time shift %.2f; %s",
        config.data.batch_size,
        settings.optimizer.accumulate,
        config.optim.effective_batch,
        mesh.size,
        jax.devices()[0].device_kind,
        settings.flow.shift,
        f"resuming at step {step} of {config.train.steps}"
        if step
        else f"{config.train.steps} steps from the start",
    )


def _without_gradient(f: FlowConfig) -> frozenset[str]:
    """The learned nulls that this run never trains, because it never drops their condition."""
    return frozenset(
        name
        for name, share in (
            ("null_text", f.drop_text + f.drop_both),
            ("null_vision", f.drop_vision + f.drop_both),
        )
        if share == 0
    )


def _make_preview(config: ConfigDict, settings: Any, manifest: Manifest, source: Any, statistics: Any):
    """The preview of fixed records, from the holdout where there is one; None if none is asked for."""
    if not config.log.preview_every:
        return None
    if manifest.records("holdout"):
        source = data.RecordSource(config.data.path, manifest, "holdout")
    try:
        decoder = load_decoder(manifest.vae, config.log.vae)
    except DecoderError as error:
        if config.log.vae:
            raise
        log.warning("no pictures while training: %s", error)
        return None
    generator = Generator(
        settings.model,
        tokens=settings.tokens,
        shift=settings.flow.shift,
        statistics=statistics,
        steps=config.log.preview_steps,
        batch_size=min(config.data.batch_size, config.log.preview_count),
    )
    records = [source[index] for index in spread(len(source), config.log.preview_count)]
    return Preview(records, generator, decoder, settings.model.patch, settings.text_tokens)


def _write_preview(preview: Preview, ema: Any, step: int, workdir: Path, writer: MetricsWriter) -> None:
    sheet = preview.draw(ema)
    path = workdir / "samples" / f"step_{step:07d}.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    writer.image(step, "samples", np.asarray(sheet))
    writer.flush()


class _Signals(contextlib.AbstractContextManager):
    """The first SIGINT or SIGTERM asks the loop to save and stop; a second one kills as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: Any) -> None:
        self.signal = number
        log.info("signal %d: finishing the micro-batch and saving; send it again to stop at once", number)
        signal.signal(number, self._before[number])


def _log_to(path: Path):
    """Sends the package's log to stderr and to a file; returns how to undo it."""
    formatter = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    handlers = [logging.StreamHandler(sys.stderr), logging.FileHandler(path, encoding="utf-8")]
    for handler in handlers:
        handler.setFormatter(formatter)
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False

    def undo() -> None:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()

    return undo


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk: a second start skips the compiler."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fluxdit_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; overrides are written --config.group.key=value")
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax narrates every save at INFO
    use_compilation_cache()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    try:
        code = train(_CONFIG.value)
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
    app.run(main)
