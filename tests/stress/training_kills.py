"""Kills training, validation, sampling and export everywhere, and compares what they end with to undisturbed ones.

    python tests/stress/training_kills.py               the whole: 200 kills of training, 60 of the others
    python tests/stress/training_kills.py --quick       a share of it

Training is killed before the n-th call that changes a file (every thread's, also Orbax's; some in the middle of
a write), before the n-th that reads a checkpoint, while its program compiles and is kept, and at random moments.
Each run is killed several times, then left to end. Lost is what differs in one bit of a loss, of the EMA, of the last
state or of a picture from a run that nobody disturbed, what needs another command, and what is left behind.
"""

from __future__ import annotations

import collections
import functools
import json
import random
import re
import shutil
import sys
from pathlib import Path

import forked
from fault_table import Row, as_script, on_training_scene, through_script
from tqdm import tqdm

Fault = forked.Fault
CHAIN = 4  # kills of a run before it is left to end


def run(quick: bool) -> list[Row]:
    """(fault, tried, survived, lost) for each kind of kill."""
    return through_script(__file__, quick)


class Kills:
    """Counts kills by what they hit, and what was lost."""

    def __init__(self, scene, seed: int = 0):  # noqa: ANN001
        self.scene, self.rng = scene, random.Random(seed)
        self.tried: collections.Counter[str] = collections.Counter()
        self.lost: collections.Counter[str] = collections.Counter()
        self.progress = lambda kills: None

    def rows(self) -> list[Row]:
        return [(what, n, n - self.lost[what], self.lost[what]) for what, n in sorted(self.tried.items())]

    def blame(self, hits: list[str], why: str) -> None:
        print(f"LOST after {hits}: {why}", flush=True)
        for what in hits:
            self.lost[what] += 1

    # ------------------------------------------------------------ training

    def train(self, faults: list[dict]) -> int:
        """Kills one run by each of `faults` (arguments of `forked.run`), lets it end, compares. Returns the kills."""
        scene, run = self.scene, self.scene.root / "killed"
        shutil.rmtree(run, ignore_errors=True)
        hits: list[str] = []
        for fault in faults:
            fault = {"under": run} | fault
            ended = scene.train(run, **fault)
            if ended.left:
                self.blame([*hits, "orphans"], f"processes outlived it: {ended.left}")
            if ended.status != -9:
                if ended.status:
                    self.blame(hits, f"exit status {ended.status}: {ended.err[-2000:]}")
                break
            hits.append(stage(run, ended, fault))
        self.tried.update(hits)
        self.progress(len(hits))
        ended = scene.train(run)
        told = scene.outcome(run) if ended.status == 0 else ""
        litter = scene.litter(run)
        if ended.status or told != scene.expected or litter or re.search(r" E .*checkpoints/\d", ended.err):
            self.blame(hits, f"{ended.status} {difference(told, scene.expected)} {litter} {ended.err[-1500:]}")
        return len(hits)

    def changes(self, kills: int) -> None:
        """Before the n-th change of a file, n spread evenly over an undisturbed run; every third in mid-write."""
        whole = len(self.scene.train(self.scene.root / "counted", under=self.scene.root / "counted").calls)
        first = [1 + number * whole // max(1, kills // CHAIN) for number in range(max(1, kills // CHAIN))]
        done = 0
        for number, start in enumerate(first):
            places = [start, *(self.rng.randint(1, whole // 2) for _ in range(CHAIN - 1))]
            acts = ["tear" if (number + place) % 3 == 0 else "kill" for place in range(CHAIN)]
            done += self.train([{"fault": Fault(at, act)} for at, act in zip(places, acts)])
        while done < kills:
            done += self.train([{"fault": Fault(self.rng.randint(1, whole // 2), "kill")} for _ in range(CHAIN)])

    def reads(self, kills: int) -> None:
        """While a checkpoint is read: the first kill is in the middle of the run, so that there is one."""
        whole = len(self.scene.train(self.scene.root / "counted", under=self.scene.root / "counted").calls)
        done = 0
        while done < kills:
            middle = Fault(self.rng.randint(whole // 4, 3 * whole // 4), "kill")
            reading = [Fault(self.rng.randint(1, 400), "kill", reads=True) for _ in range(CHAIN)]
            done += self.train([{"fault": middle}, *({"fault": fault} for fault in reading)]) - 1

    def compiling(self, kills: int) -> None:
        """While the compiled step is written to the cache, and in the seconds of compiling before it."""
        cache = self.scene.root / "cold"
        for number in range(kills):
            shutil.rmtree(cache, ignore_errors=True)
            shutil.copytree(self.scene.cache, cache)
            largest = max((p for p in cache.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)
            largest.unlink()
            more = {"cache": cache, "under": cache}
            if number % 2:
                self.train([more | {"fault": Fault(1 + number // 2, "tear" if number % 4 == 1 else "kill")}])
            else:
                self.train([more | {"after": self.rng.uniform(1, 6)}])
            ended = self.scene.train(self.scene.root / "cold-run", cache=cache)  # the cache was hit: does it work?
            shutil.rmtree(self.scene.root / "cold-run", ignore_errors=True)
            if ended.status:
                self.blame(["compilation cache"], ended.err[-1500:])

    def at_random(self, kills: int) -> None:
        """At moments spread over the length of a run."""
        longest = self.scene.train(self.scene.root / "counted").seconds
        done = 0
        while done < kills:
            done += self.train([{"after": self.rng.uniform(0.1, 0.8 * longest)} for _ in range(CHAIN)])

    # ------------------------------------------------------------ the programs that read a run

    def program(self, name: str, module: str, arguments: list[str], out: Path, kills: int) -> None:
        """Kills a program that writes `out` for a finished run; after each, the same command must give the same."""
        scene, status = self.scene, (0, 1) if name == "validate" else (0,)
        shutil.rmtree(out, ignore_errors=True)
        whole = scene.start(module, *arguments, under=out)
        assert whole.status in status, whole.err
        expected = scene.files(out)
        reads = len(scene.start(module, *arguments, under=scene.root / "whole", fault=Fault(reads=True)).calls)
        for number in range(kills):
            if number % 2:  # over what an earlier run of it wrote, or where nothing is
                shutil.rmtree(out, ignore_errors=True)
            if number % 4 < 2:
                place = 1 + number * len(whole.calls) // kills
                fault = {"under": out, "fault": Fault(place, "tear" if number % 3 == 0 else "kill")}
                what = "writing"
            elif number % 4 == 2:
                place = self.rng.randint(1, reads)
                fault = {"under": scene.root / "whole", "fault": Fault(place, reads=True)}
                what = "reading the run"
            else:
                fault, what = {"after": self.rng.uniform(0.2, 0.9 * whole.seconds)}, "at a random moment"
            ended = scene.start(module, *arguments, **fault)
            while ended.status != -9 and fault.get("after", 0) > 0.02:  # it was faster than the first time
                fault = {"after": fault["after"] / 2}
                ended = scene.start(module, *arguments, **fault)
            hit = [f"{name}: killed {what}"]
            if ended.status != -9:
                hit = [f"{name}: ended before the kill"]
            self.tried.update(hit)
            self.progress(1)
            torn = scene.torn(out, expected)
            again = scene.start(module, *arguments)
            after, litter = scene.files(out), scene.litter(out)
            if ended.left or torn or again.status not in status or after != expected or litter:
                differ = [path for path in {*after, *expected} if after.get(path) != expected.get(path)]
                self.blame(
                    hit,
                    f"{fault} {ended.left} torn {torn} {again.status} {differ} {litter} {again.err[-500:]}",
                )

    def programs(self, kills: int) -> None:
        for name, (module, arguments, out) in self.scene.programs().items():
            self.program(name, module, arguments, out, kills)


def stage(run: Path, ended: forked.Ended, fault: dict) -> str:
    """What a killed run was doing, in words."""
    if fault.get("after") is not None:
        if not re.search(r"\d GB \(", ended.err):  # what a step takes is told when it is compiled
            return "train: at random, starting or compiling"
        if " I step " not in ended.err:
            return "train: at random, restoring"
        return "train: at random, in the loop"
    name, _, path = ended.calls[-1].partition(" ")
    inside = path.removeprefix(f"{run}/").split("/")[0]
    torn = "in the middle of a write to " if fault["fault"].act == "tear" else "before a change of "
    if fault["fault"].reads:
        return "train: reading a checkpoint" if inside == "checkpoints" else "train: reading the run's files"
    if inside in ("checkpoints", "ema") and name.startswith(("unlinkat", "rmdir")):
        return f"train: removing old or unfinished {inside}"
    if inside in ("checkpoints", "ema", "samples", "tensorboard"):
        return f"train: {torn}{inside}"
    return f"train: {torn}" + ("the compilation cache" if "cold" in path else "the run's own files")


def difference(told: str, expected: str) -> str:
    """Which parts of the outcome differ."""
    if not told:
        return "no outcome"
    a, b = json.loads(told), json.loads(expected)
    return ", ".join(name for name in b if a[name] != b[name]) or "same bits"


def work_on(scene, quick: bool) -> list[Row]:  # noqa: ANN001
    kills = Kills(scene)
    parts = (
        (kills.changes, 4, 120),
        (kills.reads, 0, 40),
        (kills.at_random, 0, 48),
        (kills.compiling, 0, 8),
        (kills.programs, 2, 24),  # of each of three
    )
    for method, few, many in parts:
        if count := few if quick else many:
            with tqdm(total=3 * count if method == kills.programs else count, desc=method.__name__, unit="kill") as bar:
                kills.progress = bar.update
                method(count)
    return kills.rows()


if __name__ == "__main__":
    forked.enter("training_scene")
    sys.exit(as_script(__doc__, functools.partial(on_training_scene, __file__, work_on)))
