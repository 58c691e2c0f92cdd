"""Kills training at random moments and compares what it ends with to a run that was never interrupted.

    python tests/faults/training_kills.py --kills 30

Prints a table; exits 1 if a loss or an EMA weight differs in one bit, or anything is left behind.
"""

from __future__ import annotations

import argparse
import collections
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import training_helpers as helpers

from fluxdit_jax.checkpoint import restore_ema
from fluxdit_jax.metrics import read_metrics

STEPS = 60


def losses(run: Path) -> list[tuple[int, float]]:
    return [
        (entry["step"], entry["loss"]) for entry in read_metrics(run / "metrics.jsonl") if "loss" in entry
    ]


def stage(run: Path) -> str:
    """Where a killed run was, as far as its directory tells."""
    if any((run / "checkpoints").glob("*tmp*")) or any((run / "ema").glob("*tmp*")):
        return "while saving"
    if not (run / "metrics.jsonl").exists() or not losses(run):
        return "before the first step"
    return "while training"


def train_with_kills(
    command: helpers.TrainCommand, config: Path, run: Path, kills: int, longest: float, rng: random.Random
) -> tuple[collections.Counter, float]:
    """Starts the run again and again, killing it after a random time below `longest` seconds.

    Returns the moments that were hit, and how long to wait at most from now on: a run that ended before its kill
    shows that the machine has become faster.
    """
    hit: collections.Counter[str] = collections.Counter()
    while hit.total() < kills:
        process = command.start(f"--config.workdir={run}", config=config)
        started = time.monotonic()
        try:
            process.communicate(timeout=rng.uniform(0.1, longest))
            return hit, 0.8 * min(longest, time.monotonic() - started)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            hit[stage(run)] += 1
    return hit, longest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    wanted = parser.parse_args().kills
    with tempfile.TemporaryDirectory(prefix="training-kills-") as temporary:
        root = Path(temporary)
        helpers.write_dataset(root / "data")
        config = helpers.tiny_config(root / "data", root / "unused")
        config.train.steps = STEPS
        config.checkpoint.minutes = 1e-4  # at every chance
        config.checkpoint.ema_every = 20
        file = helpers.write_config(root / "config.py", config)
        command = helpers.TrainCommand(root / "cache")

        command.run(
            "--config.train.steps=2", f"--config.workdir={root / 'warm'}", config=file
        )  # fills the cache
        started = time.monotonic()
        whole = command.run(f"--config.workdir={root / 'whole'}", config=file)
        longest = time.monotonic() - started
        assert whole.returncode == 0, whole.stderr
        expected_losses, (_, expected_ema) = losses(root / "whole"), restore_ema(root / "whole")

        hits: collections.Counter[str] = collections.Counter()
        killed, runs, lost, rng = 0, 0, 0, random.Random(0)
        while killed < wanted:
            run = root / f"run{runs}"
            hit, longest = train_with_kills(command, file, run, min(6, wanted - killed), longest, rng)
            hits += hit
            killed, runs = killed + hit.total(), runs + 1
            ended = command.run(f"--config.workdir={run}", config=file)
            same = (
                ended.returncode == 0
                and losses(run) == expected_losses
                and helpers.tree_equal(restore_ema(run)[1], expected_ema)
            )
            left = [str(path) for path in run.rglob("*tmp*")]
            lost += not same or bool(left)
            verdict = "same bits" if same else "DIFFERENT"
            print(f"run {runs}: {hit.total()} kills, {verdict}, left behind: {left or 'nothing'}", flush=True)
            if ended.returncode:
                print(ended.stderr[-2000:])
        print(f"\n{'moment of the kill':30} kills")
        for moment, count in sorted(hits.items()):
            print(f"{moment:30} {count}")
        print(f"{killed} kills in {runs} runs of {STEPS} steps: {lost} runs lost or changed")
        return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
