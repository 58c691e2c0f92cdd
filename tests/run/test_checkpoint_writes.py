"""Checkpoints are written in the background: when that is told, and what happens when it fails."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from training_helpers import abstract_state, meta_of, small_state, tree_equal
from wording import naming

from fluxdit_jax.run import checkpoint
from fluxdit_jax.run.averages import restore_ema
from fluxdit_jax.run.checkpoint import CHECKPOINTS, EMA, SHORT_EMA, Checkpoints, checkpoint_steps

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")


class Disk:
    """The system's `rename`, at which what was written gets its name: it can be held up, or fail.

    Attributes:
      free: set unless it is held up, which ends after some seconds all the same.
      broken: "FOLDER/STEP" whose renaming fails.
    """

    def __init__(self, monkeypatch):
        self.free, self.broken, rename = threading.Event(), set(), os.rename
        self.free.set()

        def held_up(source, target, **options):
            folder, step = Path(target).parts[-2:]
            if folder in (CHECKPOINTS, EMA, SHORT_EMA):
                self.free.wait(10)
                if f"{folder}/{step}" in self.broken:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rename(source, target, **options)

        monkeypatch.setattr(os, "rename", held_up)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture(scope="module")
def states(quick_compile):
    return {step: small_state(step) for step in (1, 2)}


def save(checkpoints, folder, step, states):
    if folder == CHECKPOINTS:
        return checkpoints.save(step, states[step], meta_of(step))
    return checkpoints.save_ema(step, states[step].ema, folder)


def noted(workdir):
    """Steps that the history of a run says are saved."""
    history = workdir / "history.jsonl"
    return [json.loads(line)["saved"] for line in history.read_text().splitlines()] if history.exists() else []


def until(condition, checkpoints):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        checkpoints.poll()
        time.sleep(0.01)


@pytest.mark.parametrize("folder", [CHECKPOINTS, EMA, SHORT_EMA])
def test_saving_and_looking_do_not_wait_for_the_disk(tmp_path, states, disk, folder):
    disk.free.clear()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert save(checkpoints, folder, 1, states)
        checkpoints.poll()
        assert not (tmp_path / folder / "1").exists()
        disk.free.set()
        checkpoints.poll(wait=True)
        assert (tmp_path / folder / "1").is_dir() and checkpoints.failures == 0


def test_the_history_says_once_that_a_checkpoint_is_complete(tmp_path, states, disk):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert save(checkpoints, EMA, 1, states)
        checkpoints.poll(wait=True)
        disk.free.clear()
        save(checkpoints, CHECKPOINTS, 1, states)
        checkpoints.poll()
        assert noted(tmp_path) == []
        disk.free.set()
        until(lambda: noted(tmp_path), checkpoints)
        assert (tmp_path / CHECKPOINTS / "1").is_dir()
        save(checkpoints, CHECKPOINTS, 2, states)
    assert noted(tmp_path) == [1]


def test_closing_waits_for_what_is_being_written_and_says_it_is_complete(tmp_path, states, disk):
    disk.free.clear()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, CHECKPOINTS, 1, states)
        threading.Timer(0.3, disk.free.set).start()
    assert noted(tmp_path) == [1] and (tmp_path / CHECKPOINTS / "1").is_dir()


def test_a_run_directory_that_was_moved_is_not_made_again(tmp_path, states, package_log):
    workdir, moved = tmp_path / "run", tmp_path / "moved"
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.save(1, states[1], meta_of(1))
        checkpoints.poll(wait=True)
        workdir.rename(moved)
        assert not checkpoints.save(2, states[2], meta_of(2)) and not checkpoints.save_ema(2, states[2].ema)
        assert not workdir.exists() and checkpoints.failures == 2 and checkpoints.latest_step() == 1
        assert "moved or removed" in package_log[0] and str(workdir) in package_log[0]
        moved.rename(workdir)
        assert checkpoints.save(2, states[2], meta_of(2))
    assert checkpoint_steps(workdir) == [1, 2]


def test_a_history_that_cannot_be_written_is_told_and_nothing_is_lost(tmp_path, states, package_log):
    (tmp_path / "history.jsonl").mkdir()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, CHECKPOINTS, 1, states)
        checkpoints.poll(wait=True)
        assert checkpoints.failures == 0
        assert checkpoints.restore(abstract_state(states[1]))[1] == meta_of(1)
    (told,) = package_log
    assert told.startswith("WARNING") and str(tmp_path / "history.jsonl") in told


@pytest.mark.parametrize("folder", [CHECKPOINTS, EMA])
def test_a_write_that_fails_is_told_by_its_step_and_the_next_goes_well(tmp_path, states, disk, package_log, folder):
    disk.broken.add(f"{folder}/1")
    disk.free.clear()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert save(checkpoints, folder, 1, states)
        threading.Timer(0.2, disk.free.set).start()
        assert save(checkpoints, folder, 2, states)  # waits for the first
        assert checkpoints.failures == 1
        checkpoints.poll(wait=True)
        assert checkpoints.failures == 1
    (told,) = package_log
    assert re.match(naming("ERROR", f"{folder}/1", f"[Errno {errno.ENOSPC}]", tmp_path), told)
    if folder == EMA:
        assert restore_ema(tmp_path)[0] == 2
        return
    assert noted(tmp_path) == [2]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert tree_equal(checkpoints.restore(abstract_state(states[2])), (states[2], meta_of(2)))


def test_a_checkpoint_that_fails_is_told_before_the_next_is_due(tmp_path, states, disk):
    disk.broken.add("checkpoints/1")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, CHECKPOINTS, 1, states)
        until(lambda: checkpoints.failures, checkpoints)
    assert noted(tmp_path) == []


def test_a_disk_that_stays_full_does_not_fill_the_process_with_threads(tmp_path, states, disk):
    disk.broken.update(("checkpoints/1", "checkpoints/2"))
    threads = []  # a pool may grow by a thread or two; one for each failure is too many
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for failures in range(1, 9):
            save(checkpoints, CHECKPOINTS, 1 + failures % 2, states)
            checkpoints.poll(wait=True)
            assert checkpoints.failures == failures
            threads.append(threading.active_count())
    assert threads[-1] - threads[0] < 4


@pytest.mark.parametrize("processes", [1, 2])
def test_a_write_that_cannot_start_is_a_failure_and_does_not_end_the_run(
    tmp_path, states, package_log, monkeypatch, processes
):
    spec = importlib.util.spec_from_file_location("fluxdit_jax.checkpoint_anew", checkpoint.__file__)
    anew = importlib.util.module_from_spec(spec)  # of a process in which nothing has failed yet
    monkeypatch.setitem(sys.modules, spec.name, anew)
    spec.loader.exec_module(anew)
    assert not anew.leaves_threads()
    (tmp_path / SHORT_EMA).write_text("")
    with anew.Checkpoints(tmp_path, keep=2) as checkpoints:
        being_written = tmp_path / EMA / "9.orbax-checkpoint-tmp"
        being_written.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: processes)
            assert not save(checkpoints, SHORT_EMA, 1, states)
        assert checkpoints.failures == 1 and anew.leaves_threads()
        assert being_written.exists() == (processes > 1)  # perhaps by another process, which has not failed
        (told,) = package_log
        assert re.match(naming("ERROR", "short_ema/1", tmp_path / SHORT_EMA), told)
        assert save(checkpoints, EMA, 1, states)
    step, weights = restore_ema(tmp_path)
    assert step == 1 and tree_equal(weights, jax.tree.map(np.asarray, states[1].ema))
