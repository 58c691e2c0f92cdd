"""One owner at a time, and no stale locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preprocess import PreprocessError
from preprocess.lock import locked

HOLD = (
    "import sys, time; from pathlib import Path; from preprocess.lock import locked\n"
    "with locked(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


def test_the_other_owner_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "data" / ".build" / "lock"
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    with (
        pytest.raises(PreprocessError, match=f"data is being written by pid {owner.pid} on host "),
        locked(path),
    ):
        pass
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert path.read_text().startswith(f"pid {owner.pid} on host ")
    with locked(path):
        assert path.read_text().startswith(f"pid {os.getpid()} on host ")
    with locked(path):
        pass


def test_a_lock_whose_file_was_removed_is_taken_on_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / ".build" / "lock"
    with locked(path):
        path.unlink()
        with locked(path):
            inner = path.stat().st_ino
        assert path.stat().st_ino == inner


def test_many_at_once_one_wins(tmp_path: Path) -> None:
    path = tmp_path / ".build" / "lock"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(4)
    ]
    deadline = time.monotonic() + 60
    while sum(racer.poll() is not None for racer in racers) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = [racer for racer in racers if racer.poll() is None]
    assert len(alive) == 1
    assert all(b"is being written by pid" in r.communicate()[1] for r in racers if r.poll() is not None)
    alive[0].kill()
    alive[0].communicate()
