"""`build --engine ray`: the bytes of one process, whatever dies on the way."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import FLAGS, contents, made, options, write_photos
from fork_server import Commands, Process
from wording import naming

from preprocess import PreprocessError
from preprocess.build.build import build
from preprocess.build.options import Options
from preprocess.build.units import WORK

pytest.importorskip("ray")
from preprocess.cluster import ray_engine  # noqa: E402

pytestmark = pytest.mark.slow
SMALL = ("--resolution", "128", "--modulus", "16", "--holdout", "0.2", "--shard-size", "3", "--batch-size", "2")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, draw_photo: Callable[..., np.ndarray]) -> Path:
    return write_photos(tmp_path_factory.mktemp("ray") / "photos", 60, draw_photo)


@pytest.fixture(scope="module")
def alone(photos: Path) -> dict[str, bytes]:
    output = photos.parent / "data"
    build(small(photos, output))
    return contents(output)


def small(photos: Path, output: Path) -> Options:
    return options(photos, output, shard_size=3, batch_size=2)


def started(commands: Commands, photos: Path, output: Path) -> Process:
    command = ["build", "--input", photos, "--output", output, *SMALL, *FLAGS, "--engine", "ray", "--ray-workers", "2"]
    env = {"RAY_gcs_rpc_server_reconnect_timeout_s": "3"}
    return commands.start("preprocess", *command, stderr=subprocess.STDOUT, env=env)


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


def test_actors_that_are_killed_give_their_tasks_back(photos: Path, alone, tmp_path: Path, commands: Commands) -> None:
    output = tmp_path / "data"
    owner, killed = started(commands, photos, output), set()
    while owner.poll() is None and len(killed) < 4:
        for pid in processes_of(owner.pid):
            if pid not in killed and len(killed) < 4 and len(list((output / WORK).glob("*.parquet"))) > 2 * len(killed):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(0.05)
    told, _ = owner.communicate(120)
    assert owner.returncode == 0 and killed and told.count("failed: place") >= len(killed), told
    assert contents(output) == alone


def test_a_place_that_always_fails_is_dropped_and_the_command_goes_on(
    photos: Path, alone, tmp_path: Path, commands: Commands
) -> None:
    output = tmp_path / "data"
    owner = started(commands, photos, output)
    while owner.poll() is None:
        for pid in processes_of(owner.pid):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    told, _ = owner.communicate(120)
    assert owner.returncode == 1 and told.count("dropped after 3 failures") == 2, told
    assert naming("all places have failed", "goes on from there") and "all places have failed" in told
    build(small(photos, output))
    assert contents(output) == alone


@pytest.mark.parametrize("what", ["owner", "head"])
def test_the_same_command_goes_on_after_the_death_of(
    what: str, photos: Path, alone, tmp_path: Path, commands: Commands
) -> None:
    """It may be refused for as long as actors outlive their owner."""
    output = tmp_path / "data"
    owner = started(commands, photos, output)
    while not processes_of(owner.pid):  # actors
        assert owner.poll() is None
    (head,) = processes_of(owner.pid, "gcs_server")
    os.kill(owner.pid if what == "owner" else head, signal.SIGKILL)
    told, _ = owner.communicate(180)
    assert owner.returncode == (-9 if what == "owner" else 1), told
    assert "Traceback" not in told
    deadline = time.monotonic() + 120
    while True:
        again = started(commands, photos, output)
        told, _ = again.communicate(180)
        if again.returncode == 0:
            break
        assert "at work" in told and time.monotonic() < deadline, told
        time.sleep(1)
    assert contents(output) == alone


def test_a_cluster_that_is_not_there_is_told(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(PreprocessError, match=naming("--ray-address 127.0.0.1:1", "ray start")):
        build(
            small(photos, tmp_path / "data"), engine=functools.partial(ray_engine.run, address="127.0.0.1:1", workers=1)
        )
