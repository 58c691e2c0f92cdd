"""The run, end to end: what it writes, and that nothing that interrupts it changes what it computes."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from run_helpers import STEPS, assert_same_outcome, interrupt, log_of, rest_slow, run, run_config, scalars
from training_helpers import batch_layout, tree_equal, write_dataset
from wording import lines_naming, naming

from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.device.sharding import make_mesh
from fluxdit_jax.loader import reader
from fluxdit_jax.objective import patch_statistics
from fluxdit_jax.program import Program
from fluxdit_jax.run.averages import ema_steps, restore_ema
from fluxdit_jax.run.checkpoint import SHORT_EMA, CheckpointError, Checkpoints
from fluxdit_jax.run.run_directory import RunError, RunLock, load_config, load_dataset
from fluxdit_jax.run.scalars import on_board
from fluxdit_jax.settings import resolve
from fluxdit_jax.train import train

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

slow = pytest.mark.slow


@pytest.fixture
def config(tiny_dataset, tmp_path):
    return run_config(tiny_dataset, tmp_path / "run")


@pytest.fixture(scope="module")
def finished(quick_compile, tiny_dataset, tmp_path_factory):
    """An uninterrupted run; read only."""
    c = run_config(tiny_dataset, tmp_path_factory.mktemp("finished") / "run")
    run(c)
    return Path(c.workdir)


# ------------------------------------------------------------------------------------------------ what it writes


def test_the_run_directory_has_everything(finished, tiny_dataset):
    assert load_config(finished).model.width == 32
    assert load_dataset(finished) == load_manifest(tiny_dataset)
    assert [path.name for path in (finished / "checkpoints").iterdir()] == [str(STEPS)]
    assert ema_steps(finished) == ema_steps(finished, SHORT_EMA) == [4, 8]
    assert not tree_equal(restore_ema(finished)[1], restore_ema(finished, folder=SHORT_EMA)[1])
    assert list((finished / "tensorboard").glob("events.*"))
    logged = scalars(finished)
    assert list(logged) == list(range(1, STEPS + 1))
    for step, values in logged.items():
        assert all(np.isfinite(value) for value in values.values()), step
        for name in (
            "loss",
            "gradient_norm",
            "learning_rate",
            "velocity_rms_ratio",
            "ema_distance",
            "skipped",
        ):
            assert name in values
        assert ("heldout_loss" in values) == ("short_ema/heldout_loss" in values) == (step % 4 == 0)
    bins = {name for values in logged.values() for name in values if name.startswith("loss_by_time/")}
    groups = {name for name in logged[1] if name.startswith("gradient_norm_by_group/")}
    assert len(groups) == 14 and bins
    assert not list(finished.rglob("*tmp*"))


def test_the_log_begins_with_what_and_ends_with_where(finished):
    log = log_of(finished)
    for words in (
        "0.1 M parameters, width 32",
        "24 images",
        "batch: 4 x 2 = 8",
        "GB",
        "step 0 of 8",
    ):
        assert words in log
    assert lines_naming(log, "done", STEPS, finished / "ema")


def test_tensorboard_shows_the_same_numbers(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    logged = scalars(finished)
    for name in {name for values in logged.values() for name in values} - {"step"}:
        tag, description = on_board(name)
        shown = {event.step: event.value for event in events.Scalars(tag)}
        assert description and events.SummaryMetadata(tag).summary_description == description
        expected = {step: values[name] for step, values in logged.items() if name in values}
        assert shown == pytest.approx(expected, rel=1e-6), name


def test_training_learns(finished):
    logged = scalars(finished)
    assert logged[8]["heldout_loss"] < logged[4]["heldout_loss"]
    assert logged[8]["velocity_rms_ratio"] > logged[1]["velocity_rms_ratio"]
    assert logged[1]["learning_rate"] == pytest.approx(5e-3) and logged[3]["learning_rate"] == pytest.approx(1e-2)


def test_a_finished_run_is_done_at_once_also_if_it_is_now_shorter(finished, config, tmp_path):
    shutil.copytree(finished, config.workdir)
    before = scalars(config.workdir)
    run(config)
    config.train.steps = 5
    run(config)
    assert scalars(config.workdir) == before
    assert log_of(config.workdir).count("done: 8 steps") == 3


# ------------------------------------------------------------------------------------------------ exact resume


@pytest.mark.parametrize("first", rest_slow(5, 1))
def test_a_run_in_two_goes_is_the_run_in_one(finished, config, first):
    config.train.steps = first
    run(config)
    config.train.steps = STEPS
    run(config)
    expected = scalars(finished)
    if first % 4:  # the end of the first go was an end: it measured and wrote more than the run in one
        found = scalars(config.workdir)
        assert "heldout_loss" in found[first]
        found[first] = {name: v for name, v in found[first].items() if "heldout" not in name}
        assert found == expected
    assert tree_equal(restore_ema(Path(config.workdir), 8), restore_ema(finished, 8))
    assert tree_equal(restore_ema(Path(config.workdir), 4)[1], restore_ema(finished, 4)[1]) or first > 4


@pytest.mark.parametrize(
    ("after", "number"),
    rest_slow((7, signal.SIGTERM), (2, signal.SIGINT), (8, signal.SIGINT), (15, signal.SIGTERM), (4, signal.SIGHUP)),
)
def test_a_signal_saves_within_the_step_and_the_same_command_goes_on(config, finished, monkeypatch, after, number):
    with monkeypatch.context() as patch:
        interrupt(patch, after, number)
        run(config, expected=128 + number)
    log = log_of(config.workdir)
    assert lines_naming(log, f"(signal {int(number)})", "saved") and "not saved" not in log
    accumulated = config.optim.global_batch_size // config.data.micro_batch_size
    assert f"stopped at step {max(1, (after - 1) // accumulated)} " in log  # what of a step is done is left
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler)
    run(config)
    assert_same_outcome(config.workdir, finished)


@slow
def test_interrupted_many_times(config, finished, monkeypatch):
    for _ in range(10):
        with monkeypatch.context() as patch:
            interrupt(patch, 4)
            code = train(config.copy_and_resolve_references())
        if code == 0:
            break
        assert code == 128 + signal.SIGTERM
    assert code == 0
    assert_same_outcome(config.workdir, finished)


@slow
def test_losses_averaged_over_several_steps_survive_an_interruption(config, tmp_path, monkeypatch):
    """Logged every 3 steps: an interruption within these must not lose the steps before it."""
    config.log.every = 3
    whole = config.copy_and_resolve_references()
    whole.workdir = str(tmp_path / "whole")
    run(whole)
    for after in (4, 6):
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            run(config, expected=128 + signal.SIGTERM)
    run(config)
    assert list(scalars(whole.workdir)) == [3, 4, 6, 8]
    assert_same_outcome(config.workdir, whole.workdir)


@pytest.mark.parametrize("threads", rest_slow(1, 4))
def test_reader_threads_change_nothing(config, finished, threads):
    config.data.threads, config.data.prefetch = threads, threads
    run(config)
    assert_same_outcome(config.workdir, finished)


@slow
def test_another_optimizer_and_precision_resume_exactly(config, tmp_path, monkeypatch):
    config.optim.name, config.model.dtype = "muon", "bfloat16"
    whole = config.copy_and_resolve_references()
    whole.workdir = str(tmp_path / "whole")
    run(whole)
    with monkeypatch.context() as patch:
        interrupt(patch, 8)
        run(config, expected=128 + signal.SIGTERM)
    run(config)
    assert_same_outcome(config.workdir, whole.workdir)


@slow
def test_a_checkpoint_of_within_a_step_goes_on_from_the_step(config, finished):
    """As earlier versions wrote them."""
    config.train.steps = 5
    run(config)
    settings, manifest = resolve(config, load_manifest(Path(config.data.path))), load_manifest(Path(config.data.path))
    mesh = make_mesh(1, 1, 4)
    abstract = Program(settings, mesh, patch_statistics(manifest.latent_mean, manifest.latent_std, 2)).abstract
    with Checkpoints(Path(config.workdir), 2) as checkpoints:
        state, meta = checkpoints.restore(abstract)
    shutil.rmtree(Path(config.workdir) / "checkpoints")
    gradients = jax.tree.map(jax.numpy.ones_like, state.opt_state.acc_grads)
    half = state.opt_state._replace(mini_step=state.opt_state.mini_step + 1, acc_grads=gradients)
    with Checkpoints(Path(config.workdir), 2) as checkpoints:
        more = {"samples": meta["samples"] + 4, "batch_size": 4, "unfinished": meta["unfinished"]}
        checkpoints.save(5, state._replace(opt_state=half), more)
    config.train.steps = STEPS
    run(config)
    assert tree_equal(restore_ema(Path(config.workdir), STEPS), restore_ema(finished, STEPS))


def test_the_split_may_change_between_steps_with_the_same_samples(config, finished):
    config.train.steps = 3
    run(config)
    config.train.steps, config.data.micro_batch_size = STEPS, 2
    run(config)
    found, expected = scalars(config.workdir), scalars(finished)
    for step in range(1, STEPS + 1):
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4), step
        assert found[step]["gradient_norm"] == pytest.approx(expected[step]["gradient_norm"], rel=1e-3), step
    for a, b in zip(
        jax.tree.leaves(restore_ema(Path(config.workdir), 8)[1]), jax.tree.leaves(restore_ema(finished, 8)[1])
    ):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(config, finished, monkeypatch):
    config.checkpoint.minutes = 1e-9  # after every step
    config.train.steps = 5
    run(config)
    checkpoints = Path(config.workdir) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["4", "5"]
    largest = max(checkpoints.rglob("5/state/**/*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    shutil.rmtree(Path(config.workdir) / "ema" / "5")
    config.train.steps = STEPS
    run(config)
    assert lines_naming(log_of(config.workdir), " E checkpoints/5 ")
    assert_same_outcome(config.workdir, finished)


# ------------------------------------------------------------------------------------------------ refusals


def test_a_refused_change_of_the_configuration_leaves_no_trace(config, finished):
    shutil.copytree(finished, config.workdir)
    recorded = (Path(config.workdir) / "config.json").read_text()
    config.model.width, config.optim.lr = 64, 1.0
    with pytest.raises(RunError) as refusal:
        train(config)
    assert "model.width: 32 -> 64" in str(refusal.value) and "optim.lr: 0.01 -> 1.0" in str(refusal.value)
    config.resume.allow_changes = True
    with pytest.raises(CheckpointError, match=naming("checkpoints/8", "config.model", "k_scale", "[2, 16]")):
        train(config)
    assert (Path(config.workdir) / "config.json").read_text() == recorded
    assert [path.name for path in (Path(config.workdir) / "checkpoints").iterdir()] == ["8"]


@slow
def test_an_allowed_change_is_made(config, finished):
    shutil.copytree(finished, config.workdir)
    config.optim.lr, config.train.steps, config.resume.allow_changes = 1e-3, 9, True
    run(config)
    assert scalars(config.workdir)[9]["learning_rate"] == pytest.approx(1e-3)
    assert load_config(Path(config.workdir)).optim.lr == 1e-3


def test_two_runs_do_not_share_a_directory(config):
    lock = RunLock(Path(config.workdir))
    with pytest.raises(RunError, match=rf"{config.workdir} .*\bpid {os.getpid()}\b"):
        train(config)
    lock.release()


# ------------------------------------------------------------------------------------------------ stages


def test_a_stage_starts_from_another_runs_ema_at_another_resolution(config, finished, tmp_path):
    write_dataset(tmp_path / "large", sizes=((6, 8), (8, 6)), seed=5)
    config.data.path, config.resume.from_run = str(tmp_path / "large"), str(finished)
    config.optim.lr, config.train.steps = 1e-12, 1
    run(config)
    assert lines_naming(log_of(config.workdir), "EMA", finished, "step 8")
    for a, b in zip(
        jax.tree.leaves(restore_ema(Path(config.workdir), 1)[1]), jax.tree.leaves(restore_ema(finished, 8)[1])
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert list(scalars(config.workdir)) == [1]


@pytest.mark.parametrize("name", ["manifest.json", "a.jpg"])
def test_a_run_is_not_written_among_pictures_or_into_a_dataset(config, name):
    workdir = Path(config.workdir)
    workdir.mkdir()
    (workdir / name).touch()
    with pytest.raises(RunError, match=naming("config.workdir", workdir, name)):
        train(config)
    assert [path.name for path in workdir.iterdir()] == [name]


def test_a_stage_of_another_network_names_the_difference(config, finished):
    config.resume.from_run, config.model.depth = str(finished), 3
    with pytest.raises(CheckpointError) as refusal:
        train(config)
    assert str(finished) in str(refusal.value) and "blocks/" in str(refusal.value)
    assert "[2, " in str(refusal.value) and "[3, " in str(refusal.value)
    assert not Path(config.workdir).exists()  # told before anything is compiled


@slow
def test_a_run_may_go_on_with_the_whole_state_of_another(config, finished):
    config.resume.from_run, config.resume.take, config.train.steps = str(finished), "state", 10
    run(config)
    assert list(scalars(config.workdir)) == [9, 10]
    assert lines_naming(log_of(config.workdir), "state", finished, "step 8; data: the same data set")
    run(config)
    told = log_of(config.workdir).split("curves")[-2]
    assert "step 10 of 10: nothing is left to train" in told and "resume.from_run has no effect" in log_of(
        config.workdir
    )
    assert "memory of a device" not in told, "nothing is compiled"


@slow
def test_a_run_goes_on_without_the_one_that_it_began_with(config, finished, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    config.resume.from_run, config.train.steps = str(other), 1
    run(config)
    shutil.rmtree(other / "checkpoints")
    config.workdir, config.resume.take = str(tmp_path / "third"), "state"
    with pytest.raises(RunError, match=naming("config.resume.from_run", other, "checkpoint")):
        train(config)
    assert not (tmp_path / "third").exists()
    shutil.rmtree(other)
    config.workdir, config.resume.take, config.train.steps = str(tmp_path / "run"), "ema", 2
    run(config)
    assert list(scalars(config.workdir)) == [1, 2]


# ------------------------------------------------------------------------------------------------ the program


def test_places_are_kept_and_nothing_is_compiled_twice(config, tiny_dataset):
    manifest = load_manifest(tiny_dataset)
    settings = resolve(config, manifest)
    program = Program(settings, make_mesh(-1, 1, 4), patch_statistics(manifest.latent_mean, manifest.latent_std, 2))
    accumulate, update, _ = program.compile()
    state = program.create()
    source = reader.RecordSource(tiny_dataset, manifest, "train")
    options = {"layout": batch_layout(4, 8), "threads": 1, "prefetch": 1}
    for batch in itertools.islice(reader.batches(source, seed=0, start=0, batch_size=4, **options), 3):
        shapes = program.batch_shapes()
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
            name: (s.shape, s.dtype) for name, s in shapes.items()
        }
        state, _ = update(accumulate(state, batch)[0])
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract)):
            assert (leaf.shape, leaf.dtype, leaf.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
