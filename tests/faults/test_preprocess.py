"""A quick share of the faults of preprocessing; `preprocess_kills.py` beside this file runs them whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import preprocess_disk  # noqa: E402

CODE = "import sys; sys.path.insert(0, sys.argv[1]); import preprocess_kills as k; t = k.{}; print(t.killed, t.lost)"


def tally(call: str) -> tuple[int, str]:
    """Runs a function of preprocess_kills in a process of its own, which forks and so must have no threads."""
    result = subprocess.run(
        [sys.executable, "-c", CODE.format(call), str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    killed, _, lost = result.stdout.strip().partition(" ")
    return int(killed), lost


@pytest.mark.parametrize("kind", ["fresh", "update"])
def test_killed_before_some_changes_of_the_file_system(kind: str) -> None:
    killed, lost = tally(f"kill_at_every_change({kind!r}, step=9, offset=3)")
    assert lost == "[]" and killed >= 5


def test_a_full_disk_is_said_and_survived() -> None:
    try:
        tried, full, wrong = preprocess_disk.fill(step=150)
    except PermissionError as error:
        pytest.skip(str(error))
    assert wrong == [] and tried == full + 1 and full >= 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fresh", "update"])
def test_killed_before_every_change_of_the_file_system(kind: str) -> None:
    killed, lost = tally(f"kill_at_every_change({kind!r}, step=1)")
    assert lost == "[]" and killed >= 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fresh", "update"])
def test_killed_at_random_moments(kind: str) -> None:
    killed, lost = tally(f"kill_at_random({kind!r}, kills=30)")
    assert lost == "[]" and killed == 30
