"""Every fault that we know how to make, and one table of what came of it.

    python tests/stress/run_all.py            the whole: hours on two cores
    python tests/stress/run_all.py --quick    a share of each part: about ten minutes
    python tests/stress/run_all.py --only fuzz security
    python tests/stress/run_all.py --jobs 2   two parts at a time

Writes benchmarks/results/faults.json and faults.md (with --quick: faults_quick) with versions, machine and command.
Each part is a module beside this file with `run(quick) -> [(fault, tried, survived, lost)]` and has a process of
its own; one that crashes or hangs is a lost row and not the end. Exits 1 if anything is lost. What other programs leave
in /dev/shm meanwhile counts as left behind: run nothing else that uses it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from fault_table import Row, tell  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import environment  # noqa: E402

PARTS = (
    "preprocess_kills",
    "preprocess_disk",
    "ray_kills",
    "bad_inputs",
    "training_kills",
    "training_disk",
    "two_at_once",
    "signals",
    "damage",
    "numerics",
    "fuzz",
    "security",
    "long_run",
)
HOURS = 4.0  # a part that takes longer hangs
CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import {part} as part
rows = part.run(sys.argv[3] == "quick")
open(sys.argv[2], "w").write(json.dumps(rows))
"""


def run_part(part: str, quick: bool) -> tuple[list[Row], str, int]:
    """The rows of a part, what it said, and its seconds; a row that is lost if it did not come to its end."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        answer, told = Path(folder) / "rows.json", Path(folder) / "told"
        command = [
            sys.executable,
            "-c",
            CODE.format(part=part),
            str(HERE),
            str(answer),
            "quick" if quick else "whole",
        ]
        with told.open("wb") as out:
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=3600 * HOURS,
                    check=False,
                )
                why = f"ended with {done.returncode}"
            except subprocess.TimeoutExpired:
                why = f"took more than {HOURS:g} hours"
        said = told.read_text(encoding="utf-8", errors="replace")
        try:
            rows = [
                (str(fault), int(tried), int(survived), int(lost))
                for fault, tried, survived, lost in json.loads(answer.read_text())
            ]
        except (OSError, ValueError, TypeError):
            rows = [(f"{part}: {why} without a result", 1, 0, 1)]
        return rows, said, round(time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a share of each part")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts (the results of the others are kept)")
    parser.add_argument("--jobs", type=int, default=1, help="parts at a time (each uses about one core)")
    arguments = parser.parse_args()
    name = "faults_quick" if arguments.quick else "faults"
    path = environment.RESULTS / f"{name}.json"
    parts = json.loads(path.read_text())["rows"] if arguments.only and path.exists() else {}
    wanted = arguments.only or PARTS
    with (
        ThreadPoolExecutor(arguments.jobs) as pool,
        tqdm(total=len(wanted), unit="part", disable=not sys.stderr.isatty()) as bar,
    ):
        running = {pool.submit(run_part, part, arguments.quick): part for part in wanted}
        for done in as_completed(running):
            part, (rows, said, seconds) = running[done], done.result()
            if any(lost for *_, lost in rows):
                print(f"--- {part} said:\n{said[-4000:]}\n---", flush=True)
            about = environment.describe()
            parts[part] = {"rows": rows, "seconds": seconds, "made": about["made"], "commit": about["commit"]}
            print(f"{part}: {seconds} s", flush=True)
            bar.update()
            parts = {part: parts[part] for part in PARTS if part in parts}
            write(name, parts)  # after each, so that a stopped run leaves what it has
    return tell([tuple(row) for part in parts.values() for row in part["rows"]])


def write(name: str, parts: dict) -> None:
    """The table as JSON and as Markdown."""
    environment.write(name, parts)
    about = environment.describe()
    lines = [[part, *row] for part, found in parts.items() for row in found["rows"]]
    totals = [sum(line[column] for line in lines) for column in (2, 3, 4)]
    text = environment.table(["part", "fault", "tried", "survived", "lost"], [*lines, ["all", "", *totals]])
    took = ", ".join(f"{part} {found['seconds']} s" for part, found in parts.items())
    versions = ", ".join(f"{package} {about['packages'].get(package)}" for package in ("jax", "torch"))
    machine = f"{about['cpu']}, {about['cores']} cores, {about['system']}"
    (environment.RESULTS / f"{name}.md").write_text(
        f"# Faults\n\nMade by `{about['command']}`, {about['made']}, commit {about['commit']}, on {machine}; "
        f"Python {about['python']}, {versions}.\n\n{text}\n\nTime: {took}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
