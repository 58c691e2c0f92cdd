"""RUN/score: `score.json` and `report.html` of the last scoring, and `steps/STEP.json` of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluxdit_jax.shared.json_files import write_json

FOLDER = "score"
SCORE, REPORT, STEPS = "score.json", "report.html", "steps"
# What two scorings share whose numbers make one curve.
CIRCUMSTANCES = ("dataset", "questions", "references", "eye", "sampling", "amounts")


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
