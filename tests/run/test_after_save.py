"""config.checkpoint.after: real commands, after real saves."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_helpers import tiny_config
from wording import naming

from fluxdit_jax.config import ConfigError
from fluxdit_jax.run.after_save import OUTPUT, AfterSave
from fluxdit_jax.run.averages import ema_steps, restore_ema
from fluxdit_jax.run.checkpoint import checkpoint_steps
from fluxdit_jax.train import train

pytest_plugins = ("training_fixtures",)


@pytest.fixture
def told(caplog, monkeypatch):
    """The package's log, which `train` lets no other see."""
    monkeypatch.setattr(logging.getLogger("fluxdit_jax"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def python(code: str) -> str:
    return f'{sys.executable} -c "{code}" {{checkpoint}} {{workdir}}'


NOTE = "import sys,time; time.sleep(%g); open(sys.argv[2] + '/seen', 'a').write(sys.argv[1][-1])"


def wait_for(path: Path, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.02)


def save_and_die(workdir: Path, seconds: int, minutes: float) -> None:
    """A process that is killed while the command after its save, which takes so many seconds, runs."""
    code = (
        "from fluxdit_jax.run.after_save import AfterSave; from pathlib import Path; import time\n"
        f"a = AfterSave({python(NOTE % seconds)!r}, Path({str(workdir)!r}), {minutes})\n"
        "a.saved(Path('1'))\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_for(workdir / OUTPUT)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_one_runs_at_a_time_and_of_those_that_wait_the_newest(tmp_path, told):
    workdir = tmp_path / "a run"  # a path with a space is one word
    workdir.mkdir()
    with AfterSave(python(NOTE % 0.5), workdir, 1.0) as after:
        started = time.monotonic()
        for step in range(1, 6):
            after.saved(workdir / str(step))
            time.sleep(0.05)
        assert time.monotonic() - started < 0.45  # training goes on
        wait_for(workdir / "seen")
    assert (workdir / "seen").read_text() == "15"
    assert "waiting" in told.text and "done for checkpoint 5" in told.text


def test_at_the_end_an_earlier_one_is_stopped_for_the_last(tmp_path, told):
    with AfterSave(python(NOTE % 0.5).replace("0.5", "30 * (sys.argv[1][-1] == '1')"), tmp_path, 1.0) as after:
        after.saved(tmp_path / "1")
        wait_for(tmp_path / OUTPUT)
        time.sleep(0.3)
        after.saved(tmp_path / "2")
        started = time.monotonic()
    assert time.monotonic() - started < 10
    assert (tmp_path / "seen").read_text() == "2"
    assert "checkpoint 1 was stopped" in told.text and "done for checkpoint 2" in told.text


def test_that_of_a_killed_run_ends_at_its_time(tmp_path, told):
    """Nobody is left to kill it; then the next save's would wait for ever."""
    save_and_die(tmp_path, 600, 0.03)
    with AfterSave(python(NOTE % 0), tmp_path, 1.0) as after:
        after.saved(tmp_path / "2")
    assert (tmp_path / "seen").read_text() == "2" and "done for checkpoint 2" in told.text


def test_one_that_takes_too_long_is_killed_with_what_it_started(tmp_path, told):
    code = (
        "import subprocess,sys,time; p=subprocess.Popen(['sleep','60']); "
        "open(sys.argv[2] + '/pid', 'w').write(str(p.pid)); print('begun', flush=True); time.sleep(60)"
    )
    with AfterSave(python(code), tmp_path, 0.02) as after:
        after.saved(tmp_path / "7")
    assert "killed after 0.02 minutes" in told.text and "begun" in told.text and "checkpoint.after_minutes" in told.text
    time.sleep(0.2)
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_one_that_fails_is_named_with_its_last_words_and_the_next_is_tried(tmp_path, told):
    code = "import sys; print('no space at the other end'); sys.exit(5 * (sys.argv[1][-1] == '7'))"
    with AfterSave(python(code), tmp_path, 1.0) as after:
        after.saved(tmp_path / "7")
        wait_for(tmp_path / OUTPUT)
        while "exit code" not in told.text:
            time.sleep(0.02)
        after.saved(tmp_path / "8")
    assert "exit code 5" in told.text and "no space at the other end" in told.text and OUTPUT in told.text
    assert "done for checkpoint 8" in told.text


def test_that_of_a_killed_run_is_waited_for(tmp_path, told):
    save_and_die(tmp_path, 2, 1.0)
    with AfterSave(python(NOTE % 0), tmp_path, 1.0) as after:
        after.saved(tmp_path / "2")
    assert (tmp_path / "seen").read_text() == "12"


@pytest.mark.parametrize(
    "command", ["cp '{checkpoint}", "cp {step} x", "cp {} x", "cp {checkpoint", "cp {checkpoint.x}"]
)
def test_a_command_that_cannot_be_read_is_refused(tmp_path, command):
    with pytest.raises(ConfigError, match=naming("config.checkpoint.after", command, "bash -c")):
        AfterSave(command, tmp_path, 1.0)


def test_what_failed_for_the_last_checkpoint_is_done_at_the_next_start(tiny_dataset, tmp_path):
    c = tiny_config(tiny_dataset, tmp_path / "run")
    c.train.steps, c.checkpoint.after = 3, "false"
    assert train(c) == 1
    assert "has not succeeded for the last checkpoint" in (tmp_path / "run" / "train.log").read_text()
    copied = tmp_path / "copied"
    for again in (True, False):  # once is enough
        c.checkpoint.after = f"touch {copied}"
        assert train(c) == 0
        assert copied.exists() is again
        copied.unlink(missing_ok=True)


def test_a_program_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=naming("config.checkpoint.after", "'not-a-program-here'")):
        AfterSave("not-a-program-here {checkpoint}", tmp_path, 1.0)
    own = tmp_path / "own"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    AfterSave("{workdir}/own {checkpoint}", tmp_path, 1.0)


def test_a_run_is_copied_after_each_save_and_the_copy_is_restored(tiny_dataset, tmp_path):
    c = tiny_config(tiny_dataset, tmp_path / "run")
    c.train.steps, c.checkpoint.ema_every, c.checkpoint.minutes = 12, 4, 0.0001
    c.checkpoint.after = "cp -r {checkpoint} {workdir}/ema " + str(tmp_path / "copies")
    (tmp_path / "copies").mkdir()
    assert train(c) == 0
    assert 12 in checkpoint_steps(tmp_path / "run")
    copy = tmp_path / "again"
    (copy / "checkpoints").mkdir(parents=True)
    (tmp_path / "copies" / "12").rename(copy / "checkpoints" / "12")
    (tmp_path / "copies" / "ema").rename(copy / "ema")
    assert ema_steps(copy) == ema_steps(tmp_path / "run")
    (_, ours), (_, theirs) = restore_ema(tmp_path / "run", 12), restore_ema(copy, 12)
    np.testing.assert_array_equal(ours["out"]["kernel"], theirs["out"]["kernel"])
    told = (tmp_path / "run" / "train.log").read_text()
    assert "done for checkpoint 12" in told and "failed" not in told
