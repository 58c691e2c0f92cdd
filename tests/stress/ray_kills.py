"""Kills what `preprocess build --engine ray` runs on: its owner, an actor, the head of the cluster; and starts two.

    python tests/stress/ray_kills.py

Each time a cluster of this machine alone is there, and a build on it is at a random moment. After a kill the same
command, on a new cluster where the head was killed, must come to the bytes of a build that nobody disturbed. The owner
must end by itself when the head has died, and a second build of one output must be refused while the first goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from build_fixtures import FLAGS, contents  # noqa: E402
from fault_table import Row, Tally, as_script  # noqa: E402
from preprocess_kills import draw, first_finding  # noqa: E402

from fluxdit_jax.dataset.manifest import MANIFEST  # noqa: E402

ENDS, GONE = 180.0, 90.0  # seconds for a command; and until one whose cluster has died has noticed it
ACTOR = "ray::_Actor"
KILLED = ("owner", "actor", "head")


def environment() -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def cluster() -> Iterator[tuple[str, subprocess.Popen]]:
    """(address, head) of a cluster of this machine; all that it has started ends with it."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        options = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--block"]
        command = [f"{sys.prefix}/bin/ray", "start", *options, "--include-dashboard=false", f"--temp-dir={folder}"]
        log = (Path(folder) / "head.log").open("w")
        head = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + ENDS
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                if head.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"ray start did not come up: {(Path(folder) / 'head.log').read_text()[-2000:]}")
                time.sleep(0.2)
            yield f"127.0.0.1:{port}", head
        finally:
            for pid in [*processes(head.pid), head.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            head.wait()


def processes(ancestor: int, name: str = "") -> list[int]:
    """Process ids below a process whose command has a name in it."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def below(pid: int) -> bool:
        while (pid := parents.get(pid, 0)) not in (0, ancestor):
            pass
        return pid == ancestor

    return [int(pid) for pid, _, what in rows if name in what and below(int(pid))]


def start(photos: Path, output: Path, *options: str) -> subprocess.Popen:
    shape = ["--resolution", "64", "--modulus", "16", "--min-side", "16", "--shard-size", "3", "--holdout", "0"]
    command = [sys.executable, "-m", "preprocess", "build", "--input", photos, "--output", output, *shape, *FLAGS,
               "--max-rejects", "1", *options]  # fmt: skip
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until_it_ends(photos: Path, output: Path, *options: str) -> str:
    """The same command again, while a process that outlives its owner still has its place; "" or what went wrong."""
    deadline = time.monotonic() + ENDS
    while True:
        process = start(photos, output, *options)
        said, _ = process.communicate(timeout=ENDS)
        if process.returncode == 0:
            return ""
        if "at work" not in said or time.monotonic() > deadline:
            return f"status {process.returncode}: {said[-1500:]}"
        time.sleep(1)


def kill(what: str, photos: Path, output: Path, after: float) -> list[str] | None:
    """One build, of which something is killed after some seconds, and what was wrong then; None: nothing was there."""
    wrong = []
    with cluster() as (address, head):
        by_ray = ("--engine", "ray", "--ray-address", address, "--ray-workers", "2")
        owner = start(photos, output, *by_ray)
        while what == "actor" and owner.poll() is None and not processes(head.pid, ACTOR):  # they come late
            time.sleep(0.05)
        time.sleep(after)
        victims = {"owner": lambda: [owner.pid], "actor": lambda: processes(head.pid, ACTOR)[:1],
                   "head": lambda: processes(head.pid, "gcs_server")}[what]()  # fmt: skip
        if owner.poll() is not None or not victims:
            owner.communicate()
            return None
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            said, _ = owner.communicate(timeout=GONE)
        except subprocess.TimeoutExpired:
            owner.kill()
            said, _ = owner.communicate()
            wrong.append(f"the owner was still there after {GONE:g} s: {said[-1500:]}")
        if what == "actor" and owner.returncode:
            wrong.append(f"status {owner.returncode}: {said[-1500:]}")
        if "Traceback" in said:
            wrong.append(f"a traceback: {said[-1500:]}")
        if (output / MANIFEST).exists() and (finding := first_finding(output)) != "sound":
            wrong.append(finding)
        if what != "head":
            return wrong + [line for line in [until_it_ends(photos, output, *by_ray)] if line]
    with cluster() as (address, _):
        by_ray = ("--engine", "ray", "--ray-address", address, "--ray-workers", "2")
        return wrong + [line for line in [until_it_ends(photos, output, *by_ray)] if line]


def two(photos: Path, output: Path, *second: str) -> list[str]:
    """A build by Ray, and beside it another one of the same output, which must be refused in words."""
    with cluster() as (address, _):
        by_ray = ("--engine", "ray", "--ray-address", address, "--ray-workers", "2")
        first = start(photos, output, *by_ray)
        while not (output / ".build" / "lock").exists() and first.poll() is None:
            time.sleep(0.02)
        time.sleep(0.5)
        said, _ = (other := start(photos, output, *(second or by_ray))).communicate(timeout=ENDS)
        all_said, _ = first.communicate(timeout=ENDS)
    wrong = [f"the first ended with {first.returncode}: {all_said[-1500:]}"] if first.returncode else []
    if other.returncode != 1 or "at work" not in said and "another" not in said or "Traceback" in said:
        wrong.append(f"the second ended with {other.returncode}: {said[-1500:]}")
    return wrong


def judge(tally: Tally, what: str, wrong: list[str], output: Path, reference: dict[str, bytes], case: str = "") -> None:
    other = [] if contents(output) == reference else ["other bytes than alone"]
    tally.judge(f"preprocess build by Ray: {what}", wrong + other, case)


def run(quick: bool) -> list[Row]:
    """Kills at random moments, and two at once."""
    rng, tally = random.Random(0), Tally(None)
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        draw(photos, range(60))
        with cluster() as (address, _):
            began = time.monotonic()
            said = until_it_ends(photos, Path(folder) / "whole" / "data", "--engine", "ray", "--ray-address", address)
            whole = time.monotonic() - began
        if said := said or until_it_ends(photos, Path(folder) / "reference" / "data"):
            raise RuntimeError(said)
        reference = contents(Path(folder) / "reference" / "data")
        outputs = (Path(folder) / str(number) / "data" for number in itertools.count())
        for what in KILLED:
            done = 0
            while done < (1 if quick else 10):
                # Most of a build here is its start, before there are actors.
                output, after = next(outputs), rng.uniform(0.1, 0.9) * (0.2 if what == "actor" else 1) * whole
                if (wrong := kill(what, photos, output, after)) is not None:
                    done += 1
                    judge(tally, f"its {what} killed at random", wrong, output, reference, f"after {after:.1f} s")
        for second in ((), ("--worker", "1/2")):
            for _ in range(1 if quick else 3):
                output = next(outputs)
                what = f"a second {' '.join(second) or 'build by Ray'}"
                judge(tally, what, two(photos, output, *second), output, reference)
    return tally.rows()


if __name__ == "__main__":
    sys.exit(as_script(__doc__, run))
