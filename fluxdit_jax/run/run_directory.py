"""The run directory: what a run was started with, and whether it may go on with something else.

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
import logging
import os
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fluxdit_jax.config import ConfigError, default_config
from fluxdit_jax.dataset.manifest import MANIFEST, DatasetError, Manifest, json_checksum, load_manifest, parts_of
from fluxdit_jax.renamed_keys import converted
from fluxdit_jax.shared.atomic_files import write_whole
from fluxdit_jax.shared.lock import Lock
from fluxdit_jax.stages import Stage, key_of, stage_at, stages_of

log = logging.getLogger(__name__)
NO_STAGES: Mapping[str, Manifest] = types.MappingProxyType({})
CONFIG = "config.json"
DATASET = "dataset.json"

# Keys that may change between two starts of a run without changing its mathematics. A micro-batch may change
# because the draws of a step do not depend on how it is split; the length only while no schedule reads it.
FREE_KEYS = (
    "workdir",
    "device_memory_gb",
    "profile",
    "data.path",
    "data.micro_batch_size",
    "data.threads",
    "data.prefetch",
    "data.on_corrupt",
    "model.remat",
    "checkpoint.",
    "health.",
    "log.",
    "score.",
    "gate.",
    "plan.",
    "mesh.",
    "resume.",
)


# Keys that decide the shapes of the weights or the moments: no checkpoint fits after a change.
SHAPE_KEYS = (
    "model.width",
    "model.depth",
    "model.patch",
    "model.heads",
    "alignment.block",
    "optim.name",
    "optim.split_fused",
)
LENGTHS = ("train.steps", "train.images")


class RunError(Exception):
    """The run directory cannot be used; the message says why and what to do."""


class RunLock(Lock):
    """The lock of a run directory, or of a folder that a program writes its results to; raises `RunError`."""

    error = RunError


def check_resume(
    workdir: Path, config: ConfigDict, manifest: Manifest, stages: Mapping[str, Manifest] = NO_STAGES
) -> bool:
    """Whether there is a run in `workdir`, after checking that it may go on with this configuration and data.

    Args:
      manifest: of the dataset, of a run in stages that of the first. stages: those of all its stages, by name.

    Raises:
      RunError: the data set or a key that decides the mathematics is not what the run was started with, and
        `config.resume.allow_changes` is not set. The message lists every difference.
    """
    if not (workdir / CONFIG).exists():
        if any((workdir / "checkpoints").glob("[0-9]*")) and not config.resume.allow_changes:
            raise RunError(
                f"{workdir} has checkpoints but no {CONFIG}: what the run was started with cannot be compared. Bring "
                "a backup, or give --config.resume.allow_changes=True to go on with this configuration"
            )
        return False
    changes, _ = all_changes(workdir, config, manifest, stages)
    if changes and not config.resume.allow_changes:
        raise RunError(
            f"{workdir} holds a run with another configuration:\n  "
            + "\n  ".join(changes)
            + f"\n{_ways_on(workdir, changes)}"
        )
    return True


def _ways_on(workdir: Path, changes: list[str]) -> str:
    """What to do about refused changes."""
    keys = {change.partition(":")[0] for change in changes}
    shapes = sorted(keys & set(SHAPE_KEYS))
    if any(re.fullmatch("ema.short_decay: (None -> .*|.* -> None)", change) for change in changes):
        shapes.append("ema.short_decay")
    ways = "Give the old values, another workdir, or --config.resume.allow_changes=True to go on all the same"
    if shapes:
        ways = (
            f"A state of another shape cannot go on ({', '.join(shapes)}): give the old values, or another "
            "--config.workdir for a new run"
        )
    if any(key_of(key) != key and key_of(key) in LENGTHS for key in keys):
        ways += (
            ". A stage of another length moves the stages after it: what is there beyond the new ends is of another "
            "stage then, and is drawn as such"
        )
    if keys & set(LENGTHS):
        ways += (
            ". The cosine of optim.schedule ends with the run, so every step's rate depends on it: going on changes "
            "the rate from here on"
        )
    if "data.path" in keys:
        ways += (
            ". For a data set that has grown --config.resume.allow_changes=True goes on where the run is; for another "
            f"one (a stage, a resolution) give --config.workdir=NEW --config.resume.from_run={workdir}"
        )
    return ways


def all_changes(
    workdir: Path, config: ConfigDict, manifest: Manifest, stages: Mapping[str, Manifest] = NO_STAGES
) -> tuple[list[str], list[str]]:
    """What differs from the run's last start, in words: what decides the mathematics, and keys that may change."""
    if not (workdir / CONFIG).exists():
        unknown = any((workdir / "checkpoints").glob("[0-9]*"))
        return [f"{CONFIG} is missing: what the run was started with is not known"] if unknown else [], []
    recorded, new = _recorded(workdir), config.to_dict()
    new["data"]["path"] = _whole(config.data.path)
    changes, free = (config_changes(recorded, ConfigDict(new), of_free_keys=free) for free in (False, True))
    if difference := dataset_difference(load_dataset(workdir), manifest):
        changes.append(f"data.path: {config.data.path} is not the data set of this run ({DATASET}): {difference}")
    for name, of_stage in stages.items():
        if _stage_file(workdir, name).exists() and (
            difference := dataset_difference(load_dataset(workdir, name), of_stage)
        ):
            changes.append(f"data.path: the data set of the stage {name} is not that of this run: {difference}")
    return changes, free


def record_start(
    workdir: Path, config: ConfigDict, manifest: Manifest, stages: Mapping[str, Manifest] = NO_STAGES
) -> None:
    """Writes what the run is started with. Not before its state is there: what failed to start leaves no trace."""
    write_whole(workdir / DATASET, manifest.to_json())
    for name, of_stage in stages.items():
        _stage_file(workdir, name).parent.mkdir(exist_ok=True)
        write_whole(_stage_file(workdir, name), of_stage.to_json())
    values = config.to_dict()
    # absolute, because sampling and validation may be asked for from another directory
    values["data"]["path"] = _whole(config.data.path)
    values["checksum"] = json_checksum(values)
    write_whole(workdir / CONFIG, json.dumps(values, indent=1) + "\n")


def _whole(path: str) -> str:
    """The path from the root, as it is recorded."""
    return os.path.normpath(Path(path).absolute())


def config_changes(old: ConfigDict, new: ConfigDict, of_free_keys: bool = False) -> list[str]:
    """`key: old -> new` for every key that decides the mathematics and differs; or of the others.

    A key that the run's version did not have had the effect of its default.
    """
    before, after = flatten(default_config().to_dict()) | flatten(old.to_dict()), flatten(new.to_dict())
    # The length of a stage is never free: it moves the stages after it, and with them the data of their steps.
    free = FREE_KEYS + (LENGTHS if new.optim.schedule == "constant" else ())
    changes = []
    for key in sorted(before.keys() | after.keys()):
        own = key_of(key)
        is_free = any(own == f or (f[-1] == "." and own.startswith(f)) for f in free)
        is_free &= not (own != key and own in LENGTHS)
        if before.get(key) != after.get(key) and is_free == of_free_keys:
            changes.append(f"{key}: {before.get(key)!r} -> {after.get(key)!r}")
    return changes


def load_config(workdir: Path) -> ConfigDict:
    """The configuration a run was last started with; keys that its version did not have get today's defaults.

    Raises:
      RunError: it is missing or damaged.
    """
    values = _recorded(workdir).to_dict()
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


def _recorded(workdir: Path) -> ConfigDict:
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


def _stage_file(workdir: Path, stage: str) -> Path:
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
    path = _stage_file(workdir, stage) if stage else workdir / DATASET
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


def _dataset_identity(manifest: Manifest) -> tuple[list[str], tuple[float, ...], tuple[float, ...]]:
    """What makes two data sets the same for training: their train shards, and the statistics that follow."""
    shards = [shard.sha256 for shard in manifest.shards.get("train", ())]
    return shards, manifest.latent_mean, manifest.latent_std


def require_dataset(directory: Path, workdir: Path, stage: str = "") -> None:
    """Checks that a folder holds the data set that a run, or a stage of it, was last started with.

    A manifest that cannot be read is passed over: the run has its own copy, and the shards have checksums.

    Raises:
      DatasetError: there is no such folder.
      RunError: it holds another data set; the message says what differs.
    """
    try:
        now = load_manifest(directory)
    except DatasetError:
        if not directory.is_dir():
            raise
        return
    if difference := dataset_difference(load_dataset(workdir, stage), now):
        raise RunError(
            f"{directory} is not the data set that {workdir} was last trained on: {difference}. "
            "Give the one it was trained on, with --data; or train on with this one "
            "(--config.resume.allow_changes=True), and then validate"
        )


def find_dataset(workdir: Path, stage: Stage, data: Path | None = None) -> Path:
    """The directory of the dataset that a run, or a stage of it, was last started with.

    Args:
      data: where it is now, or a folder of several resolutions with it; None: where it was.

    Raises:
      DatasetError: it is not there.
      RunError: there is another dataset.
    """
    directory = data or Path(stage.config.data.path)
    if data is not None:
        directory = parts_of(data).get(stage.config.data.resolution, data)
    require_dataset(directory, workdir, stage.name)
    return directory


def difference_from(workdir: Path, step: int, new: Manifest) -> str:
    """How a data set differs from that of a run's step, in words; a run without a readable one says so."""
    try:
        return dataset_difference(load_stage(workdir, step)[1], new) or "the same data set"
    except (RunError, DatasetError):
        return f"cannot be compared, {workdir / DATASET} cannot be read"


def dataset_difference(old: Manifest, new: Manifest) -> str:
    """How the train split of a data set differs from that of another, in words; "" if it is the same."""
    if _dataset_identity(old) == _dataset_identity(new):
        return ""
    images = new.records("train"), old.records("train")
    found = [f"{images[0]} images, was {images[1]}"] if images[0] != images[1] else []
    for name in ("resolution", "fit"):
        values = getattr(new, name), getattr(old, name)
        found += [f"{name} {values[0]}, was {values[1]}"] if values[0] != values[1] else []
    for name in dict.fromkeys((*new.encoders, *old.encoders)):
        ids = [each.encoders[name].id if name in each.encoders else "none" for each in (new, old)]
        found += [f"{name} encoder {ids[0]}, was {ids[1]}"] if ids[0] != ids[1] else []
    return "; ".join(found) or "as many images, with other contents"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"group.key": value} of nested dicts."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
