"""The table that every fault script prints: fault, tried, survived, lost."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

Row = tuple[str, int, int, int]


class Tally:
    """Counts what was tried on a scene, and what was lost."""

    def __init__(self, scene):  # noqa: ANN001
        self.scene = scene
        self.counts: dict[str, list[int]] = {}

    def rows(self) -> list[Row]:
        return [(what, tried, tried - lost, lost) for what, (tried, lost) in self.counts.items()]

    def judge(self, what: str, wrong: list[str], case: str = "") -> None:
        """One more was tried of `what`; it is lost if anything is wrong, which is told."""
        count = self.counts.setdefault(what, [0, 0])
        count[0] += 1
        if wrong:
            count[1] += 1
            print(f"LOST {what}{case and ', '}{case}: " + "; ".join(wrong), flush=True)


def tell(rows: list[Row]) -> int:
    """Prints the table; returns the exit status, 1 if anything was lost."""
    width = max([len(row[0]) for row in rows] + [20])
    print(f"\n{'fault':{width}}  {'tried':>6} {'survived':>8} {'lost':>5}")
    for fault, tried, survived, lost in rows:
        print(f"{fault:{width}}  {tried:6} {survived:8} {lost:5}")
    tried, survived, lost = (sum(row[column] for row in rows) for column in (1, 2, 3))
    print(f"{'all':{width}}  {tried:6} {survived:8} {lost:5}", flush=True)
    return int(lost > 0)


def as_script(description: str, work: Callable[[bool], list[Row]]) -> int:
    """The command line of a fault script: [--quick] [--json FILE]."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the share that runs in CI")
    parser.add_argument("--json", type=Path, help="where to write the rows, for a program")
    arguments = parser.parse_args()
    rows = work(arguments.quick)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows))
    return tell(rows)


def on_training_scene(script: str, work_on: Callable[..., list[Row]], quick: bool, **options: bool) -> list[Row]:
    """The rows of `work_on(scene, quick)`, of a scene in a temporary folder; after `forked.enter`."""
    from training_scene import make

    with tempfile.TemporaryDirectory(prefix=f"{Path(script).stem}-") as folder:
        return work_on(make(Path(folder), **options), quick)


def through_script(script: str, quick: bool) -> list[Row]:
    """The rows of a script that must have a process of its own (it forks, or loads a library first).

    Raises:
      RuntimeError: it ended without rows; the message is what it last said.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "rows.json"
        command = [sys.executable, script, "--json", str(answer), *(["--quick"] if quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if not answer.exists():
            raise RuntimeError(f"{script} ended with {done.returncode}: {done.stdout[-3000:]}")
        rows = [tuple(row) for row in json.loads(answer.read_text())]
        if any(lost for _, _, _, lost in rows):
            print(done.stdout)
        return rows
