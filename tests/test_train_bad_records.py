"""Records that are damaged or without a finite loss: the run stops and names them, or passes over and counts them."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import training_helpers
from run_helpers import STEPS, assert_same_outcome, interrupt, log_of, rest_slow, run, run_config, scalars
from training_helpers import make_record, write_dataset
from wording import lines_naming

from fluxdit_jax.dataset.fields import BF16
from fluxdit_jax.dataset.manifest import MANIFEST
from fluxdit_jax.loader import reader
from fluxdit_jax.run.checkpoint import checkpoint_steps
from fluxdit_jax.run.metrics import read_metrics
from fluxdit_jax.train import train

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

slow = pytest.mark.slow


@pytest.fixture
def config(tiny_dataset, tmp_path):
    return run_config(tiny_dataset, tmp_path / "run")


def test_a_damaged_record_stops_the_run_and_names_it(config, tmp_path):
    path = damage_record_13(tmp_path / "data")
    config.data.path = str(tmp_path / "data")
    with pytest.raises(reader.DatasetError, match=f"{path.name} row 1 .record 13."):
        train(config)


def test_a_damaged_record_is_passed_over_if_asked_to_counted_and_resumed(config, tmp_path, monkeypatch):
    """One of 24: its place in each of the epochs is taken, the same in one go and in two."""
    path = damage_record_13(tmp_path / "data")
    config.data.path, config.data.on_corrupt = str(tmp_path / "data"), "skip"
    whole = config.copy_and_resolve_references()
    whole.workdir = str(tmp_path / "whole")
    run(whole)
    replaced = {step: values["replaced_samples"] for step, values in scalars(whole.workdir).items()}
    assert len(replaced) == STEPS and 2 <= sum(replaced.values()) <= 3 and set(replaced.values()) == {0, 1}
    assert log_of(whole.workdir).count(f"{path.name} row 1 (record 13)") == 1
    assert all(values["skipped"] == 0 for values in scalars(whole.workdir).values())
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        run(config, expected=128 + signal.SIGTERM)
    run(config)
    assert_same_outcome(config.workdir, whole.workdir)


def test_what_was_trained_before_a_damaged_record_is_kept(config, tmp_path):
    sound = write_dataset(tmp_path / "sound")
    path = damage_record_13(tmp_path / "data")
    config.data.path, config.seed, config.log.heldout_every = str(tmp_path / "data"), 3, 0
    with pytest.raises(reader.DatasetError, match=r"record 13.*The state of step 2 is saved"):
        train(config)
    assert checkpoint_steps(Path(config.workdir)) == [2]
    assert lines_naming(log_of(config.workdir), "ended by an error", "record 13")
    shutil.copy(tmp_path / "sound" / sound.shards["train"][1].file, path)
    run(config)
    whole = config.copy_and_resolve_references()
    whole.workdir = str(tmp_path / "whole")
    run(whole)
    assert_same_outcome(config.workdir, whole.workdir)


def damage_record_13(directory):
    """Writes a dataset with a flipped bit in the payload of record 13; gives the path of its shard."""
    manifest = write_dataset(directory)
    path = directory / manifest.shards["train"][1].file
    content = bytearray(path.read_bytes())
    content[content.index(make_record(13, (2, 6)).vision.tobytes())] ^= 1
    path.write_bytes(content)
    return path


@slow
def test_damage_in_the_holdout_split_is_named_or_passed_over(config, tmp_path):
    manifest = write_dataset(tmp_path / "data")
    path = tmp_path / "data" / manifest.shards["holdout"][0].file
    content = bytearray(path.read_bytes())
    content[content.index(make_record(1000).vision.tobytes())] ^= 1
    path.write_bytes(content)
    config.data.path = str(tmp_path / "data")
    with pytest.raises(reader.DatasetError, match=f"{path.name} row 0 .record 0."):
        train(config)
    config.data.on_corrupt, config.train.steps = "skip", 4
    run(config)
    assert np.isfinite(scalars(config.workdir)[4]["heldout_loss"])
    assert len(lines_naming(log_of(config.workdir), "passed over", f"{path.name} row 0 (record 0)")) == 1


# ------------------------------------------------------------------------------------------------ non-finite


@pytest.fixture
def overflowing(tmp_path, monkeypatch):
    """Makes datasets in which some records are finite but so large that their loss is not."""

    def make(bad):
        def record(number, *args, **kwargs):
            made = make_record(number, *args, **kwargs)
            if number in bad:
                object.__setattr__(made, "latent", np.full_like(made.latent, BF16.type(3e38)))
            return made

        directory = tmp_path / f"data{len(bad)}"
        with monkeypatch.context() as patch:
            patch.setattr(training_helpers, "make_record", record)
            manifest = write_dataset(directory)
        fair = dataclasses.replace(manifest, latent_mean=(0.5,) * 4, latent_std=(2.0,) * 4)
        (directory / MANIFEST).write_text(fair.to_json())
        return directory

    return make


@pytest.mark.parametrize("batch_size", rest_slow(4, 8))
def test_a_bad_record_is_skipped_counted_and_told(config, overflowing, batch_size):
    config.data.path = str(overflowing({7}))
    config.data.micro_batch_size = batch_size
    config.log.heldout_every = 0
    config.flow.shift = 1.0  # with some times a gradient of finite numbers, whose squares are not
    run(config)
    logged = scalars(config.workdir)
    assert list(logged) == list(range(1, STEPS + 1))
    skipped = sum(values["skipped"] for values in logged.values())
    assert 2 <= skipped <= 4  # once in every epoch of 24 samples
    whole = 8 // batch_size  # micro-batches of a step
    lost = {step for step, values in logged.items() if values["skipped"] == whole}  # without any gradient
    assert all(np.isfinite(v) for step, values in logged.items() for v in values.values() if step not in lost)
    texts = [e for e in read_metrics(Path(config.workdir) / "metrics.jsonl") if "health/non-finite" in e]
    assert texts and "skipped" in texts[0]["health/non-finite"]
    assert "health: step" in log_of(config.workdir)


@pytest.mark.parametrize("batch_size", rest_slow(4, 2, 8))
def test_a_run_of_nothing_but_bad_records_stops_if_asked_to(config, overflowing, batch_size):
    config.data.path = str(overflowing(set(range(24))))
    config.data.micro_batch_size, config.health.action, config.log.heldout_every = batch_size, "stop", 0
    config.train.steps, config.flow.shift = 100, 1.0
    run(config, expected=3)
    assert lines_naming(log_of(config.workdir), "stopped", "(health:") and "non-finite" in log_of(config.workdir)
    assert not list(Path(config.workdir, "checkpoints").glob("[0-9]*"))


@slow
@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_run_of_nothing_but_bad_records_still_obeys_a_signal(config, overflowing, batch_size, monkeypatch):
    config.data.path = str(overflowing(set(range(24))))
    config.data.micro_batch_size, config.log.heldout_every, config.train.steps = batch_size, 0, 100
    config.flow.shift = 1.0
    with monkeypatch.context() as patch:
        interrupt(patch, 30)
        run(config, expected=128 + signal.SIGTERM)


def test_a_state_that_has_diverged_takes_no_place_of_a_good_one(config):
    config.train.steps, config.log.heldout_every, config.checkpoint.minutes = 2, 0, 1e6
    run(config)
    config.train.steps, config.optim.lr, config.optim.warmup_steps, config.health.action = 200, 1.0, 0, "stop"
    config.optim.grad_clip_norm, config.resume.allow_changes = 1e6, True
    run(config, expected=3)
    assert checkpoint_steps(Path(config.workdir)) == [2]
    assert lines_naming(log_of(config.workdir), "health: diverged", "not saved", "step 2 ", "optim.lr", "checkpoints")


def test_a_run_that_goes_on_though_it_has_diverged_keeps_a_checkpoint_from_before(config):
    config.train.steps, config.log.heldout_every, config.checkpoint.minutes = 2, 0, 1e6
    run(config)
    config.train.steps, config.optim.lr, config.optim.warmup_steps, config.checkpoint.keep = 200, 1.0, 0, 1
    config.optim.grad_clip_norm, config.resume.allow_changes = 1e6, True
    for last in (200, 210):  # the second does not know of the divergence but by its checkpoint
        config.train.steps = last
        run(config)
        assert checkpoint_steps(Path(config.workdir)) == [2, last]
    assert lines_naming(log_of(config.workdir), "checkpoints/2", "before", "diverged", "kept")


@slow
def test_a_state_that_is_due_when_it_is_found_diverged_is_not_saved(config):
    config.log.heldout_every, config.checkpoint.minutes, config.train.steps = 0, 1e-9, 200
    config.optim.lr, config.optim.warmup_steps, config.optim.grad_clip_norm = 1.0, 0, 1e6
    config.health.action = "stop"
    run(config, expected=3)
    logged = read_metrics(Path(config.workdir) / "metrics.jsonl")
    found = next(entry["step"] for entry in logged if "health/diverged" in entry)
    assert max(checkpoint_steps(Path(config.workdir))) == found - 1
