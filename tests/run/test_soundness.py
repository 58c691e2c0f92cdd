"""Broken weights and endless NaN: the run ends by itself, says which of the two it is, and saves nothing of it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import training_helpers
from training_helpers import make_record, tiny_config, tree_equal, write_config, write_dataset
from wording import lines_naming, naming

from fluxdit_jax.config import ConfigError, check
from fluxdit_jax.dataset.fields import BF16
from fluxdit_jax.dataset.manifest import MANIFEST
from fluxdit_jax.loader import reader
from fluxdit_jax.optimizer import build_optimizer
from fluxdit_jax.run.averages import ema_steps, restore_ema
from fluxdit_jax.run.checkpoint import CheckpointError, Checkpoints
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.run.metrics import read_metrics
from fluxdit_jax.run.soundness import BrokenRun, Watchdog, state_fault, weights_fault
from fluxdit_jax.state import create_state
from fluxdit_jax.train import train

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def config(tiny_dataset, tmp_path):
    c = tiny_config(tiny_dataset, tmp_path / "run")
    c.checkpoint.ema_every, c.checkpoint.minutes, c.log.heldout_every = 2, 1e-9, 1
    return c


@pytest.fixture(scope="module")
def finished(quick_compile, tiny_dataset, tmp_path_factory):
    c = tiny_config(tiny_dataset, tmp_path_factory.mktemp("finished") / "run")
    c.checkpoint.ema_every, c.checkpoint.minutes, c.log.heldout_every = 2, 1e-9, 1
    assert train(c) == 0
    return Path(c.workdir)


def steps_of(workdir):
    return sorted(int(path.name) for path in (Path(workdir) / "checkpoints").iterdir())


def log_of(workdir):
    return (Path(workdir) / "train.log").read_text()


# ------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(
    ("value", "sound"),
    [
        (0.02, True),
        (5.0, True),
        (1e3, False),
        (1e30, False),
        (np.inf, False),
        (-np.inf, False),
        (np.nan, False),
    ],
)
@pytest.mark.parametrize("place", [np.asarray, jnp.asarray], ids=["host", "device"])
def test_weights_that_cannot_be_used_are_told_from_those_that_can(value, sound, place):
    tree = {"a": np.full((30, 4), 0.02, np.float32), "b": {"c": np.full((7,), value, np.float32)}}
    fault = weights_fault(jax.tree.map(place, tree))
    assert (fault is None) == sound and (sound or "square" in fault)


@pytest.mark.parametrize("part", ["params", "ema", "short_ema", "opt_state"])
def test_every_part_of_a_state_is_looked_at(part):
    params = {"w": {"kernel": jnp.full((4, 3), 0.1)}}
    state = create_state(params, build_optimizer(training_helpers.tiny_optimizer()), short_ema=True)
    assert state_fault(state) is None

    def poison(leaf):
        return leaf.at[(0,) * leaf.ndim].set(jnp.nan) if leaf.dtype == jnp.float32 and leaf.ndim else leaf

    fault = state_fault(state._replace(**{part: jax.tree.map(poison, getattr(state, part))}))
    assert {"params": "weights", "ema": "EMA", "short_ema": "short EMA", "opt_state": "moments"}[part] in fault


def updated(step=1, norm=1.0, update=0.1, distance=0.1):
    return {"step": step, "param_norm": norm, "update_norm": update, "ema_distance": distance}


def test_the_watchdog_counts_micro_batches_in_a_row_only():
    watchdog = Watchdog(3, 100, 1e-3)
    for _ in range(5):
        for skipped in (True, True, False):
            watchdog.micro_batch(0, skipped)
    watchdog.update(updated(1))
    for _ in range(2):
        watchdog.micro_batch(1, True)
    with pytest.raises(BrokenRun, match=naming(3, "micro-batches")) as ended:
        watchdog.micro_batch(2, True)
    for word in (
        "health.max_skipped",
        "finite",
        "step 1",
        "0.001",
        "checkpoints/1",
    ):
        assert word in str(ended.value)


@pytest.mark.parametrize(
    "change",
    [
        {"norm": np.inf},
        {"norm": np.nan},
        {"norm": 1e5},
        {"update": 20.0},
        {"distance": np.nan},
        {"distance": np.inf},
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_the_watchdog_ends_a_run_at_the_update_that_breaks_it(change, first):
    watchdog = Watchdog(100, 100, 1e30)
    if not first:
        watchdog.update(updated(6))
    change = change | ({"norm": 20.02} if "update" in change else {})
    with pytest.raises(BrokenRun, match=naming("step 7", "optim.lr", "1e+30")):
        watchdog.update(updated(7, **change))


# ------------------------------------------------------------------------------------------------ runs


def kinds_told(entries):
    return {name for entry in entries for name in entry if name.startswith("health/")}


@pytest.mark.parametrize(
    ("lr", "action", "batch_size"),
    [(1e30, "stop", 8), (30.0, "warn", 4)],
)
def test_a_rate_far_too_high_ends_the_run_at_its_first_step_and_saves_nothing(config, lr, action, batch_size):
    config.optim.lr, config.health.action, config.data.micro_batch_size = lr, action, batch_size
    config.optim.warmup_steps = 0
    with pytest.raises(BrokenRun, match=naming("step 1", "optim.lr", f"({lr:g})")):
        train(config)
    workdir = Path(config.workdir)
    assert steps_of(workdir) == [] and ema_steps(workdir) == []
    log = log_of(workdir)
    assert len(lines_naming(log, "step 1", f"({lr:g})", "optim.lr")) == 1 and "preprocess verify" not in log
    entries = read_metrics(workdir / "metrics.jsonl")
    assert kinds_told(entries) == {"health/broken"}, "and nothing that misleads"
    assert [entry["step"] for entry in entries if "health/broken" in entry] == [1]
    assert not [entry for entry in entries if "heldout_loss" in entry]


def test_a_diverged_run_keeps_its_checkpoints_and_resumes_at_a_lower_rate(config, finished):
    config.train.steps = 4
    assert train(config.copy_and_resolve_references()) == 0
    before = {p: p.read_bytes() for p in Path(config.workdir, "checkpoints").rglob("*") if p.is_file()}
    thrown = config.copy_and_resolve_references()
    thrown.train.steps, thrown.optim.lr, thrown.resume.allow_changes = 8, 1e30, True
    with pytest.raises(BrokenRun, match="step 5"):
        train(thrown)
    assert {p: p.read_bytes() for p in Path(config.workdir, "checkpoints").rglob("*") if p.is_file()} == before
    assert ema_steps(Path(config.workdir)) == [2, 4]
    config.train.steps, config.resume.allow_changes = 8, True
    assert train(config) == 0
    assert tree_equal(restore_ema(Path(config.workdir)), restore_ema(finished))


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A data set of records that are finite, and so large that no loss is."""

    def record(number, *args, **kwargs):
        made = make_record(number, *args, **kwargs)
        object.__setattr__(made, "latent", np.full_like(made.latent, BF16.type(3e38)))
        return made

    directory = tmp_path_factory.mktemp("overflowing") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_helpers, "make_record", record)
        manifest = write_dataset(directory)
    fair = dataclasses.replace(manifest, latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4)
    (directory / MANIFEST).write_text(fair.to_json())
    return directory


@pytest.mark.parametrize("batch_size", [4, 8])
def test_a_run_without_a_finite_gradient_ends_without_blaming_weights(config, overflowing, batch_size):
    config.data.path, config.data.micro_batch_size, config.log.heldout_every = str(overflowing), batch_size, 0
    config.health.max_skipped, config.train.steps = 40, 100
    with pytest.raises(BrokenRun, match=naming(40, "micro-batches")):
        train(config)
    log = log_of(config.workdir)
    assert lines_naming(log, "finite", "preprocess verify", 40, "micro-batches")
    misleading = {"health/dead_parameters", "health/collapsed", "health/spiked", "health/diverged"}
    assert not kinds_told(read_metrics(Path(config.workdir) / "metrics.jsonl")) & misleading
    assert steps_of(config.workdir) == [] and ema_steps(Path(config.workdir)) == []


def test_a_run_does_not_end_well_where_nothing_is_finite(config, overflowing):
    """Before as many micro-batches as health.max_skipped."""
    config.data.path, config.data.micro_batch_size, config.log.heldout_every = str(overflowing), 8, 0
    config.train.steps = 12
    with pytest.raises(BrokenRun, match=naming("step 12", "12 micro-batches")):
        train(config)
    assert steps_of(config.workdir) == [] and ema_steps(Path(config.workdir)) == []


def test_a_signal_amid_nan_saves_nothing_over_good_checkpoints(config, finished, overflowing, monkeypatch):
    shutil.copytree(finished, config.workdir)
    config.data.path, config.resume.allow_changes, config.log.heldout_every = str(overflowing), True, 0
    config.train.steps = 100
    original = reader.batches

    def batches(*args, **kwargs):
        for position, batch in enumerate(original(*args, **kwargs)):
            if position == 30:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(reader, "batches", batches)
    before = {p: p.read_bytes() for p in Path(config.workdir, "checkpoints").rglob("*") if p.is_file()}
    assert train(config) == 128 + signal.SIGTERM
    assert {p: p.read_bytes() for p in Path(config.workdir, "checkpoints").rglob("*") if p.is_file()} == before
    assert lines_naming(log_of(config.workdir), "not saved")


@pytest.mark.parametrize("value", [0, -1])
def test_the_limit_is_checked(config, value):
    config.health.max_skipped = value
    with pytest.raises(ConfigError, match=r"health\.max_skipped"):
        check(config)
    config.health.action, config.health.max_skipped = "ignore", 1
    with pytest.raises(ConfigError, match=r"health\.action"):
        check(config)


@pytest.mark.slow
def test_the_command_ends_with_one_error(config, train_command, tmp_path):
    config.optim.lr, config.optim.warmup_steps, config.data.micro_batch_size = 1e30, 0, 8
    done = train_command.run(config=write_config(tmp_path / "c.py", config))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(lines_naming(done.stderr, " E ", "step 1", "optim.lr")) == 1 and steps_of(config.workdir) == []


# ------------------------------------------------------------------------------------------------ on disk


def make_state(value):
    params = {"mlp": {"kernel": jnp.full((60, 40), 0.1).at[3, 4].set(value)}, "bias": jnp.full((7,), 0.1)}
    return create_state(params, build_optimizer(training_helpers.tiny_optimizer()))


def abstract(state):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def write_as_before(workdir, step, state):
    """A checkpoint and EMA weights, written without a look at the numbers."""
    meta = {"samples": 4}
    meta |= {"digest": tree_digest(state, meta)}
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)))
    with ocp.StandardCheckpointer() as saver:
        saver.save(workdir / "ema" / str(step), state.ema, custom_metadata={"digest": tree_digest(state.ema)})


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_broken_weights_are_not_written_and_not_taken_for_good_ones(tmp_path, package_log, value):
    good, bad = make_state(0.1), make_state(value)
    with Checkpoints(tmp_path, 5) as checkpoints:
        checkpoints.save(1, good, {"samples": 4})
        checkpoints.save_ema(1, good.ema)
        with pytest.raises(BrokenRun, match="state.*step 2"):
            checkpoints.save(2, bad, {"samples": 8})
        with pytest.raises(BrokenRun, match="EMA.*step 2"):
            checkpoints.save_ema(2, bad.ema)
    assert steps_of(tmp_path) == ema_steps(tmp_path) == [1]

    write_as_before(tmp_path, 3, bad)
    with Checkpoints(tmp_path, 5) as checkpoints:
        state, meta = checkpoints.restore(abstract(good))
    assert tree_equal(state, good) and meta["samples"] == 4
    assert steps_of(tmp_path) == [1] and (tmp_path / "damaged" / "3").is_dir()
    assert any("checkpoints/3" in line and "broken" in line for line in package_log)
    with pytest.raises(CheckpointError, match="ema/3.*broken"):
        restore_ema(tmp_path)
    assert restore_ema(tmp_path, 1)[0] == 1


def test_nothing_but_broken_weights_is_refused_with_a_way_on(tmp_path):
    write_as_before(tmp_path, 3, make_state(np.nan))
    with Checkpoints(tmp_path, 5) as checkpoints, pytest.raises(CheckpointError) as refusal:
        checkpoints.restore(abstract(make_state(0.1)))
    for word in ("3: ", "broken", "from_run", "backup"):
        assert word in str(refusal.value)
    assert steps_of(tmp_path) == [3]


def test_what_was_damaged_before_is_not_overwritten(tmp_path):
    good = make_state(0.1)
    for _ in range(2):
        with Checkpoints(tmp_path, 5) as checkpoints:
            if not steps_of(tmp_path):
                checkpoints.save(1, good, {"samples": 4})
        write_as_before(tmp_path, 3, make_state(np.nan))
        shutil.rmtree(tmp_path / "ema" / "3")
        with Checkpoints(tmp_path, 5) as checkpoints:
            checkpoints.restore(abstract(good))
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == ["3", "3.2"]
    assert json.loads((tmp_path / "history.jsonl").read_text().splitlines()[0])["saved"] == 1
