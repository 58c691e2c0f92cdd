"""`build --engine ray`: the bytes of one process, whatever dies on the way."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import signal
import subprocess
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_fixtures import FLAGS, SMALL, contents, made, small, write_photos
from fork_server import Commands, Process
from wording import naming

from preprocess import PreprocessError
from preprocess.build.build import build
from preprocess.build.encode import Counts
from preprocess.build.journal import Journal
from preprocess.build.options import Options
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


class _Cluster:
    """In place of Ray: actors begin to work at once, and each task takes its time or kills its actor.

    Attributes:
      deadly: what kills: (place, task), None for any.
      given: tasks in the order in which they were given, with their place.
    """

    exceptions = types.SimpleNamespace(RayError=RuntimeError)

    def __init__(self, places: int, deadly: set[tuple[int | None, int | None]]) -> None:
        self.places, self.deadly = places, deadly
        self.given: list[tuple[int, int]] = []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.places}

    def nodes(self) -> list[dict[str, bool]]:
        return [{"Alive": True}] * self.places

    def remote(self, kind: type) -> Any:
        return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=self._actor))

    def _actor(self, output: str, name: str, overrides: dict[str, Any]) -> Any:
        place = int(name.removeprefix("ray-"))

        def make(task: int) -> Callable[[], Any]:
            self.given.append((place, task))
            dies = {(place, task), (place, None), (None, task)} & self.deadly
            error = RuntimeError("the actor died")
            return functools.partial(_raise, error) if dies else lambda: dataclasses.asdict(Counts(pictures=1))

        def method(function: Callable[..., Any]) -> Any:
            return types.SimpleNamespace(remote=function)

        return types.SimpleNamespace(start=method(lambda: lambda: "cpu on here"), make=method(make))

    def wait(self, asked: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return asked[:1], asked[1:]

    def get(self, asked: Callable[[], Any]) -> Any:
        return asked()

    def kill(self, actor: Any) -> None:
        pass


def _raise(error: Exception) -> None:
    raise error


def crew(cluster: _Cluster, tasks: int, folder: Path) -> ray_engine._Crew:
    (folder / WORK).mkdir()
    plan, given = types.SimpleNamespace(images=[1] * tasks), Options("in", str(folder))
    return ray_engine._Crew(cluster, plan, given, Journal(None), cluster.places)


def test_a_place_that_starts_well_and_makes_nothing_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cluster = _Cluster(2, {(2, None)})
    assert crew(cluster, 2, tmp_path).make(range(2)).pictures == 2
    assert sum(place == 2 for place, _ in cluster.given) <= ray_engine.FAILURES
    assert {task for place, task in cluster.given if place == 1} == {0, 1}  # the idle place takes what was given back


def test_a_task_that_kills_every_actor_costs_no_other_task(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cluster = _Cluster(2, {(None, 1)})
    with pytest.raises(PreprocessError, match=naming("all places have failed", 1, 6)):
        crew(cluster, 6, tmp_path).make(range(6))
    made = {task for _, task in cluster.given if task != 1}
    assert made == {0, 2, 3, 4, 5} and len(cluster.given) <= 5 + 2 * ray_engine.FAILURES + 2
    assert capsys.readouterr().out.count("dropped after 3 failures") == 2


def test_a_cluster_that_is_not_there_is_told(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(PreprocessError, match=naming("--ray-address 127.0.0.1:1", "ray start")):
        build(
            small(photos, tmp_path / "data"), engine=functools.partial(ray_engine.run, address="127.0.0.1:1", workers=1)
        )
