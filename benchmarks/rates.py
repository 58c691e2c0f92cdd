"""Which learning rate, by width: held-out loss of Muon and AdamW after the same steps, on pictures not trained on.

    python -m benchmarks.rates cast-256 cast-256/train --heldout cast-256/heldout         # benchmarks.cast draws them
    python -m benchmarks.rates NAME DATASET --widths 384 --rates 1e-3 3e-3 --optimizers adamw --seeds 0 1
    python -m benchmarks.rates --show

Heads of 64; everything that is no matrix of a block is trained by Adam at a third of Muon's rate, up to `ADAM_MOST`.
Loss as in `benchmarks.learning`; a run that ends without a finite loss has none.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import RESULTS, replace_rows, table
from benchmarks.learning import Variant, curve, train
from fluxdit_jax.run.metrics import read_metrics

NAME = "rates"
ADAM_MOST = 1e-3
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def changes(optimizer: str, width: int, rate: float) -> dict[str, Any]:
    size = {"model.width": width, "model.heads": width // 64}
    adam = rate if optimizer == "adamw" else min(ADAM_MOST, rate / 3)
    return size | {"optim.name": optimizer, "optim.lr": rate, "optim.adam_lr": adam}


def show(rows: list[dict[str, Any]]) -> str:
    """Loss after the last step: a line for each set, optimizer and width, a column for each rate; mean over seeds."""
    found: dict[tuple[str, str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["set"], row["optimizer"], row["width"]][row["rate"]].append(
            row["curve"][-1]["loss"] if row["curve"] else math.nan
        )
    rates = sorted({row["rate"] for row in rows})
    lines = []
    for (name, optimizer, width), losses in sorted(found.items()):
        means = {rate: float(np.mean(values)) for rate, values in losses.items()}
        best = min(means, key=lambda rate: (math.isnan(means[rate]), means[rate]))
        cells = [("**" if rate == best else "") for rate in rates]
        lines.append(
            [name, optimizer, width]
            + [f"{mark}{means[rate]:.4f}{mark}" if rate in means else "-" for mark, rate in zip(cells, rates)]
        )
    return table(["set", "optimizer", "width", *(f"{rate:g}" for rate in rates)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", help="its name in the results")
    parser.add_argument("data", nargs="?", type=Path, help="dataset to train on")
    parser.add_argument("--heldout", type=Path, help="dataset not trained on; without it DATA's own holdout split")
    parser.add_argument("--widths", nargs="+", type=int, default=[192, 384, 768])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--optimizers", nargs="+", choices=("muon", "adamw"), default=["muon", "adamw"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--changes", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration, for all")
    parser.add_argument("--runs", type=Path, default=Path("runs/rates"), help="where the runs are kept")
    parser.add_argument("--show", action="store_true", help="print the table of what is measured")
    a = parser.parse_args()
    if not a.show and a.data is None:
        parser.error("give SET and DATA, or --show")
    for seed in [] if a.show else a.seeds:
        for optimizer in a.optimizers:
            for width in a.widths:
                for rate in a.rates:
                    run = f"{a.set}-{optimizer}-{width}-{rate:g}-{seed}"
                    given = {"train.steps": a.steps, "seed": seed} | dict(each.split("=", 1) for each in a.changes)
                    workdir = a.runs.absolute() / run
                    row = {"run": run, "set": a.set, "optimizer": optimizer, "width": width, "rate": rate, "seed": seed}
                    row |= {"steps": a.steps, "changes": a.changes}
                    try:
                        train(Variant(changes(optimizer, width, rate)), given, a.data.absolute(), workdir)
                        points = curve(workdir, a.heldout)
                    except subprocess.CalledProcessError:
                        log = read_metrics(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else []
                        if not any("health/broken" in entry for entry in log):
                            raise  # it is the command that was wrong, and not the rate
                        points = []
                    replace_rows(NAME, run, [row | {"curve": points}])
    print(show(json.loads((RESULTS / f"{NAME}.json").read_text())["rows"]))


if __name__ == "__main__":
    main()
