"""`build --engine ray`: the shards of a build made by Ray actors, one for each device of a machine or of a cluster.

    owner: plans, stores the plan, gives tasks ─► actor on GPU 0 of host A ─┐
                      ▲                        ─► actor on GPU 1 of host A ─┼─► OUTPUT/.build, a shared folder
                      └── "made", "failed" ────── actor on GPU 0 of host B ─┘
    owner: publishes

A task whose actor fails or dies is given to the next one that is free, and a new actor is started; a place that has
failed three times in a row is dropped and named. Actors are sent names and numbers; data they read from and write to
files.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from preprocess import PreprocessError
from preprocess.build.build import Prepared
from preprocess.build.encode import Counts
from preprocess.build.journal import Journal
from preprocess.build.options import Options
from preprocess.build.stored_plan import StoredPlan
from preprocess.build.units import WORK
from preprocess.build.workers import note_device, worker_locked
from preprocess.cluster.worker import Worker, store_plan

_MODE = "RAY_AUTH_MODE"
_PATIENCE = 60.0  # seconds until a process that was killed must be gone
FAILURES = 3  # in a row, after which a place is dropped


@dataclasses.dataclass
class _Place:
    """Where an actor runs: a GPU, or some cores.

    Attributes:
      actor: its handle. device: what it said of itself; "" before. task: what it is making, None while it starts.
      failures: since it last made something.
    """

    number: int
    actor: Any
    device: str = ""
    task: int | None = None
    failures: int = 0

    def __str__(self) -> str:
        return f"place {self.number} ({self.device or 'not started'})"


def run(prepared: Prepared, journal: Journal, address: str, workers: int) -> Counts:
    """Makes everything that a build has to encode.

    Args:
      address: of a running Ray cluster, "auto" for the one of this machine; "" starts one on this machine alone.
      workers: actors at once; 0: one for each GPU, without GPUs one for each host.

    Raises:
      PreprocessError: Ray is not installed or not reached, an encoder differs there, the disk is full, or all places
        have failed.
    """
    _require_reachable(address)
    with _token_shown(address):
        ray = _connect(address)
        try:
            plan = store_plan(prepared)
            return _Crew(ray, plan, prepared.options, journal, workers).make(range(len(plan.images)))
        finally:
            ray.shutdown()


def _require_reachable(address: str) -> None:
    """Raises `PreprocessError` if nothing listens at "host:port": Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "//" not in address:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError, OverflowError) as error:
            raise _not_reached(address, error) from error


def _not_reached(address: str, error: Exception) -> PreprocessError:
    return PreprocessError(
        f"--ray-address {address}: {error}; start one with `ray start --head`. If it asks for a token, copy "
        "~/.ray/auth_token of its machine to this one"
    )


@contextlib.contextmanager
def _token_shown(address: str) -> Iterator[None]:
    """Has Ray show this machine's token to a cluster that asks for one.

    A cluster asks if its machine had one when it began; Ray shows it only if told to, and actors die on a cluster that
    does not ask. A machine gets one from the first build without an address.
    """
    wanted = _MODE not in os.environ and (Path.home() / ".ray" / "auth_token").exists() and _asks_for_token(address)
    if wanted:
        os.environ[_MODE] = "token"
    try:
        yield
    finally:
        if wanted:
            del os.environ[_MODE]


def _asks_for_token(address: str) -> bool:
    """What a process finds that connects without one; Ray itself would try again for 20 s."""
    if not address:
        return False
    code = f"import ray; ray.init(address={address!r}, include_dashboard=False, log_to_driver=False)"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {_MODE: "disabled"}, stderr=subprocess.PIPE, text=True
    ) as probe:
        try:
            return any("InvalidAuthToken" in line for line in probe.stderr or ())
        finally:
            probe.kill()


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise PreprocessError(
            '--engine ray needs Ray: pip install -c requirements.txt -e ".[cluster]", on every machine'
        ) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _not_reached(address, error) from error
    return ray


class _Actor:
    """Runs in a process of Ray's."""

    def __init__(self, output: str, name: str, overrides: dict[str, Any]):
        self._asked = output, name, overrides

    def start(self) -> str:
        """Takes its place as a worker for as long as its process lives; the one before may take a while to die.

        Not in `__init__`, of whose errors Ray does not give the cause.

        Returns:
          Its device.
        """
        import ray

        output, name, overrides = self._asked
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self._place = contextlib.ExitStack()
                self._place.enter_context(worker_locked(Path(output) / WORK, name, of_build=True))
                break
            except PreprocessError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        plan = StoredPlan.load(Path(output))
        if plan is None:
            raise PreprocessError(f"{output}: its plan is not seen here; it must be a folder that all machines share")
        options = dataclasses.replace(plan.options, **overrides).checked()
        self._worker = Worker(plan, options, Journal(None))
        gpus = ",".join(map(str, ray.get_gpu_ids()))
        return f"{self._worker.device}{f', GPU {gpus}' if gpus else ''} on {os.uname().nodename}"

    def make(self, number: int) -> dict[str, Any]:
        return dataclasses.asdict(self._worker.make([number]))


class _Crew:
    """The actors of a build."""

    def __init__(self, ray: Any, plan: StoredPlan, options: Options, journal: Journal, workers: int):
        self._ray, self._plan, self._options, self._journal = ray, plan, options, journal
        resources = ray.cluster_resources()
        self._gpus = bool(resources.get("GPU")) and options.device in ("auto", "cuda")
        self._wanted = workers or (int(resources["GPU"]) if self._gpus else sum(node["Alive"] for node in ray.nodes()))
        # Ray would give PyTorch one thread for each CPU that is asked for.
        self._threads = str(max(1, int(resources.get("CPU", 1)) // self._wanted))
        self._busy: dict[Any, _Place] = {}  # by what is waited for
        self._idle: list[_Place] = []

    def make(self, numbers: Sequence[int]) -> Counts:
        counts, waiting, output = Counts(), collections.deque(numbers), Path(self._options.output)
        for number in range(1, min(self._wanted, len(numbers)) + 1):
            self._start(_Place(number, None))
        with self._journal.bar(sum(self._plan.images), "encode") as bar:
            # Not until the last actor has started: there may be fewer CPUs than were asked for.
            while self._busy and (waiting or any(place.task is not None for place in self._busy.values())):
                done, _ = self._ray.wait(list(self._busy), num_returns=1)
                place = self._busy.pop(done[0])
                try:
                    answer = self._ray.get(done[0])
                except self._ray.exceptions.RayError as error:
                    self._failed(place, error, waiting)
                    continue
                if place.task is None:
                    place.device = answer
                    note_device(output / WORK, answer.partition(", GPU")[0].partition(" on ")[0])
                    self._journal.say(f"started: {place}")
                else:
                    place.failures = 0
                    counts += Counts(**answer)
                    bar.update(self._plan.images[place.task])
                    self._journal.event("task", number=place.task, place=place.number, device=place.device)
                self._give(place, waiting)
        if waiting:
            raise PreprocessError(
                f"all places have failed, {len(waiting)} of {len(numbers)} tasks are not made; what is finished is "
                f"kept, and the same command goes on from there"
            )
        return counts

    def _start(self, place: _Place) -> None:
        overrides = {name: getattr(self._options, name) for name in ("device", "dtype")} | {"workers": 0}
        resources = {"num_gpus": 1} if self._gpus else {"num_cpus": 1}
        actor = self._ray.remote(_Actor).options(
            scheduling_strategy="SPREAD", runtime_env={"env_vars": {"OMP_NUM_THREADS": self._threads}}, **resources
        )
        place.actor, place.task = actor.remote(self._options.output, f"ray-{place.number}", overrides), None
        self._busy[place.actor.start.remote()] = place

    def _give(self, place: _Place, waiting: collections.deque[int]) -> None:
        place.task = waiting.popleft() if waiting else None
        if place.task is None:
            self._idle.append(place)
        else:
            self._busy[place.actor.make.remote(place.task)] = place

    def _failed(self, place: _Place, error: Exception, waiting: collections.deque[int]) -> None:
        """Gives the task back, and starts the place again or drops it; raises what no other place could do better."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, PreprocessError):
            raise cause
        if place.task is not None:
            waiting.append(place.task)  # behind the others: it may be what kills its actors
        place.failures += 1
        why = ([line.strip() for line in str(cause or error).splitlines() if line.strip()] or ["?"])[0]
        self._journal.event("failed", place=place.number, device=place.device, task=place.task, why=why)
        self._ray.kill(place.actor)
        if place.failures < FAILURES:
            self._journal.say(f"failed: {place}: {why}; it is started again")
            self._start(place)
        else:
            self._journal.say(f"dropped after {FAILURES} failures in a row: {place}: {why}")
        if waiting and self._idle:
            self._give(self._idle.pop(), waiting)
