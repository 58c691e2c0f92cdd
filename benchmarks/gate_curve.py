"""The gate over a run: what `fluxdit_jax.validate` finds at each step whose EMA was kept (`checkpoint.ema_every`).

    python -m benchmarks.gate_curve RUN [RUN ...] [-- --pairs 50 --edits 20]

The runs are trained with `fluxdit_jax.train` as usual. What follows `--` goes to `validate`. RUN/validation is left as
the newest weights have it. A run that is in the results already is measured again and replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import replace_rows, table
from fluxdit_jax import validate
from fluxdit_jax.gate.report import FOLDER
from fluxdit_jax.run.checkpoint import ema_steps
from fluxdit_jax.run.run_directory import load_config, load_dataset

NAME = "gate_curve"
TESTS = ("memorisation", "vision_swap", "text_edit")


def measure(run: Path, options: list[str]) -> list[dict[str, Any]]:
    """A row for each step, oldest first."""
    config, manifest = load_config(run), load_dataset(run)
    model = config.model
    rows = []
    for step in sorted(ema_steps(run)):
        if validate.command(["--workdir", str(run), "--step", str(step), *options]) == 2:
            print(f"{run} step {step}: not all tests could be judged", file=sys.stderr)
        report = json.loads((run / FOLDER / "report.json").read_text())
        found = {name: report["metrics"][name] for name in TESTS}
        rows.append(
            {
                "run": run.name,
                "model": f"{model.depth}/{model.width}/{model.heads}",
                "resolution": manifest.resolution,
                "pictures": manifest.records("train"),
                "optimizer": f"{config.optim.name} {config.optim.lr:g}",
                "batch": config.optim.global_batch_size,
                "step": step,
                "steps": config.train.steps,
                "passed": report["passed"],
                "psnr_db": found["memorisation"]["numbers"]["psnr_median_db"],
                "device": report["device"],
            }
            | {name: metric["value"] if metric["judged"] else None for name, metric in found.items()}
        )
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    def share(value: float | None) -> str:
        return "not judged" if value is None else f"{value:.1%}"

    lines = [
        [
            row["run"], row["pictures"], row["resolution"], row["model"], row["optimizer"], row["batch"],
            f"{row['step']:,} of {row['steps']:,}", *(share(row[name]) for name in TESTS), f"{row['psnr_db']:.1f}",
            "PASS" if row["passed"] else "",
        ]
        for row in rows
    ]  # fmt: skip
    header = [
        "run",
        "pictures",
        "px",
        "model",
        "optimizer",
        "batch",
        "step",
        "memorised",
        "swapped",
        "edited",
        "dB",
        "",
    ]
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    runs, options = parser.parse_args(words[:cut]).runs, words[cut + 1 :]
    for run in runs:
        measured = measure(run, options)
        replace_rows(NAME, run.name, measured)
        print(show(measured))


if __name__ == "__main__":
    main()
