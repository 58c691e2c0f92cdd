"""Going on from a step: what is beyond it is set aside and said, and a run whose checkpoints are gone is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from training_helpers import tiny_config, tree_equal, write_config, write_dataset
from wording import lines_naming, naming

from fluxdit_jax.dataset.manifest import MANIFEST
from fluxdit_jax.run.averages import ema_steps, restore_ema
from fluxdit_jax.run.checkpoint import EMA, SHORT_EMA, Checkpoints, ema_digest
from fluxdit_jax.run.history import append, has_saved
from fluxdit_jax.run.metrics import read_metrics
from fluxdit_jax.run.run_directory import RunError
from fluxdit_jax.train import train

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")


def make_config(dataset, workdir):
    """EMA weights at every second step, a checkpoint at every step, all of them kept."""
    c = tiny_config(dataset, workdir)
    c.checkpoint.ema_every, c.checkpoint.minutes, c.checkpoint.keep = 2, 1e-9, 20
    c.ema.short_decay = 0.3
    return c


@pytest.fixture
def config(tiny_dataset, tmp_path):
    return make_config(tiny_dataset, tmp_path / "run")


@pytest.fixture(scope="module")
def finished(quick_compile, tiny_dataset, tmp_path_factory):
    """A run of 8 steps; read only."""
    c = make_config(tiny_dataset, tmp_path_factory.mktemp("finished") / "run")
    assert train(c) == 0
    return Path(c.workdir)


@pytest.fixture
def workdir(finished, config):
    return Path(shutil.copytree(finished, config.workdir))


def run(config, **changes):
    c = config.copy_and_resolve_references()
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    assert train(c) == 0


def history(workdir):
    return [json.loads(line) for line in (workdir / "history.jsonl").read_text().splitlines()]


def starts(workdir):
    return [line for line in history(workdir) if "step" in line]


def logged(path):
    return [line["step"] for line in read_metrics(path / "metrics.jsonl") if "loss" in line]


def go_back_to(workdir, step):
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------ beyond the step


def write_report(workdir, step, digest=None):
    (workdir / "validation").mkdir()
    weights = {"ema_step": step} | ({"digest": digest} if digest else {})
    text = json.dumps({"passed": True, "weights": weights})
    (workdir / "validation" / "report.json").write_text(text)


def test_going_back_with_another_rate_leaves_nothing_of_the_abandoned_steps(config, workdir, finished):
    go_back_to(workdir, 4)
    (workdir / "samples").mkdir()
    for step in (4, 6, 8):
        (workdir / "samples" / f"step_{step:07d}.png").write_bytes(b"picture")
    (workdir / "samples" / "mine.png").write_bytes(b"picture")
    write_report(workdir, 8)
    run(config, optim__lr=1e-3, resume__allow_changes=True, train__steps=7)

    # what is there is of the new branch, and complete
    for folder in (EMA, SHORT_EMA):
        assert ema_steps(workdir, folder) == [2, 4, 6, 7]
        for step in (2, 4):
            assert tree_equal(restore_ema(workdir, step, folder=folder), restore_ema(finished, step, folder=folder))
        newest = restore_ema(workdir, folder=folder)
        assert newest[0] == 7
        assert not tree_equal(restore_ema(workdir, 6, folder=folder), restore_ema(finished, 6, folder=folder))
    assert logged(workdir) == list(range(1, 8))

    # what was there is whole, in a folder that log and history name
    aside = workdir / "abandoned" / "1"
    for folder in (EMA, SHORT_EMA):
        assert ema_steps(aside, folder) == [6, 8]
        assert contents(aside / folder) == {
            name: bits for name, bits in contents(finished / folder).items() if name.split("/")[0] in ("6", "8")
        }
    assert sorted(path.name for path in (aside / "samples").iterdir()) == [
        "step_0000006.png",
        "step_0000008.png",
    ]
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == ["mine.png", "step_0000004.png"]
    assert (aside / "validation" / "report.json").exists() and not (workdir / "validation").exists()
    assert logged(aside) == [5, 6, 7, 8]
    (line,) = [line for line in (workdir / "train.log").read_text().splitlines() if str(aside) in line]
    for word in ("step 4", "checkpoints/4", "ema/6", "ema/8"):
        assert word in line
    found = starts(workdir)[-1]
    assert (found["step"], found["from"], found["set_aside"]["folder"]) == (4, "checkpoints/4", "abandoned/1")
    for name in (
        "ema/6",
        "short_ema/8",
        "samples/step_0000008.png",
        "validation",
        "metrics.jsonl from step 5 on",
    ):
        assert name in found["set_aside"]["what"]
    # what was accepted stands there too, and so does what needs no permission
    assert found["changes"] == ["optim.lr: 0.01 -> 0.001"]
    assert "train.steps: 8 -> 7" in found["other_changes"]
    log = (workdir / "train.log").read_text()
    assert lines_naming(log, "config.resume.allow_changes", 4, "optim.lr: 0.01 -> 0.001")

    # a second time, from within what is there now: nothing is overwritten
    go_back_to(workdir, 5)
    run(config, optim__lr=1e-3)
    assert ema_steps(workdir / "abandoned" / "2") == [6, 7] and ema_steps(aside) == [6, 8]
    assert not tree_equal(restore_ema(workdir, 8), restore_ema(finished, 8))
    assert starts(workdir)[-1]["changes"] == []


def test_going_back_without_a_change_gives_the_same_bits_again(config, workdir, finished):
    go_back_to(workdir, 4)
    run(config)
    assert contents(workdir / "abandoned" / "1" / "ema").keys()
    for step in (2, 4, 6, 8):
        assert tree_equal(restore_ema(workdir, step), restore_ema(finished, step))


def test_weights_of_the_same_step_but_of_another_run_are_replaced(config, workdir, finished, tmp_path):
    """A checkpoint that was copied in: ema/4 and what was measured and drawn at step 4 are not of its weights."""
    other = config.copy_and_resolve_references()
    other.workdir, other.optim.lr = str(tmp_path / "other"), 3e-3
    assert train(other) == 0
    shutil.rmtree(workdir / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "4", workdir / "checkpoints" / "4")
    write_report(workdir, 4, ema_digest(workdir, 4))
    (workdir / "samples").mkdir()
    (workdir / "samples" / "step_0000004.png").write_bytes(b"picture")
    run(config, train__steps=4)
    for folder in (EMA, SHORT_EMA):
        assert tree_equal(restore_ema(workdir, folder=folder), restore_ema(tmp_path / "other", 4, folder=folder))
        assert tree_equal(
            restore_ema(workdir / "abandoned" / "1", 4, folder=folder),
            restore_ema(finished, 4, folder=folder),
        )
    assert not (workdir / "validation").exists() and not list((workdir / "samples").iterdir())


def test_a_report_of_the_very_weights_stays(config, workdir):
    go_back_to(workdir, 4)
    write_report(workdir, 4, ema_digest(workdir, 4))
    run(config, train__steps=4)
    assert (workdir / "validation" / "report.json").exists()


@pytest.mark.parametrize("folder", [EMA, SHORT_EMA])
def test_weights_that_are_due_and_missing_are_written_at_the_start(config, workdir, finished, folder):
    shutil.rmtree(workdir / folder / "8")
    run(config)
    assert tree_equal(restore_ema(workdir, folder=folder), restore_ema(finished, 8, folder=folder))
    assert not (workdir / "abandoned").exists()


def test_another_data_set_that_was_accepted_stands_in_the_history(config, workdir, tmp_path):
    manifest = write_dataset(tmp_path / "other", seed=3)
    same = dataclasses.replace(manifest, lengths={"text": 5})
    (tmp_path / "other" / MANIFEST).write_text(same.to_json())
    run(config, data__path=str(tmp_path / "other"), resume__allow_changes=True, data__threads=1)
    (change,) = starts(workdir)[-1]["changes"]
    assert change.startswith("data.path") and "dataset.json" in change
    assert "data.threads: 2 -> 1" in starts(workdir)[-1]["other_changes"]
    assert change in (workdir / "train.log").read_text()


def test_a_new_run_and_one_that_goes_on_leave_nothing_behind(config, finished, tmp_path):
    (first,) = starts(finished)
    assert (first["step"], first["from"], first["changes"], first["set_aside"]) == (0, "new", [], None)
    assert [line["saved"] for line in history(finished) if "saved" in line] == [1]
    run(config, train__steps=5)
    run(config)
    assert not (Path(config.workdir) / "abandoned").exists()
    assert [line["step"] for line in starts(Path(config.workdir))] == [0, 5]
    assert tree_equal(restore_ema(Path(config.workdir), 8), restore_ema(finished, 8))


def test_other_numbers_under_the_same_step_are_never_kept_without_a_word(workdir, finished):
    from fluxdit_jax.run.checkpoint import CheckpointError

    ema = restore_ema(finished, 6)[1]
    with Checkpoints(workdir, 2) as checkpoints:
        assert checkpoints.save_ema(6, ema)
        with pytest.raises(CheckpointError, match=naming(str(workdir / "ema" / "8"))):
            checkpoints.save_ema(8, ema)
    assert tree_equal(restore_ema(workdir, 8), restore_ema(finished, 8))


# ------------------------------------------------------------------------------------------------ killed


def wait_for(process, path):
    while process.poll() is None and not path.exists():
        time.sleep(0.005)


@pytest.mark.slow
def test_weights_beyond_the_last_checkpoint_are_computed_again(config, train_command, tmp_path):
    config.checkpoint.minutes = 60.0
    config.train.steps = 4
    file, workdir = tmp_path / "c.py", tmp_path / "run"
    run(config)
    config.train.steps = 100_000
    with train_command.start(config=write_config(file, config)) as process:
        wait_for(process, workdir / "ema" / "12")
        process.kill()
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4"]
    config.train.steps = 9
    done = train_command.run(config=write_config(file, config))
    assert done.returncode == 0 and "abandoned/1: ema/6" in done.stderr
    assert ema_steps(workdir) == [2, 4, 6, 8, 9] and ema_steps(workdir / "abandoned" / "1")[:4] == [
        6,
        8,
        10,
        12,
    ]
    for step in (6, 8):  # nothing was changed
        assert tree_equal(restore_ema(workdir, step), restore_ema(workdir / "abandoned" / "1", step))


@pytest.mark.slow
def test_killed_before_its_first_checkpoint_the_same_command_starts_again(config, train_command, tmp_path):
    config.checkpoint.minutes = 60.0
    config.train.steps = 100_000
    file, workdir = tmp_path / "c.py", tmp_path / "run"
    with train_command.start(config=write_config(file, config)) as process:
        wait_for(process, workdir / "ema" / "4")
        process.kill()
    assert not list((workdir / "checkpoints").iterdir()) and logged(workdir)[0] == 1
    run(config, train__steps=8)
    assert lines_naming((workdir / "train.log").read_text(), 0, "(new)", "abandoned/1")
    assert ema_steps(workdir / "abandoned" / "1")[:2] == [2, 4] and logged(workdir / "abandoned" / "1")[0] == 1
    assert logged(workdir) == list(range(1, 9)) and ema_steps(workdir) == [2, 4, 6, 8]


# ------------------------------------------------------------------------------------------------ checkpoints gone


def remove(workdir):
    shutil.rmtree(workdir / "checkpoints")


def empty(workdir):
    remove(workdir)
    (workdir / "checkpoints").mkdir()


@pytest.mark.parametrize(
    ("source", "saved"), [("checkpoints/6", True), ("checkpoints/base", False), ("nothing", False)]
)
def test_a_run_begun_with_another_named_like_a_checkpoint_has_saved_nothing(tmp_path, source, saved):
    append(tmp_path, {"step": 0, "from": source})
    assert has_saved(tmp_path) is saved


def only_history(workdir):
    """Nothing but the history tells that there was a checkpoint."""
    empty(workdir)
    for name in (EMA, SHORT_EMA, "tensorboard"):
        shutil.rmtree(workdir / name)
    (workdir / "metrics.jsonl").unlink()


def only_damaged(workdir):
    empty(workdir)
    (workdir / "damaged" / "8").mkdir(parents=True)
    (workdir / "history.jsonl").unlink()


def of_before(workdir, forget=("history.jsonl",)):
    """As a version without a history left it."""
    empty(workdir)
    for name in forget:
        (workdir / name).unlink()


def only_curves(workdir):
    remove(workdir)
    for name in (EMA, SHORT_EMA):
        shutil.rmtree(workdir / name)
    for name in ("metrics.jsonl", "history.jsonl", "config.json"):
        (workdir / name).unlink()


def damaged_history(workdir):
    empty(workdir)
    for name in (EMA, SHORT_EMA):
        shutil.rmtree(workdir / name)
    (workdir / "history.jsonl").write_bytes(b'{"time": "2026", "step": 0, "fr\xffm": "new"}\n')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove, ["missing", "ema/8", "metrics.jsonl", "step 8", "tensorboard"]),
        (empty, ["no checkpoint", "ema/8"]),
        (only_history, ["history.jsonl"]),
        (only_damaged, ["damaged/8"]),
        (of_before, ["ema/8"]),
        (lambda w: of_before(w, ("history.jsonl", "config.json")), ["ema/8"]),
        (only_curves, ["missing", "tensorboard"]),
        (damaged_history, ["metrics.jsonl", "step 8"]),
    ],
    ids=["missing", "empty", "history", "damaged", "before", "no config", "curves", "damaged history"],
)
def test_a_run_without_its_checkpoints_is_refused_and_left_unchanged(config, workdir, damage, words):
    damage(workdir)
    before = contents(workdir)
    with pytest.raises(RunError) as refusal:
        train(config)
    ways = [str(workdir / "checkpoints"), "backup", f"--config.resume.from_run={workdir}", "--config.workdir"]
    for word in words + ways:
        assert word in str(refusal.value)
    after = contents(workdir)
    for found in (before, after):
        found.pop("train.log"), found.pop(".lock", None)
    assert after == before


def test_the_ways_that_the_refusal_names_lead_on(config, workdir, finished, tmp_path):
    remove(workdir)
    with pytest.raises(RunError):
        train(config)
    run(config, workdir=str(tmp_path / "new"), resume__from_run=str(workdir), train__steps=1)
    assert starts(tmp_path / "new")[0]["from"] == str(workdir)
    shutil.copytree(finished / "checkpoints", workdir / "checkpoints")
    run(config)
    assert tree_equal(restore_ema(workdir), restore_ema(finished))


def test_a_start_that_came_to_no_step_may_be_made_again(config, workdir, finished):
    """Killed after its configuration was written: no checkpoint, no step, nothing to lose."""
    for name in (EMA, SHORT_EMA, "tensorboard", "checkpoints"):
        shutil.rmtree(workdir / name)
    (workdir / "metrics.jsonl").write_text("")
    line = (workdir / "history.jsonl").read_text().splitlines()[0]
    (workdir / "history.jsonl").write_text(line + "\n")
    run(config)
    np.testing.assert_equal(logged(workdir), logged(finished))


@pytest.mark.slow
def test_the_command_refuses_in_one_line(config, workdir, train_command, tmp_path):
    remove(workdir)
    done = train_command.run(config=write_config(tmp_path / "c.py", config))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and str(workdir / "checkpoints") in last and "from_run" in last
    assert logged(workdir) == list(range(1, 9))
