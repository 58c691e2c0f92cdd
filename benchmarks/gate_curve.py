"""The gate over a run: what `fluxdit_jax.validate` finds at each step whose EMA was kept (`checkpoint.ema_every`).

    python -m benchmarks.gate_curve RUN [RUN ...] [-- --pairs 50 --edits 20]
    python -m benchmarks.gate_curve --memorised RUN [-- --steps 3]    # only how many are memorised: much faster

The runs are trained with `fluxdit_jax.train` as usual. What follows `--` goes to `validate`, and RUN/validation is left
as the newest weights have it. A run that is in the results already is measured again and replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks.environment import replace_rows, table
from fluxdit_jax import validate
from fluxdit_jax.gate.memorisation import Memorisation
from fluxdit_jax.gate.report import FOLDER
from fluxdit_jax.gate.retrieval import Library
from fluxdit_jax.gate.sampler import Sampler
from fluxdit_jax.gate.subject import Subject
from fluxdit_jax.run.averages import ema_steps
from fluxdit_jax.run.run_directory import load_config, load_dataset
from fluxdit_jax.sampling.pipeline import Generator

NAME = "gate_curve"
TESTS = ("memorisation", "vision_swap", "text_edit")


def gate(run: Path, step: int, options: list[str]) -> dict[str, Any]:
    """What `validate` finds at a step."""
    if validate.command(["--workdir", str(run), "--step", str(step), *options]) == 2:
        print(f"{run} step {step}: not all tests could be judged", file=sys.stderr)
    report = json.loads((run / FOLDER / "report.json").read_text())
    found = {name: report["metrics"][name] for name in TESTS}
    return {
        "passed": report["passed"],
        "psnr_db": found["memorisation"]["numbers"]["psnr_median_db"],
        "device": report["device"],
    } | {name: metric["value"] if metric["judged"] else None for name, metric in found.items()}


def memorised(run: Path, step: int, options: list[str]) -> dict[str, Any]:
    """The share of the pictures that are drawn again from their own caption and vector at a step."""
    given = validate.parse_arguments(["--workdir", str(run), *options])
    subject = Subject.load(run, given.limit, data=given.data, step=step, vae=given.vae, seed=given.seed)
    generator = Generator.of(
        subject.settings, subject.manifest, steps=given.steps, batch_size=given.batch_size, method=given.method
    )
    own = Memorisation.plan(subject.eval_set).own
    drawn = Sampler(generator, subject.weights.ema, subject.decoder)(own)
    found = Library(subject.eval_set).retrieve(drawn, range(len(drawn)))
    return dict.fromkeys(TESTS) | {
        "memorisation": found.share,
        "passed": None,
        "psnr_db": found.numbers()["psnr_median_db"],
        "device": f"{jax.default_backend()}: {jax.devices()[0].device_kind}",
    }


def measure(run: Path, options: list[str], only_memorised: bool) -> list[dict[str, Any]]:
    """A row for each step, oldest first; each is written once it is there.

    Args:
      options: of `validate`.
    """
    config, manifest = load_config(run), load_dataset(run)
    model = config.model
    settings = {
        "run": run.name,
        "model": f"{model.depth}/{model.width}/{model.heads}",
        "resolution": manifest.resolution,
        "pictures": manifest.records("train"),
        "optimizer": f"{config.optim.name} {config.optim.lr:g}",
        "batch": config.optim.global_batch_size,
        "steps": config.train.steps,
    }
    at = memorised if only_memorised else gate
    rows: list[dict[str, Any]] = []
    for step in tqdm(sorted(ema_steps(run)), desc=run.name, unit="step", disable=None):
        rows.append(settings | {"step": step} | at(run, step, options))
        replace_rows(NAME, run.name, rows)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

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
    parser.add_argument("--memorised", action="store_true", help="only how many of the pictures are memorised")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:cut])
    for run in arguments.runs:
        print(show(measure(run, words[cut + 1 :], arguments.memorised)))


if __name__ == "__main__":
    main()
