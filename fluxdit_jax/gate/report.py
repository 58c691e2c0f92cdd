"""`validation/report.json`, and the same in TensorBoard."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.gate.advice import by_cause
from fluxdit_jax.gate.requirement import encoder_summary, family
from fluxdit_jax.gate.verdict import Case, Verdict
from fluxdit_jax.model.dit import ModelConfig, count_parameters
from fluxdit_jax.run.checkpoint import EMA
from fluxdit_jax.run.summary_writer import SummaryWriter
from fluxdit_jax.shared import image_grid

FOLDER = "validation"
SHOWN = 4  # cases of each kind: best, middle, worst


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """What was validated, and how.

    Attributes:
      workdir, dataset: directories. step: of the EMA weights.
      steps, method, seed: of the solver.
      device: in words. made: ISO 8601 time. seconds: by part, and `total`.
      networks: network evaluations, one for each picture and solver stage.
      digest: of the numbers of the EMA weights.
      weights: the folder of the run that they were read from.
      pictures: under test; drawn: how many of them are drawn portraits of `preprocess demo`; None: not known.
    """

    workdir: str
    dataset: str
    step: int
    steps: int
    method: str
    seed: int
    device: str
    made: str
    seconds: dict[str, float]
    networks: int
    digest: str = ""
    weights: str = EMA
    pictures: int | None = None
    drawn: int | None = None


def build_report(
    verdicts: list[Verdict], circumstances: Circumstances, config: ModelConfig, manifest: Manifest
) -> dict[str, Any]:
    """The content of `report.json`; `gate.requirement.require_report` reads it."""
    passed = all(verdict.passed for verdict in verdicts)
    return {
        "passed": passed,
        "verdict": "PASS: all three tests" if passed else "; ".join(_not_passed(verdicts)),
        "advice": [dataclasses.asdict(cause) for cause in by_cause(verdicts)],
        "metrics": {verdict.name: verdict.to_json() for verdict in verdicts},
        "weights": {
            "ema_step": circumstances.step,
            "folder": EMA,
            "digest": circumstances.digest,
            "workdir": circumstances.workdir,
        }
        | ({} if circumstances.weights == EMA else {"from": circumstances.weights}),
        "model": {
            "family": family(config),
            "width": config.width,
            "depth": config.depth,
            "heads": config.heads,
            "parameters": count_parameters(config),
            "dtype": config.dtype,
        },
        "encoders": {name: encoder_summary(identity) for name, identity in manifest.encoders.items()},
        "dataset": {
            "path": circumstances.dataset,
            "name": manifest.name,
            "format_version": manifest.version,
            "resolution": manifest.resolution,
            "records": manifest.records("train"),
            "pictures_tested": circumstances.pictures,
            "drawn_portraits": circumstances.drawn,
            "shards_sha256": [shard.sha256 for shard in manifest.shards.get("train", ())],
        },
        "sampling": {
            "method": circumstances.method,
            "steps": circumstances.steps,
            "seed": circumstances.seed,
            "network_evaluations": circumstances.networks,
        },
        "device": circumstances.device,
        "made": circumstances.made,
        "seconds": circumstances.seconds,
    }


def _not_passed(verdicts: list[Verdict]) -> list[str]:
    """What failed, and what could not be judged."""
    kinds = (
        ("FAIL", [verdict for verdict in verdicts if verdict.judged and not verdict.passed]),
        ("NOT JUDGED", [verdict for verdict in verdicts if not verdict.judged]),
    )
    return [f"{kind}: {', '.join(one.title.lower() for one in found)}" for kind, found in kinds if found]


def chosen_cases(verdict: Verdict, each: int = SHOWN) -> list[tuple[str, list[Case]]]:
    """The best, the middle and the worst cases, without repetition: (name, cases)."""
    ranked = sorted(verdict.cases, key=lambda case: -case.score)
    if len(ranked) <= 3 * each:
        return [("all, the best first", ranked)] if ranked else []
    middle = (len(ranked) - each) // 2
    return [
        ("best", ranked[:each]),
        ("median", ranked[middle : middle + each]),
        ("worst", ranked[-each:]),
    ]


def write_tensorboard(verdicts: list[Verdict], step: int, sheet: np.ndarray | None, folder: Path) -> None:
    """Numbers and pictures under `validation/` at the step of the weights."""
    with SummaryWriter(folder, suffix=".validation") as board:
        numbers = {"validation/passed": float(all(verdict.passed for verdict in verdicts))}
        for verdict in verdicts:
            name = f"validation/{verdict.name}"
            numbers[f"{name}/value"] = verdict.value
            for key, value in verdict.numbers.items():
                values = value if isinstance(value, dict) else {"": value}
                for part, number in values.items():
                    if isinstance(number, (int, float)) and math.isfinite(number):
                        numbers[f"{name}/{key}{'/' if part else ''}{part}"] = number
            rows, titles = [], []
            for rank, cases in chosen_cases(verdict):
                rows += [[image for _, image in case.pictures] for case in cases]
                titles += [f"{rank}: {case.label}" for case in cases]
            if rows:
                drawn = image_grid.grid(
                    rows, column_titles=[title for title, _ in verdict.cases[0].pictures], row_titles=titles
                )
                board.image(step, name, np.asarray(drawn))
            board.text(step, name, "\n\n".join([verdict.statement, *verdict.reasons]))
        if sheet is not None:
            board.image(step, "validation/all", sheet)
        for cause in by_cause(verdicts):
            name = f"validation/advice: {cause.name}"
            board.text(step, name, "\n\n".join([", ".join(cause.tests), *cause.lines]))
        about = "Of the gate (`fluxdit_jax.validate`) at the step of its weights; `validation/report.html` explains it."
        board.scalars(step, {(name, about): value for name, value in numbers.items()})
