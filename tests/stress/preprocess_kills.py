"""Kills `preprocess build` again and again and looks at what is left. Run whole, or by test_preprocess.py:

    python tests/stress/preprocess_kills.py

A child process is forked, killed with SIGKILL (at a random moment, or before its n-th change of the file
system) and started again until it ends by itself. At every moment in between the directory must be a sound
dataset or visibly none; in the end it must equal, byte for byte, what a run that nobody disturbed makes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import forked  # noqa: E402

if "numpy" not in sys.modules:  # where this forks, and not where tests take parts of it
    os.environ.update(forked.ALONE)

import numpy as np  # noqa: E402
from build_fixtures import contents, options  # noqa: E402
from fault_table import Row, as_script, through_script  # noqa: E402
from fork_server import preload  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from fluxdit_jax.dataset.manifest import MANIFEST  # noqa: E402
from preprocess.build.build import build  # noqa: E402
from preprocess.cluster.worker import work as work_on  # noqa: E402
from preprocess.inspect.verify import verify  # noqa: E402

preload()

# The process forks, so it must have no threads: a lock that one holds at that moment stays locked in the child for
# ever. tqdm starts a monitor; whatever reads shards (ArrayRecord's pool, 64 threads) runs in a fork too.
tqdm.monitor_interval = 0

HANGS = 120.0  # seconds; a build here takes a tenth of one
Make = Callable[[Path, Path], int]  # of pictures, a dataset; returns the exit status
CHANGES = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "open")


@dataclasses.dataclass
class Tally:
    """What was tried and what came of it."""

    runs: int = 0
    killed: int = 0
    ended: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)


def draw(folder: Path, numbers: range) -> None:
    """Small noise pictures of several sizes with captions, some of them bad."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        rng = np.random.default_rng(number)
        size = [(80, 80), (70, 90), (90, 70)][number % 3]
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        path = folder / f"{number:03}.png"
        coarse.resize(size, Image.Resampling.BICUBIC).save(path)
        path.with_suffix(".txt").write_text(f"noise number {number}")
        if number % 11 == 10:
            path.write_bytes(path.read_bytes()[:-200])  # the header is right, the pixels are cut off


def wishes(photos: Path, output: Path):  # noqa: ANN201
    return options(photos, output, resolution=64, shard_size=5, max_rejects=1.0)


def alone(photos: Path, output: Path) -> int:
    return build(wishes(photos, output)).status


def by_workers(photos: Path, output: Path) -> int:
    """Two workers, one after the other, and the build that publishes what they have made."""
    return max(*(work_on(wishes(photos, output), number, 2) for number in (1, 2)), alone(photos, output))


def maker(kind: str) -> Make:
    """Of the "workers" and of other kinds of builds."""
    return by_workers if kind == "workers" else alone


def child(photos: Path, output: Path, at: int, make: Make) -> None:
    """Builds, and dies before change number `at` of the file system (0: never)."""
    faulthandler.dump_traceback_later(HANGS - 10, file=os.fdopen(os.dup(2), "w"))  # kept: `attempt` ends it
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    done = 0

    def watched(original, writes_only: bool):  # noqa: ANN001, ANN202
        def call(*arguments, **more):  # noqa: ANN002, ANN202
            nonlocal done
            if not writes_only or (len(arguments) > 1 and arguments[1] & (os.O_CREAT | os.O_WRONLY)):
                done += 1
                if done == at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **more)

        return call

    if at:
        for name in CHANGES:
            setattr(os, name, watched(getattr(os, name), name == "open"))
    status = 1
    with contextlib.suppress(BaseException):
        status = make(photos, output)
    os._exit(status)


def attempt(photos: Path, output: Path, tally: Tally, at: int = 0, after: float = HANGS, make: Make = alone) -> bool:
    """One run, killed before change `at` of the file system or `after` seconds; returns whether it ended itself."""
    tally.runs += 1
    pid = forked.fork()
    if pid == 0:
        child(photos, output, at, make)
    deadline = time.monotonic() + after
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.004)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        tally.killed += 1
        if after == HANGS and time.monotonic() > deadline:
            tally.lost.append(f"did not end in {HANGS:g} s (change {at}); its threads are shown on stderr")
        look(output, tally, f"killed at {at or after:g}")
        return False
    tally.ended += 1
    if os.WEXITSTATUS(status):
        tally.lost.append(f"exit status {os.WEXITSTATUS(status)} after {at or after:g}")
    return True


def first_finding(output: Path) -> str:
    """What `verify` says first, or "sound"."""
    with contextlib.redirect_stderr(open(os.devnull, "w")):  # noqa: PTH123, SIM115
        findings = verify(output)
    return str(findings[0]) if findings else "sound"


def look(output: Path, tally: Tally, when: str) -> None:
    """A directory with a manifest must be a sound dataset."""
    if (output / MANIFEST).exists():
        try:
            finding = forked.call(first_finding, output)
        except RuntimeError as error:
            finding = str(error)
        if finding != "sound":
            tally.lost.append(f"{when}: {finding}")


def expect(output: Path, reference: dict[str, bytes], tally: Tally, when: str) -> None:
    if contents(output) != reference:
        names = [n for n in reference if contents(output).get(n) != reference[n]]
        names += [n for n in contents(output) if n not in reference]
        tally.lost.append(f"{when}: differs in {names}")


def scene(folder: Path, kind: str, pictures: int) -> tuple[Path, Path | None, dict[str, bytes]]:
    """Makes an input, the dataset to start from (None: nothing), and what the end must look like."""
    photos, start = folder / "photos", None
    draw(photos, range(pictures))
    if kind == "update":
        start = folder / "start" / "data"
        attempt(photos, start, Tally())
        draw(photos, range(pictures, pictures * 5 // 4))
        (photos / "003.txt").write_text("an edited caption")
        (photos / "005.png").unlink()
        (photos / "005.txt").unlink()
        Image.open(photos / "007.png").rotate(180).save(photos / "006.png")
    reference = folder / "reference" / "data"
    attempt(photos, reference, Tally())
    return photos, start, contents(reference)


def begin(output: Path, start: Path | None) -> None:
    shutil.rmtree(output, ignore_errors=True)
    if start:
        shutil.copytree(start, output)


def kill_at_every_change(kind: str, step: int, offset: int = 0, pictures: int = 24) -> Tally:
    """For every `step`-th change of the file system: dies before it, starts again, compares."""
    tally, make = Tally(), maker(kind)
    with tempfile.TemporaryDirectory() as name:
        photos, start, reference = scene(Path(name), kind, pictures)
        output = Path(name) / "data"
        at = 1 + offset
        while True:
            begin(output, start)
            ended = attempt(photos, output, tally, at=at, make=make)
            if not ended:
                attempt(photos, output, tally, make=make)
            expect(output, reference, tally, f"after a kill before change {at}")
            if ended:
                return tally
            at += step


def kill_at_random(kind: str, kills: int, seed: int = 0, pictures: int = 24) -> Tally:
    """Kills at random moments until `kills` have been dealt, starting anew whenever a run has ended."""
    tally, rng, make = Tally(), random.Random(seed), maker(kind)
    with tempfile.TemporaryDirectory() as name:
        photos, start, reference = scene(Path(name), kind, pictures)
        output = Path(name) / "data"
        begin(output, start)
        whole = HANGS
        while tally.killed < kills:
            clock = time.monotonic()
            if attempt(photos, output, tally, after=rng.uniform(0.02, 1.05) * whole, make=make):
                whole = min(whole, time.monotonic() - clock)  # the first is slow where the files are not in memory
                expect(output, reference, tally, "after a run that ended")
                begin(output, start)
        attempt(photos, output, tally, make=make)
        expect(output, reference, tally, "at the end")
    return tally


def run(quick: bool) -> list[Row]:
    """(fault, tried, survived, lost) of each kind of kill, a first build and an update."""
    return through_script(__file__, quick)


def work(quick: bool) -> list[Row]:
    """Kills before every change of the file system, and 300 at random moments, a third of them in an update."""
    rows = []
    for kind, words in (("fresh", "a first build"), ("update", "an update"), ("workers", "by two workers")):
        for what, tally in (
            ("before a change of a file", kill_at_every_change(kind, 9 if quick else 1)),
            ("at random", kill_at_random(kind, 5 if quick else 100)),
        ):
            rows.append(
                (
                    f"preprocess build, {words}: killed {what}",
                    tally.killed,
                    tally.killed - len(tally.lost),
                    len(tally.lost),
                )
            )
            for line in tally.lost:
                print(f"LOST {rows[-1][0]}: {line}")
    return rows


if __name__ == "__main__":
    sys.exit(as_script(__doc__, work))
