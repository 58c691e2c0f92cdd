"""`build --engine ray`: the bytes of one process, whatever dies on the way."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import FLAGS, SMALL, contents, made, small, write_photos
from fork_server import Commands, Process
from wording import naming

from preprocess import PreprocessError
from preprocess.build.build import build
from preprocess.build.units import WORK

pytest.importorskip("ray")
from preprocess.cluster import ray_engine  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, draw_photo: Callable[..., np.ndarray]) -> Path:
    return write_photos(tmp_path_factory.mktemp("ray") / "photos", 60, draw_photo)


@pytest.fixture(scope="module")
def alone(photos: Path) -> dict[str, bytes]:
    output = photos.parent / "data"
    build(small(photos, output))
    return contents(output)


def started(commands: Commands, photos: Path, output: Path, workers: int = 2) -> Process:
    command = ["build", "--input", photos, "--output", output, *SMALL, *FLAGS, "--engine", "ray"]
    return commands.start("preprocess", *command, "--ray-workers", workers, stderr=subprocess.STDOUT)


def processes_of(owner: int, name: str = "ray::_Actor") -> list[int]:
    """Process ids of those below a process whose command begins with a name, or is a program of it."""
    found = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def below(pid: int) -> bool:
        while pid and pid != owner:
            pid = parents.get(pid, 0)
        return pid == owner

    return [int(pid) for pid, _, what in rows
            if (what.startswith(name) or what.split()[0].endswith(name)) and below(int(pid))]  # fmt: skip


def test_two_actors_make_what_one_process_makes(photos: Path, alone, tmp_path: Path, capsys) -> None:
    output = tmp_path / "data"
    result = build(small(photos, output), engine=functools.partial(ray_engine.run, address="", workers=2))
    assert contents(output) == alone and not (output / WORK).exists()
    assert made(result.counts) == (60, 60, 60)
    told = capsys.readouterr().out
    assert told.count("started: place") == 2 and "busy" not in told
    assert not build(small(photos, output), engine=functools.partial(ray_engine.run, address="", workers=2)).changed


def test_actors_and_their_owner_are_killed(photos: Path, alone, tmp_path: Path, commands: Commands) -> None:
    """Tasks are given back; after the owner's death the same command goes on, once actors that outlive it are gone."""
    output = tmp_path / "data"
    owner = started(commands, photos, output)
    while not (actors := processes_of(owner.pid)):
        assert owner.poll() is None
    os.kill(actors[0], signal.SIGKILL)
    log = output / "build_log.jsonl"
    while owner.poll() is None and '"event": "failed"' not in log.read_text():
        time.sleep(0.02)
    assert '"event": "failed"' in log.read_text()
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 120
    while True:
        again = started(commands, photos, output)
        told, _ = again.communicate(180)
        if again.returncode == 0:
            break
        assert "at work" in told and time.monotonic() < deadline, told
        time.sleep(1)
    assert contents(output) == alone


def test_a_place_that_always_fails_is_dropped_and_the_command_goes_on(
    photos: Path, alone, tmp_path: Path, commands: Commands
) -> None:
    output = tmp_path / "data"
    owner = started(commands, photos, output, workers=1)
    while owner.poll() is None:
        for pid in processes_of(owner.pid):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    told, _ = owner.communicate(120)
    assert owner.returncode == 1 and told.count("dropped after 3 failures") == 1, told
    assert re.search(naming("all places have failed", "goes on from there"), told)
    build(small(photos, output))
    assert contents(output) == alone


def test_a_cluster_that_is_not_there_is_told(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(PreprocessError, match=naming("--ray-address 127.0.0.1:1", "ray start")):
        build(
            small(photos, tmp_path / "data"), engine=functools.partial(ray_engine.run, address="127.0.0.1:1", workers=1)
        )
