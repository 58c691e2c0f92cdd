"""What a mechanism does to learning: held-out loss at equal steps, FLOPs and seconds, on pictures not trained on.

    python -m benchmarks.cast --output cast          # a drawn set: train, heldout (combinations), shuffled
    for part in train heldout shuffled; do
        python -m preprocess build --input cast/$part --output cast-256/$part --resolution 256 --holdout 0 \
            --vae builtin:dct --text-encoder builtin:hash --vision-encoder builtin:tone --vision-patches 256; done
    python -m benchmarks.learning cast-256 cast-256/train --heldout cast-256/heldout --shuffled cast-256/shuffled
    python -m benchmarks.learning photographs photos-256    # its own holdout split
    python -m benchmarks.learning cast-256-nano ... --changes model.width=384 model.depth=12 model.heads=6
    python -m benchmarks.learning --show

Every variant is a run of `fluxdit_jax.train`, which goes on where it was stopped; the variants of a seed follow each
other, so that a slow hour of the machine meets all. The loss is that of the EMA by the dense network, over the same
pictures, noise and uniform times for all. A difference is that of two runs of one seed, given with its standard error
over the seeds; below 0 the variant is ahead. Two must not help: `shuffled` has the captions of other pictures, `aligned
to others` is held against their patches.

These sizes show whether a mechanism is right and harmless, not how much it gains in a real run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import RESULTS, ROOT, replace_rows, table
from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.flow import FlowConfig
from fluxdit_jax.loader.reader import RecordSource
from fluxdit_jax.plan import training_flops
from fluxdit_jax.prepared import Prepared
from fluxdit_jax.run.averages import ema_steps, restore_ema
from fluxdit_jax.run.metrics import read_metrics
from fluxdit_jax.run.run_directory import load_config
from fluxdit_jax.run.validation_loss import ValidationLoss
from fluxdit_jax.stages import stages_of

Curve = list[dict[str, float]]  # step, flops, seconds and loss of each point
NAME = "learning"
EVERY = 50  # steps between the EMA weights that are measured
PICTURES, TIMES = 240, 8  # at most of the held-out set, and quantiles of uniform time
# A network with six blocks, so that routing has a middle; at a constant rate every point of a curve counts.
BASE: dict[str, Any] = {
    "model.depth": 6, "routing.first": 1, "routing.last": 1, "optim.schedule": "constant", "optim.lr": 3e-3,
    "optim.adam_lr": 1e-3, "optim.warmup_steps": 50, "flow.shift": 1.0, "flow.drop": "all 0.1, text 0.05, vision 0.1",
    "log.every": 10, "log.preview_every": 0, "log.heldout_every": 0, "log.minutes": 0, "checkpoint.ema_every": EVERY,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Variant:
    """A mechanism that is compared.

    Attributes:
      changes: to BASE.
      shuffled: trained on the dataset whose captions are those of other pictures.
      before: Python that the training process runs first.
    """

    changes: dict[str, Any]
    shuffled: bool = False
    before: str = ""


ALIGNED = {"alignment.block": 2, "alignment.until": 200}
# Every sample of a micro-batch is given the patches of the one before it.
OTHERS = (
    "import jax.numpy as jnp; from fluxdit_jax import alignment; true = alignment.targets; "
    "alignment.targets = lambda patches, *more: true(jnp.roll(patches, 1, 0), *more)"
)
VARIANTS = {
    "muon": Variant({}),
    "adamw": Variant({"optim.name": "adamw", "optim.lr": 1e-3}),
    "muon split": Variant({"optim.split_fused": True}),
    "routed": Variant({"routing.share": 0.5}),
    "aligned": Variant(ALIGNED),
    "aligned to others": Variant(ALIGNED, before=OTHERS),
    "shuffled": Variant({}, shuffled=True),
}


def train(variant: Variant, given: dict[str, Any], data: Path, workdir: Path) -> None:
    """Runs a variant with keys of the configuration, or goes on with it."""
    values = BASE | given | variant.changes | {"data.path": data, "workdir": workdir}
    start = f"{variant.before}\nimport runpy; runpy.run_module('fluxdit_jax.train', run_name='__main__')"
    command = [sys.executable, "-c", start, "--config=configs/demo.py"]
    subprocess.run([*command, *(f"--config.{key}={value}" for key, value in values.items())], cwd=ROOT, check=True)


def curve(workdir: Path, heldout: Path | None, pictures: int = PICTURES) -> Curve:
    """Held-out loss at each step whose EMA is kept, with the FLOPs and the seconds of training before it."""
    prepared = Prepared.of(stages_of(load_config(workdir))[0])
    settings, batch = prepared.settings, prepared.settings.global_batch_size
    directory = heldout or Path(prepared.stage.config.data.path)
    measure = ValidationLoss(
        settings.model,
        FlowConfig(uniform_share=1.0),
        RecordSource(directory, load_manifest(directory), "train" if heldout else "holdout"),
        mesh=prepared.mesh,
        statistics=prepared.statistics,
        layout=settings.batch.without_patches(),
        batch_size=48,
        pictures=pictures,
        times=TIMES,
    )
    logged = [e["images_per_second"] for e in read_metrics(workdir / "metrics.jsonl") if "images_per_second" in e]
    seconds, flops = batch / float(np.median(logged)), batch * training_flops(settings)
    return [
        {"step": step, "flops": step * flops, "seconds": step * seconds}
        | {"loss": measure(restore_ema(workdir, step)[1])["heldout_loss"]}
        for step in ema_steps(workdir)
    ]


def at(points: Curve, what: str, value: float) -> float:
    """The loss of a curve where `what` has a value, interpolated."""
    return float(np.interp(value, [point[what] for point in points], [point["loss"] for point in points]))


def difference(ours: Curve, base: Curve, what: str) -> float:
    """Loss of ours less that of the base, where the first of both curves ends."""
    end = min(ours[-1][what], base[-1][what])
    return at(ours, what, end) - at(base, what, end)


def in_words(values: list[float]) -> str:
    """The mean with its standard error."""
    if len(values) < 2:
        return f"{values[0]:+.4f}"
    return f"{np.mean(values):+.4f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}"


def row_of(variant: str, curves: dict[int, Curve], base: dict[int, Curve]) -> list[str]:
    """A row of the table: a variant against the base, both by seed."""
    seeds = sorted(curves.keys() & base.keys())
    steps, loss, flops, seconds = (
        float(np.mean([curves[seed][-1][what] for seed in seeds])) for what in ("step", "loss", "flops", "seconds")
    )
    compared = ["-"] * 3
    if curves is not base:
        compared = [
            in_words([difference(curves[seed], base[seed], what) for seed in seeds])
            for what in ("step", "flops", "seconds")
        ]
    return [variant, f"{len(seeds)}", f"{steps:.0f}", f"{loss:.4f}", f"{flops / 1e12:.1f}", f"{seconds:.0f}", *compared]


def show(rows: list[dict[str, Any]]) -> str:
    """A table for each set: every variant against the first."""
    parts = []
    for name in dict.fromkeys(row["set"] for row in rows):
        curves: dict[str, dict[int, Curve]] = {}
        for row in (row for row in rows if row["set"] == name):
            curves.setdefault(row["variant"], {})[row["seed"]] = row["curve"]
        base = curves.get(next(iter(VARIANTS)), {})
        lines = [
            row_of(variant, curves[variant], base)
            for variant in VARIANTS
            if curves.get(variant, {}).keys() & base.keys()
        ]
        header = ["variant", "seeds", "steps", "loss", "TFLOP", "s", "at equal steps", "at equal FLOPs", "at equal s"]
        parts.append(f"{name}\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", help="its name in the results")
    parser.add_argument("data", nargs="?", type=Path, help="dataset to train on")
    parser.add_argument("--heldout", type=Path, help="dataset not trained on; without it DATA's own holdout split")
    parser.add_argument("--shuffled", type=Path, help="DATA with the captions of other pictures")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="held-out ones that are measured")
    parser.add_argument("--changes", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration, for all")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="where the runs are kept")
    parser.add_argument("--show", action="store_true", help="print the tables of what is measured")
    a = parser.parse_args()
    if not a.show and a.data is None:
        parser.error("give SET and DATA, or --show")
    for seed in [] if a.show else a.seeds:
        for name in a.variants:
            variant, run = VARIANTS[name], f"{a.set}-{name}-{seed}".replace(" ", "-")
            data = a.shuffled if variant.shuffled else a.data
            if data is None:
                continue
            given = {"train.steps": a.steps, "seed": seed} | dict(change.split("=", 1) for change in a.changes)
            train(variant, given, data.absolute(), a.runs.absolute() / run)
            points = curve(a.runs.absolute() / run, a.heldout, a.pictures)
            replace_rows(NAME, run, [{"run": run, "set": a.set, "variant": name, "seed": seed, "curve": points}])
    print(show(json.loads((RESULTS / f"{NAME}.json").read_text())["rows"]))


if __name__ == "__main__":
    main()
