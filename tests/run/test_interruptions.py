"""Real processes, really killed: the losses and the EMA are those of a run that was never interrupted.

A few moments only, on the command as users start it; `stress/` goes through all of them. FLUXDIT_KILLS sets how often
`kill -9` strikes.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from training_helpers import tiny_config, tree_equal, write_config
from wording import lines_naming

from fluxdit_jax.run.averages import restore_ema
from fluxdit_jax.run.metrics import read_metrics

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("FLUXDIT_KILLS", "2"))


@pytest.fixture(scope="module")
def config(tiny_dataset, tmp_path_factory):
    """20 steps of two micro-batches; a checkpoint after every one, so that kills strike while one is written."""
    c = tiny_config(tiny_dataset, tmp_path_factory.mktemp("runs") / "whole")
    c.train.steps, c.log.every = 20, 2
    c.flow.drop = "all 0.1, text 0.2, vision 0.2"
    c.checkpoint.minutes, c.checkpoint.ema_every = 1e-9, 5
    return c


@pytest.fixture(scope="module")
def whole(config, train_command, tmp_path_factory):
    done = train_command.run(config=write_config(tmp_path_factory.mktemp("config") / "c.py", config))
    assert done.returncode == 0, done.stderr
    assert "done: 20 steps" in done.stderr
    return Path(config.workdir)


def losses(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    found = [
        {name: value for name, value in line.items() if name.startswith(("step", "loss", "gradient_norm"))}
        for line in lines
        if "loss" in line
    ]
    assert len({line["step"] for line in found}) == len(found)  # each step once
    return found


def assert_same_outcome(workdir, whole):
    assert losses(workdir) == losses(whole)
    for step in range(5, 21, 5):
        assert tree_equal(restore_ema(workdir, step), restore_ema(whole, step)), step


def test_kill_9_at_random_moments_changes_nothing(config, whole, train_command, tmp_path):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    config = config.copy_and_resolve_references()
    config.workdir = str(tmp_path / "killed")
    file, log = write_config(tmp_path / "c.py", config), tmp_path / "killed" / "train.log"
    killed = 0
    for attempt in range(4 * KILLS + 4):
        before = log.read_text().count("step ") if log.exists() else 0
        with train_command.start(config=file) as process:
            if killed < KILLS:
                if rng.random() < 0.8:  # else anywhere from the first import on
                    while process.poll() is None and not (log.exists() and log.read_text().count("step ") > before):
                        time.sleep(0.01)
                time.sleep(rng.uniform(0, 3))
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    killed += 1
            _, err = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, (seed, attempt, err[-2000:])
    assert process.returncode == 0
    assert killed >= min(KILLS, 1), (seed, killed)
    assert_same_outcome(tmp_path / "killed", whole)


def test_a_signal_saves_and_says_how_to_go_on(config, whole, train_command, tmp_path):
    number = signal.SIGTERM
    config = config.copy_and_resolve_references()
    config.workdir, config.checkpoint.minutes = str(tmp_path / "stopped"), 60.0
    file, log = write_config(tmp_path / "c.py", config), tmp_path / "stopped" / "metrics.jsonl"
    with train_command.start(config=file) as process:
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 4):
            time.sleep(0.005)
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == 128 + number, err
    last = err.strip().splitlines()[-1]
    assert lines_naming(last, f"(signal {int(number)})", "saved") and "not saved" not in last
    assert signal.Signals(number).name in err
    assert "Traceback" not in err
    done = train_command.run(config=file)
    assert done.returncode == 0, done.stderr
    assert_same_outcome(tmp_path / "stopped", whole)
