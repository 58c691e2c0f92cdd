"""The run directory: what a run was started with.

config.json       the configuration, every key
dataset.json      the manifest of the data set it was trained on, as it was; of stages that of the first
datasets/         of a run in stages, NAME.json of each
history.jsonl     its starts: from which step, with which changes, what was set aside
abandoned/        what was beyond the step that a start began with
damaged/          checkpoints that could not be read
after_save.log    what config.checkpoint.after said last; after_save.done: the checkpoint that it succeeded for
checkpoints/ ema/ short_ema/ tensorboard/ metrics.jsonl samples/ validation/ score/ profile/ train.log
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from fluxdit_jax.config import ConfigError, default_config
from fluxdit_jax.dataset.manifest import MANIFEST, DatasetError, Manifest, json_checksum
from fluxdit_jax.renamed_keys import converted
from fluxdit_jax.shared.atomic_files import write_whole
from fluxdit_jax.shared.lock import Lock
from fluxdit_jax.stages import Stage, stage_at, stages_of

NO_STAGES: Mapping[str, Manifest] = MappingProxyType({})
CONFIG = "config.json"
DATASET = "dataset.json"


class RunError(Exception):
    """The run directory cannot be used; the message says why and what to do."""


class RunLock(Lock):
    """The lock of a run directory, or of a folder that a program writes its results to; raises `RunError`."""

    error = RunError


def record_start(
    workdir: Path, config: ConfigDict, manifest: Manifest, stages: Mapping[str, Manifest] = NO_STAGES
) -> None:
    """Writes what the run is started with. Not before its state is there: what failed to start leaves no trace."""
    write_whole(workdir / DATASET, manifest.to_json())
    for name, of_stage in stages.items():
        stage_file(workdir, name).parent.mkdir(exist_ok=True)
        write_whole(stage_file(workdir, name), of_stage.to_json())
    values = config.to_dict()
    # absolute, because sampling and validation may be asked for from another directory
    values["data"]["path"] = whole_path(config.data.path)
    values["checksum"] = json_checksum(values)
    write_whole(workdir / CONFIG, json.dumps(values, indent=1) + "\n")


def whole_path(path: str) -> str:
    """The path from the root, as it is recorded."""
    return os.path.normpath(Path(path).absolute())


def load_config(workdir: Path) -> ConfigDict:
    """The configuration a run was last started with; keys that its version did not have get today's defaults.

    Raises:
      RunError: it is missing or damaged.
    """
    values = recorded(workdir).to_dict()
    try:
        return ConfigDict(_completed(values, default_config().to_dict()))
    except ValueError as error:
        raise RunError(f"{workdir / CONFIG} cannot be read: {error}") from error


def _completed(values: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    whole = dict(values)
    for name, default in defaults.items():
        if isinstance(default, dict):
            group = values.get(name, {})
            if not isinstance(group, dict):
                raise ValueError(f"{prefix}{name} is {group!r}, expected a group of keys")
            whole[name] = _completed(group, default, f"{prefix}{name}.")
        else:
            whole.setdefault(name, default)
    return whole


def _with_tuples(value: Any) -> Any:
    """JSON as a configuration: its lists are tuples."""
    if isinstance(value, dict):
        return {name: _with_tuples(member) for name, member in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def recorded(workdir: Path) -> ConfigDict:
    """What `record_start` wrote; raises `RunError`."""
    path = workdir / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        checksum = values.pop("checksum", None)  # runs of before had none
        if checksum is not None and checksum != json_checksum(values):
            raise ValueError(
                "its checksum is not that of its content: it is damaged, or was edited by hand. Bring a backup; "
                "or mend the value and take the line with the checksum out"
            )
        return ConfigDict(_with_tuples(converted(values)))
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist: {workdir} is not a run directory of fluxdit_jax.train") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def stage_file(workdir: Path, stage: str) -> Path:
    """Of the manifest of a stage's data set."""
    return workdir / "datasets" / f"{stage}.json"


def load_stage(workdir: Path, step: int) -> tuple[Stage, Manifest]:
    """The stage of a run that the weights of a step are of, and the manifest of its dataset; raises `RunError`."""
    try:
        stage = stage_at(stages_of(load_config(workdir)), step)
    except ConfigError as error:
        raise RunError(f"{workdir / CONFIG}: {error}") from error
    return stage, load_dataset(workdir, stage.name)


def load_dataset(workdir: Path, stage: str = "") -> Manifest:
    """The manifest of the data set of a run or of one of its stages; the data set itself may be gone."""
    path = stage_file(workdir, stage) if stage else workdir / DATASET
    try:
        text = path.read_text(encoding="utf-8")
        return Manifest.from_json(text, str(path))
    except FileNotFoundError as error:
        if not (workdir / CONFIG).exists():
            raise RunError(f"{path} does not exist: {workdir} is not a run directory of fluxdit_jax.train") from error
        raise RunError(f"{path} is missing. {_again(path)}") from error
    except (OSError, UnicodeDecodeError, DatasetError) as error:
        raise RunError(f"{path} cannot be read: {error}. {_again(path)}") from error


def _again(path: Path) -> str:
    return f"It is a copy of the manifest of the run's data set: cp DATASET/{MANIFEST} {path}"


def require_own(workdir: Path) -> None:
    """Raises `RunError` where a new run would be written among pictures, or into a data set."""
    if (workdir / CONFIG).exists():
        return
    for path in sorted(workdir.glob("*")):
        if path.name == MANIFEST or path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"):
            raise RunError(f"config.workdir is {workdir}, which has {path.name}: give the run a folder of its own")


def ways_on(workdir: Path) -> str:
    """What to do where a run has no checkpoint to go on from."""
    return (
        f"Bring back a backup of {workdir / 'checkpoints'}; or start from the run's EMA weights in another directory "
        f"(--config.workdir=NEW --config.resume.from_run={workdir}); or start anew, in another one or with {workdir} "
        "moved away"
    )
