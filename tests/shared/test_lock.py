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
from preprocess.build.lock import locked

HOLD = (
    "import sys, time; from pathlib import Path; from preprocess.build.lock import locked\n"
    "with locked(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


def test_the_other_owner_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "data" / ".build" / "lock"
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    with (
        pytest.raises(PreprocessError, match=rf"\bdata\b.*\bpid {owner.pid} on "),
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
        subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    deadline = time.monotonic() + 60
    while sum(racer.poll() is not None for racer in racers) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = [racer for racer in racers if racer.poll() is None]
    assert len(alive) == 1
    winner = f"pid {alive[0].pid} on ".encode()
    assert all(winner in r.communicate()[1] for r in racers if r.poll() is not None)
    alive[0].kill()
    alive[0].communicate()


def test_the_refused_name_the_winner_in_two_hundred_rounds_beside_a_load(tmp_path: Path) -> None:
    """Neither an empty line, while the winner has not written yet, nor that of the owner before."""
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        race = Path(__file__).with_name("lock_race.py")
        done = subprocess.run(
            [sys.executable, str(race), str(tmp_path), "200", "6"],
            capture_output=True, text=True, timeout=300, cwd=race.parent.parent, env=os.environ | {"PYTHONPATH": "."},
        )  # fmt: skip
    finally:
        for process in load:
            process.kill()
            process.wait()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_owner_that_could_not_write_its_line_is_another_process(tmp_path: Path) -> None:
    with locked(tmp_path / ".build" / "lock"):
        (tmp_path / ".build" / "lock").write_text("")
        with pytest.raises(PreprocessError, match="process"), locked(tmp_path / ".build" / "lock"):
            pass


def test_a_suspended_process_at_the_gate_keeps_nobody_out(tmp_path: Path) -> None:
    """Its lock of the folder itself is waited for, and then gone without."""
    code = "import fcntl, os, sys, time; f = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(f, fcntl.LOCK_EX)\n"
    code += "print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            locked(tmp_path / ".build" / "lock"),
            pytest.raises(PreprocessError, match=f"pid {os.getpid()}"),
            locked(tmp_path / ".build" / "lock"),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
