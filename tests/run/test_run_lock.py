"""Two processes never share a run directory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_helpers import REPOSITORY

from fluxdit_jax.run.run_directory import RunError, RunLock


def owner(workdir):
    """A process that holds the lock until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from fluxdit_jax.run.run_directory import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(workdir)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def test_a_second_process_is_refused_until_the_first_is_dead(workdir):
    process = owner(workdir)
    try:
        with pytest.raises(RunError) as refusal:
            RunLock(workdir)
        for word in (f"pid {process.pid} on {socket.gethostname()}", str(workdir), "workdir"):
            assert word in str(refusal.value)
        assert f"pid {process.pid}" in (workdir / ".lock").read_text()  # the refused one did not touch it
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    lock = RunLock(workdir)
    assert (workdir / ".lock").read_text().startswith(f"pid {os.getpid()} on ")
    lock.release()


def test_a_released_lock_is_free_in_the_same_process(workdir):
    first = RunLock(workdir)
    with pytest.raises(RunError, match=f"pid {os.getpid()}"):
        RunLock(workdir)
    first.release()
    RunLock(workdir).release()


def test_the_lock_is_not_inherited_by_children(workdir):
    """A reader process that outlives a killed run must not hold its directory."""
    lock = RunLock(workdir)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        lock.release()
        time.sleep(0.1)
        again = RunLock(workdir)
        assert child.poll() is None  # it was there to hold it
        again.release()
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("text", [f"pid {os.getppid()} on {socket.gethostname()}", "pid 1 on elsewhere", "", "\0\xff"])
def test_what_a_dead_owner_left_stops_nobody(workdir, text):
    """A process number that is another's by now, another host, nothing, rubbish: the kernel holds the lock."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / ".lock").write_text(text, encoding="latin-1")
    lock = RunLock(workdir)
    assert (workdir / ".lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}"
    lock.release()


def test_a_temporary_lock_is_gone_and_a_removed_one_locks_nobody_out(workdir):
    lock = RunLock(workdir, "work/lock", temporary=True)
    (workdir / "work" / "lock").unlink()
    RunLock(workdir, "work/lock", temporary=True).release()
    lock.release()
    lock.release()
    assert list((workdir / "work").iterdir()) == []


@pytest.mark.parametrize("path", ["/dev/null", "/proc/none"])
def test_a_workdir_that_cannot_be_made_is_a_run_error(path):
    with pytest.raises(RunError, match=f"{path}\\b"):
        RunLock(Path(path))
