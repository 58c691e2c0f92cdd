"""Stages against the last resolution alone, and positions by index against scaled ones, on pictures not trained on.

    python -m preprocess build --input PHOTOS --output DATASET --resolution 64,128 --modulus 32 --holdout 0.1 \
        --vae builtin:dct --text-encoder builtin:hash --vision-encoder builtin:tone
    python -m benchmarks.stages DATASET [--seeds 3]

`configs/demo_stages.py` at a constant learning rate, so that every held-out loss on the way counts: of the EMA at 128
px, by FLOPs (by hand, three forward passes) and by seconds of training. Each variant is a run of `fluxdit_jax.train`,
which goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import ROOT, table, write
from fluxdit_jax.plan import training_flops
from fluxdit_jax.prepared import Prepared
from fluxdit_jax.run.metrics import read_metrics
from fluxdit_jax.run.run_directory import load_config
from fluxdit_jax.stages import stages_of

NAME = "stages"
SMALL, LARGE, ALONE = 900, 220, 540  # steps: of the stages, and of the last resolution alone
EVERY = 20  # steps between held-out losses


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    stages: str
    steps: dict[str, int]
    positions: str


VARIANTS = (
    Variant("stages, index", "px64, px128", {"px64": SMALL, "px128": LARGE}, "index"),
    Variant("stages, scaled", "px64, px128", {"px64": SMALL, "px128": LARGE}, "scaled"),
    Variant("128 px alone, index", "px128", {"px128": ALONE}, "index"),
    Variant("128 px alone, scaled", "px128", {"px128": ALONE}, "scaled"),
)


def train(variant: Variant, seed: int, data: Path, workdir: Path) -> None:
    """Runs a variant, or goes on with it."""
    command = [sys.executable, "-m", "fluxdit_jax.train", "--config=configs/demo_stages.py"]
    values: dict[str, Any] = {
        "data.path": data, "workdir": workdir, "seed": seed, "train.stages": variant.stages,
        "model.positions": variant.positions, "log.every": 10,
        "log.preview_every": 0, "log.minutes": 0,
    }  # fmt: skip
    values |= {f"stages.{name}.train.steps": steps for name, steps in variant.steps.items()}
    values |= {f"stages.{name}.optim.schedule": "constant" for name in variant.steps}
    values |= {"stages.px64.log.heldout_every": 10**6, "stages.px128.log.heldout_every": EVERY}
    subprocess.run([*command, *(f"--config.{key}={value}" for key, value in values.items())], cwd=ROOT, check=True)


def curve(workdir: Path) -> list[dict[str, float]]:
    """The held-out losses at 128 px of a run, with the FLOPs and the seconds of training before each."""
    entries = read_metrics(workdir / "metrics.jsonl")
    points, flops, seconds, before = [], 0.0, 0.0, 0
    for prepared in map(Prepared.of, stages_of(load_config(workdir))):
        stage, batch = prepared.stage, prepared.settings.global_batch_size
        own = [entry for entry in entries if stage.first < entry["step"] <= stage.last]
        pace = float(np.median([batch / entry["images_per_second"] for entry in own if "images_per_second" in entry]))
        for entry in own:
            name = "heldout_loss" if stage.name == "px128" else "heldout_loss/px128"
            if name in entry:
                done = entry["step"] - stage.first
                points.append(
                    {
                        "step": entry["step"],
                        "flops": flops + done * batch * training_flops(prepared.settings),
                        "seconds": seconds + done * pace,
                        "loss": entry[name],
                    }
                )
        before = stage.last - stage.first
        flops += before * batch * training_flops(prepared.settings)
        seconds += before * pace
    return points


def at(points: list[dict[str, float]], what: str, value: float) -> float:
    """The loss of a curve where `what` has a value, interpolated; NaN beyond its end."""
    x = [point[what] for point in points]
    return float(np.interp(value, x, [point["loss"] for point in points], right=float("nan")))


def show(curves: dict[str, list[list[dict[str, float]]]]) -> str:
    """Two tables: at equal FLOPs and seconds, and after the switch."""

    def spread(values: list[float]) -> str:
        return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"

    staged, alone = curves[VARIANTS[0].name], curves[VARIANTS[2].name]
    rows = []
    for share in (0.85, 0.9, 1.0):
        for what in ("flops", "seconds"):
            budgets = [points[-1][what] * share for points in staged]
            rows.append(
                [
                    f"{share:.0%} of the stages' {what}",
                    *(
                        spread([at(points, what, budget) for points, budget in zip(curves[name], budgets, strict=True)])
                        for name in curves
                    ),
                ]
            )
    first = table(["held-out loss at 128 px, at", *curves], rows)
    after = []
    for steps in (0, 20, 60, 100, 200):
        found = [
            spread([next(p["loss"] for p in points if p["step"] == SMALL + steps) for points in curves[v.name]])
            for v in VARIANTS[:2]
        ]
        after.append([f"{steps}", *found])
    second = table(["steps after the switch", *(v.name for v in VARIANTS[:2])], after)
    ratio = np.mean([points[-1]["flops"] for points in staged]) / np.mean([points[-1]["flops"] for points in alone])
    return f"{first}\n\n{second}\n\nFLOPs of the stages over those of 128 px alone: {ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="dataset of 64 and 128 px, with a holdout split")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/stages"), help="where the runs are kept")
    arguments = parser.parse_args()
    curves: dict[str, list[list[dict[str, float]]]] = {variant.name: [] for variant in VARIANTS}
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            workdir = arguments.runs.absolute() / f"{variant.name.replace(', ', '-').replace(' ', '-')}-{seed}"
            train(variant, seed, arguments.data.absolute(), workdir)
            curves[variant.name].append(curve(workdir))
    write(NAME, curves)
    print(show(curves))


if __name__ == "__main__":
    main()
