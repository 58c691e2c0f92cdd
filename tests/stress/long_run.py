"""Twenty thousand steps in one process, and a hundred resumes in a row: what a run of weeks must not do is grow.

    python tests/stress/long_run.py --steps 20000 --resumes 100

The first part trains a tiny model with frequent saves, pictures and held-out losses and watches the process
from outside: memory, file descriptors, threads, /dev/shm. The second part interrupts one run again and again
(SIGTERM at random moments; an end that is moved on by a few steps; kill -9) and compares it, bit for bit, with
a run that was never interrupted. Prints what was measured; exits 1 if anything is lost.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import numpy as np  # noqa: E402
import training_helpers as helpers  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from tqdm import tqdm  # noqa: E402

from fluxdit_jax.run.averages import restore_ema  # noqa: E402
from fluxdit_jax.run.metrics import read_metrics  # noqa: E402
from fluxdit_jax.run.scalars import on_board  # noqa: E402

Row = tuple[str, int, int, int]
SHARED = Path("/dev/shm")

# What may be left of growth, per 10,000 steps in the second half of the run.
GROWTH = {"memory, MB": 2.0, "file descriptors": 0.5, "threads": 0.5, "/dev/shm, MB": 0.5}
# Beside it, per save: tensorstore 0.1.86 never frees what `KvStore.Spec.to_json` returns, 257 bytes, and Orbax asks for
# it for every array of every save. With the 48 saves of a day that is some megabytes, so it is allowed for here.
GROWTH_A_SAVE_MB = 0.1
# The allocators' arenas (a hundred threads have them) fill up during about 10,000 steps and then stay as they are; a
# shorter run is still in the midst of it.
FULL, FILLING_MB = 20_000, 30.0
# Scalars that tell of the machine and not of the run.
CLOCKS = ("images_per_second", "tokens_per_second", "data_wait", "mfu", "device_memory_gb")


def long_config(dataset: Path, steps: int) -> ConfigDict:
    """A tiny model that saves, draws and measures as often as a run of weeks does in all."""
    c = helpers.tiny_config(dataset, Path("unused"))
    c.train.steps = steps
    c.log.every = 5
    c.log.preview_every, c.log.preview_count, c.log.preview_steps = max(1, steps // 40), 2, 2
    c.log.heldout_every, c.log.minutes = max(1, steps // 100), 0.0
    c.checkpoint.minutes, c.checkpoint.ema_every = 0.05, max(1, steps // 20)
    return c


# --------------------------------------------------------------------------------------------- watching


def observe(pid: int) -> dict[str, float]:
    """What a process holds now; raises `OSError` when it has ended."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    if "VmRSS" not in status:
        raise ProcessLookupError(pid)
    return {
        "memory, MB": int(status["VmRSS"].split()[0]) / 1024,
        "file descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(status["Threads"]),
        "/dev/shm, MB": sum(p.stat().st_size for p in SHARED.rglob("*") if p.is_file()) / 2**20,
    }


def last_step(run: Path) -> int:
    """The last step in the end of metrics.jsonl, without reading all of it."""
    with contextlib.suppress(OSError, ValueError, LookupError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
        return json.loads(file.read().splitlines()[-1])["step"]
    return 0


def watch(process: subprocess.Popen, run: Path, steps: int) -> list[dict[str, float]]:
    """Samples of `observe` with the step, every half second until the process ends."""
    samples, saves, before = [], 0, None
    with tqdm(total=steps, unit="step", disable=not sys.stderr.isatty()) as bar:
        while process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                saved = saved_step(run)
                saves, before = saves + (saved != before), saved
                samples.append(observe(process.pid) | {"step": last_step(run), "saves": saves})
                bar.update(samples[-1]["step"] - bar.n)
            time.sleep(0.5)
    return samples


def growth(samples: list[dict[str, float]], steps: int) -> dict[str, tuple[float, float, float]]:
    """For each quantity: its median, its largest value and its growth per 10,000 steps, in the second half.

    The growth is Theil and Sen's slope (the median of the slopes of all pairs), which a spike does not move.
    """
    late = [sample for sample in samples if sample["step"] >= steps / 2]
    late = late[:: max(1, len(late) // 400)]
    step = np.array([sample["step"] for sample in late], float)
    found = {}
    for name in GROWTH:
        value = np.array([sample[name] for sample in late])
        i, j = np.triu_indices(len(late), 1)
        apart = step[j] - step[i]
        slopes = (value[j] - value[i])[apart > 0] / apart[apart > 0]
        found[name] = float(np.median(value)), float(value.max()), 1e4 * float(np.median(slopes))
    return found


# -------------------------------------------------------------------------------------------- comparing


def scalars(run: Path) -> dict[str, list[tuple[int, float | None]]]:
    """tag: (step, value) of metrics.jsonl, in the order they were written."""
    found: dict[str, list[tuple[int, float | None]]] = collections.defaultdict(list)
    for entry in read_metrics(run / "metrics.jsonl"):
        for name, value in entry.items():
            if name != "step" and not isinstance(value, str):
                found[name].append((entry["step"], value))
    return dict(found)


def board_differences(run: Path) -> list[str]:
    """How TensorBoard and metrics.jsonl differ: each scalar must stand once in both, to f32."""
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    written = scalars(run)
    tags = {name: on_board(name)[0] for name in written}
    names = {tag: name for name, tag in tags.items()}
    shown = {names.get(tag, tag) for tag in accumulator.Tags()["scalars"]}
    wrong = [f"only in one of the two: {name}" for name in sorted(shown ^ set(written))]
    for name in sorted(shown & set(written)):
        events = [(event.step, event.value) for event in accumulator.Scalars(tags[name])]
        lines = [(step, math.nan if value is None else float(np.float32(value))) for step, value in written[name]]
        if [step for step, _ in events] != [step for step, _ in lines]:
            missing = sorted({s for s, _ in lines} - {s for s, _ in events})
            wrong.append(f"{name}: {len(events)} in TensorBoard, {len(lines)} in metrics.jsonl, missing {missing[:5]}")
        elif not np.array_equal(np.float32(events), np.float32(lines), equal_nan=True):
            wrong.append(f"{name}: other values in TensorBoard")
    return wrong


def incomplete(run: Path, steps: int, every: int) -> list[str]:
    """Steps that should stand in metrics.jsonl once and do not."""
    wanted = sorted({*range(every, steps + 1, every), steps})
    logged = [step for step, _ in scalars(run).get("loss", [])]
    if logged == wanted:
        return []
    twice = [step for step, count in collections.Counter(logged).items() if count > 1]
    missing = sorted(set(wanted) - set(logged))
    return [f"logged {len(logged)} of {len(wanted)} steps; missing {missing[:5]}, twice {twice[:5]}"]


def leftovers(run: Path) -> list[str]:
    """Temporary files, and lines of the log that tell of trouble."""
    wrong = [f"left behind: {path.relative_to(run)}" for path in run.rglob("*tmp*")]
    lines = (run / "train.log").read_text(encoding="utf-8").splitlines()
    wrong += [f"train.log: {line}" for line in lines if " E " in line[:12] or "Traceback" in line]
    return wrong


def differences(run: Path, whole: Path) -> list[str]:
    """How an interrupted run differs from one that was not: every number of the run, every weight of the EMA."""
    wrong = []
    ours, theirs = scalars(run), scalars(whole)
    for name in sorted((ours.keys() | theirs.keys()) - set(CLOCKS)):
        mine, others = ours.get(name, []), theirs.get(name, [])
        if name.startswith("heldout"):  # measured at every end, and only one of the runs ended in between
            steps = dict(others)
            mine = [pair for pair in mine if pair[0] in steps]
        if mine != others:
            first = next((f"{a} and {b}" for a, b in zip(mine, others, strict=False) if a != b), "a line less")
            wrong.append(f"{name}: {first}")
    (step, ema), (other_step, other) = restore_ema(run), restore_ema(whole)
    if step != other_step or not helpers.tree_equal(ema, other):
        wrong.append(f"the EMA of step {step} is not that of the uninterrupted run at step {other_step}")
    return wrong


# ------------------------------------------------------------------------------------------- the two parts


def start(config: Path, run: Path, *more: str) -> subprocess.Popen:
    """`python -m fluxdit_jax.train`; its output goes to RUN.out, since a pipe that nobody empties would stop it."""
    environment = {
        "XDG_CACHE_HOME": str(run.parent / "cache"),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    with run.with_suffix(".out").open("ab") as out:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "fluxdit_jax.train",
                f"--config={config}",
                f"--config.workdir={run}",
                *more,
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=helpers.REPOSITORY,
            env=os.environ | environment,
        )


def steady(root: Path, steps: int, say=print) -> Row:
    """One process over `steps` steps; lost counts quantities that grow and logs that are incomplete."""
    helpers.write_dataset(root / "data", channels=16, vae="builtin:dct", sizes=((4, 4),))
    file = helpers.write_config(root / "long.py", long_config(root / "data", steps))
    run = root / "steady"
    process = start(file, run)
    began = time.monotonic()
    samples = watch(process, run, steps)
    (root / "samples.json").write_text(json.dumps(samples))
    say(
        f"{steps} steps in {time.monotonic() - began:.0f} s, {samples[-1]['saves']} saves, "
        f"{len(samples)} looks at the process"
    )
    wrong = (
        []
        if process.returncode == 0
        else [f"exit status {process.returncode}: {run.with_suffix('.out').read_text()[-500:]}"]
    )
    for name, (typical, most, slope) in growth(samples, steps).items():
        bound = GROWTH[name] * max(1.0, 5_000 / steps)
        if name == "memory, MB":
            filling = FILLING_MB if steps < FULL else 0.0
            bound += 1e4 / steps * (GROWTH_A_SAVE_MB * samples[-1]["saves"] + 2 * filling)
        say(
            f"  {name:18} median {typical:8.1f}  most {most:8.1f}  "
            f"growth per 10,000 steps {slope:+.3f} (bound {bound:g})"
        )
        if not slope <= bound:
            wrong.append(f"{name} grows by {slope:.3f} per 10,000 steps")
    wrong += incomplete(run, steps, 5) + board_differences(run) + leftovers(run)
    for line in wrong:
        say(f"  LOST {line}")
    return (
        f"{steps:,} steps in one process: memory, descriptors, threads, logs",
        1,
        int(not wrong),
        int(bool(wrong)),
    )


def interrupt(process: subprocess.Popen, run: Path, how: str, rng: random.Random) -> int:
    """Waits for a random moment (for SIGTERM one in four is before the loop) and stops the run; its exit code."""
    if how == "SIGTERM" and rng.random() < 0.25:
        time.sleep(rng.uniform(0.0, 4.0))
    else:
        before = last_step(run)
        while process.poll() is None and last_step(run) == before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.6))
    process.send_signal(signal.SIGKILL if how == "kill -9" else signal.SIGTERM)
    return process.wait(timeout=120)


def resumes(root: Path, count: int, say=print, seed: int = 0) -> list[Row]:
    """One run that is interrupted `count` times against one that is not."""
    helpers.write_dataset(root / "data", channels=16, vae="builtin:dct", sizes=((4, 4),))
    config = long_config(root / "data", 10**9)
    config.log.every, config.log.preview_every, config.log.heldout_every = 1, 40, 25
    config.checkpoint.minutes, config.checkpoint.ema_every = 0.01, 50
    file = helpers.write_config(root / "resumes.py", config)
    run, whole = root / "resumed", root / "whole"
    rng, done, wrong = random.Random(seed), collections.Counter(), []
    ways = rng.choices(("SIGTERM", "moved end", "kill -9"), (6, 3, 1), k=count)
    for how in tqdm(ways, unit="resume", disable=not sys.stderr.isatty()):
        if how == "moved end":
            end = (saved_step(run) or 0) + rng.randint(1, 7)
            code = start(file, run, f"--config.train.steps={end}").wait(timeout=300)
            expected = (0,)
        else:
            code = interrupt(start(file, run), run, how, rng)
            expected = (-signal.SIGKILL,) if how == "kill -9" else (128 + signal.SIGTERM, -signal.SIGTERM)
        done[f"{how}, exit {code}"] += 1
        if code not in expected:
            wrong.append(f"{how}: exit {code}: {run.with_suffix('.out').read_text()[-500:]}")
            break
    end = (saved_step(run) or 0) + 20
    for directory in (run, whole):
        code = start(file, directory, f"--config.train.steps={end}").wait(timeout=600)
        if code:
            wrong.append(f"the last start of {directory.name}: exit {code}")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
    say(f"{done.total()} resumes to step {end}: {dict(done)}")
    say(f"  {len(list((run / 'tensorboard').iterdir()))} event files")
    wrong += differences(run, whole) + leftovers(run)
    for directory in (run, whole):
        wrong += incomplete(directory, end, 1) + board_differences(directory)
    for line in wrong:
        say(f"  LOST {line}")
    what = "training: resumed again and again in one run (SIGTERM, moved end, kill -9)"
    return [(what, done.total(), 0 if wrong else done.total(), done.total() if wrong else 0)]


def saved_step(run: Path) -> int | None:
    """Step of the newest resumable checkpoint."""
    return max((int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit()), default=None)


def run(quick: bool) -> list[Row]:
    """Both parts; `quick` is a share of them that takes about two minutes."""
    with tempfile.TemporaryDirectory(prefix="long-run-") as name:
        first = steady(Path(name), 1_500 if quick else 20_000)
        return [first, *resumes(Path(name), 8 if quick else 100)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000, help="0: leave this part out")
    parser.add_argument("--resumes", type=int, default=100, help="0: leave this part out")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="long-run-") as name:
        root = arguments.keep or Path(name)
        root.mkdir(parents=True, exist_ok=True)
        rows = [steady(root, arguments.steps)] if arguments.steps else []
        rows += resumes(root, arguments.resumes) if arguments.resumes else []
    for row in rows:
        print("{:70} tried {:4} survived {:4} lost {:4}".format(*row))
    return int(any(row[3] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
