"""RUN/score: `score.json` and `report.html` of the last scoring, and `steps/STEP.json` of all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fluxdit_jax.quality.answers import Amounts
from fluxdit_jax.quality.exam import Exam
from fluxdit_jax.quality.eye import Eye
from fluxdit_jax.shared.json_files import write_json

FOLDER = "score"
SCORE, REPORT, STEPS = "score.json", "report.html", "steps"
# What two scorings share whose numbers make one curve.
CIRCUMSTANCES = ("dataset", "questions", "references", "eye", "sampling", "amounts")


def circumstances(dataset: Path, exam: Exam, eye: Eye, sampling: dict[str, Any], amounts: Amounts) -> dict[str, Any]:
    """The `CIRCUMSTANCES` of a report; `sampling` says how pictures are drawn."""
    asked = len(exam.questions), len(exam.train)
    seen_by = {"encoder": eye.encoder.identity.id.partition("@")[0], "own": eye.own}
    values = str(dataset), *asked, seen_by, sampling, dataclasses.asdict(amounts)
    return dict(zip(CIRCUMSTANCES, values, strict=True))


def write(report: dict[str, Any], folder: Path) -> None:
    """Writes a report as the last one and as that of its step."""
    write_json(report, folder / STEPS / f"{report['step']}.json")
    write_json(report, folder / SCORE)


def history(report: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The reports of all steps under the same circumstances, and this one, by step; damaged ones are passed over."""
    found = {report["step"]: report}
    for path in sorted((folder / STEPS).glob("*.json")):
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            same = all(other[name] == json.loads(json.dumps(report[name])) for name in CIRCUMSTANCES)
            if same and all(set(one) >= {"value", "low", "high"} for one in other["numbers"].values()):
                found.setdefault(int(other["step"]), other)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return [found[step] for step in sorted(found)]
