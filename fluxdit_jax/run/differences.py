"""How a configuration and a data set differ from those of a run, and whether it may go on with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from fluxdit_jax.config import default_config
from fluxdit_jax.dataset.manifest import DatasetError, Manifest, load_manifest, parts_of
from fluxdit_jax.run.run_directory import (
    CONFIG,
    DATASET,
    NO_STAGES,
    RunError,
    load_dataset,
    load_stage,
    recorded,
    stage_file,
    whole_path,
)
from fluxdit_jax.stages import LENGTHS, Stage, key_of

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
    old, new = recorded(workdir), config.to_dict()
    new["data"]["path"] = whole_path(config.data.path)
    changes, free = (config_changes(old, ConfigDict(new), of_free_keys=free) for free in (False, True))
    if difference := dataset_difference(load_dataset(workdir), manifest):
        changes.append(f"data.path: {config.data.path} is not the data set of this run ({DATASET}): {difference}")
    for name, of_stage in stages.items():
        if stage_file(workdir, name).exists() and (
            difference := dataset_difference(load_dataset(workdir, name), of_stage)
        ):
            changes.append(f"data.path: the data set of the stage {name} is not that of this run: {difference}")
    return changes, free


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


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{"group.key": value} of nested dicts."""
    return traverse_util.flatten_dict(tree, sep=".")


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


def _dataset_identity(manifest: Manifest) -> tuple[list[str], tuple[float, ...], tuple[float, ...]]:
    """What makes two data sets the same for training: their train shards, and the statistics that follow."""
    shards = [shard.sha256 for shard in manifest.shards.get("train", ())]
    return shards, manifest.latent_mean, manifest.latent_std
