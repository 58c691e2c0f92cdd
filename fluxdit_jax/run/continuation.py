"""Going on from a step: what the run directory holds beyond it is set aside, and the start is recorded.

A run that goes on from step S computes the steps after S again, perhaps with other values. What an earlier start left
of them (EMA weights, pictures, a validation report, lines of metrics.jsonl) is of other weights: it is moved to
`abandoned/<number>/` and never deleted. TensorBoard's files stay; the new one hides what they show of later steps.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import jax
from ml_collections import ConfigDict

from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.run import history
from fluxdit_jax.run.averages import ema_steps
from fluxdit_jax.run.checkpoint import CHECKPOINTS, DAMAGED, EMA, SHORT_EMA, Checkpoints, checkpoint_steps, ema_digest
from fluxdit_jax.run.differences import all_changes
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.run.metrics import METRICS, beyond, last_step
from fluxdit_jax.run.run_directory import NO_STAGES, RunError, record_start, ways_on
from fluxdit_jax.run.signals import any_process
from fluxdit_jax.shared.atomic_files import write_whole
from fluxdit_jax.state import TrainState

log = logging.getLogger(__name__)
ABANDONED = "abandoned"
_PICTURE = re.compile(r"step_(\d+)\.png")


def require_checkpoints(workdir: Path) -> None:
    """Refuses a directory where a run has been whose resumable checkpoints are gone, before anything is changed.

    A run that was stopped before its first checkpoint may start again: what it left is set aside.

    Raises:
      RunError: there was a checkpoint once, as far as the directory tells. The message says what is there, what to do.
    """
    if checkpoint_steps(workdir):
        return
    folder = workdir / CHECKPOINTS
    weights = [f"{name}/{step}" for name in (EMA, SHORT_EMA) for step in ema_steps(workdir, name)[-1:]]
    damaged = [f"{DAMAGED}/{path.name}" for path in (workdir / DAMAGED).glob("[0-9]*")]
    logged = last_step(workdir / METRICS)
    left = [*damaged, *weights, *([f"{METRICS} up to step {logged}"] if logged else [])]
    left += [name for name in ("samples", "validation", "tensorboard") if any((workdir / name).glob("*"))]
    # The folder is made at the first start, and the history with it, by every version that knows it.
    gone = not folder.is_dir() and left
    unknown = not (workdir / history.HISTORY).exists() and weights
    if not (damaged or gone or unknown or history.has_saved(workdir)):
        return
    state = "has no checkpoint in it" if folder.is_dir() else "is missing"
    raise RunError(
        f"{folder} {state}, but {workdir} holds a run that had one: {_listed(left) or history.HISTORY}. "
        f"Starting from step 0 would put all of it aside. {ways_on(workdir)}"
    )


def begin(
    workdir: Path,
    config: ConfigDict,
    manifest: Manifest,
    checkpoints: Checkpoints,
    state: TrainState,
    ends: Collection[int],
    stages: Mapping[str, Manifest] = NO_STAGES,
) -> None:
    """Sets aside what is beyond the state's step, and records the start and its changes. Every process calls it.

    Args:
      ends: the last step of each stage of the run.
      manifest, stages: of `record_start`.
    """
    step, found = int(state.step), checkpoints.latest_step()
    averages = {EMA: state.ema} | ({} if state.short_ema is None else {SHORT_EMA: state.short_ema})
    # A new run has nothing to be compared with; a digest costs the start of a program.
    digests = {} if found is None else {folder: tree_digest(tree) for folder, tree in averages.items()}
    primary = jax.process_index() == 0
    if primary:
        origin = config.resume.from_run or "new" if found is None else f"{CHECKPOINTS}/{found}"
        aside = set_aside(workdir, step, digests)
        _record(workdir, step, origin, aside, all_changes(workdir, config, manifest, stages))
        record_start(workdir, config, manifest, stages)
    # EMA weights that are due here and are missing, or are of other weights and were moved
    due = step in ends or step >= max(ends) or (step > 0 and step % config.checkpoint.ema_every == 0)
    missing = any(step not in ema_steps(workdir, folder) for folder in averages)
    if any_process([primary and due and missing])[0]:
        checkpoints.save_averages(step, state)


def _record(
    workdir: Path,
    step: int,
    origin: str,
    aside: tuple[Path, list[str]],
    all_of_them: tuple[list[str], list[str]],
) -> None:
    """The start in the log and in the history."""
    (changes, others), (folder, names) = all_of_them, aside
    if names:
        words = "the run goes on from step %d (%s). What it had beyond that is kept in %s: %s"
        log.warning(words, step, origin, folder, _listed(names))
    if changes:
        log.warning("config.resume.allow_changes: going on from step %d with %s", step, "; ".join(changes))
    if others:
        log.info("going on from step %d with %s", step, "; ".join(others))
    entry = {"step": step, "from": origin, "changes": changes, "other_changes": others}
    moved = {"folder": str(folder.relative_to(workdir)), "what": names} if names else None
    history.append(workdir, entry | {"set_aside": moved})


def set_aside(workdir: Path, step: int, digests: dict[str, str]) -> tuple[Path, list[str]]:
    """Moves what is beyond `step`, or at it and of other weights: (the new folder, the names of what was moved)."""
    numbers = [int(path.name) for path in (workdir / ABANDONED).glob("*") if path.name.isdigit()]
    folder = workdir / ABANDONED / str(max(numbers, default=0) + 1)
    lines = beyond(workdir / METRICS, step)
    names = _weights_beyond(workdir, step, digests)
    others_at_step = any(name.endswith(f"/{step}") for name in names)
    names += _pictures_beyond(workdir, step - others_at_step)
    names += _scores_beyond(workdir, step - others_at_step)
    if _report_is_beyond(workdir, step, digests.get(EMA)):
        names.append("validation")
    if lines:  # first: on a full disk nothing is moved
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(workdir / name, folder / name)  # ema/ may be a link to another disk
    if lines:
        names.append(f"{METRICS} from step {lines[0]['step']} on")
    return folder, names


def _weights_beyond(workdir: Path, step: int, digests: dict[str, str]) -> list[str]:
    def of_others(folder: str, number: int) -> bool:
        return number == step and folder in digests and ema_digest(workdir, number, folder) != digests[folder]

    return [
        f"{folder}/{number}"
        for folder in (EMA, SHORT_EMA)
        for number in ema_steps(workdir, folder)
        if number > step or of_others(folder, number)
    ]


def _pictures_beyond(workdir: Path, step: int) -> list[str]:
    matches = [_PICTURE.fullmatch(path.name) for path in sorted((workdir / "samples").glob("step_*.png"))]
    return [f"samples/{match[0]}" for match in matches if match and int(match[1]) > step]


def _scores_beyond(workdir: Path, step: int) -> list[str]:
    """Of later steps, with the report, which is of the last one or shows them."""
    steps = [path for path in sorted((workdir / "score" / "steps").glob("*.json")) if path.stem.isdigit()]
    names = [f"score/steps/{path.name}" for path in steps if int(path.stem) > step]
    reports = [name for name in ("score/score.json", "score/report.html") if names and (workdir / name).exists()]
    return names + reports


def _report_is_beyond(workdir: Path, step: int, digest: str | None) -> bool:
    try:
        report = json.loads((workdir / "validation" / "report.json").read_text(encoding="utf-8"))
        weights = report["weights"]
        other = weights["ema_step"] == step and weights.get("digest", digest) != digest
        return weights["ema_step"] > step or other
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False  # it speaks of no step


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
