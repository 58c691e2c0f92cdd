"""A stage with what it takes to run it: its dataset, its plain values, its program."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from fluxdit_jax.dataset.manifest import MANIFEST, DatasetError, Manifest, load_manifest, parts_of
from fluxdit_jax.device import devices, sharding
from fluxdit_jax.device.memory_plan import MemoryPlan, require_fit
from fluxdit_jax.loader.reader import RecordSource
from fluxdit_jax.objective import patch_statistics
from fluxdit_jax.program import CompiledStep, Program
from fluxdit_jax.settings import Settings, resolve
from fluxdit_jax.stages import Stage


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A stage, ready to be trained: its dataset, settings, mesh and program.

    Attributes:
      statistics: (mean, std) of the dataset's latents, see `patch_statistics`.
    """

    stage: Stage
    manifest: Manifest
    settings: Settings
    statistics: tuple[np.ndarray, np.ndarray]
    mesh: jax.sharding.Mesh

    @classmethod
    def of(cls, stage: Stage) -> Prepared:
        """
        Raises:
          DatasetError: the dataset is not there or damaged. ConfigError, MeshError: the stage does not fit it, or the
            devices.
        """
        config = stage.config
        manifest = _manifest(stage)
        settings = resolve(config, manifest, stage.first)
        open_source(config, manifest)  # now, rather than in a week
        if config.log.heldout_every and manifest.records("holdout"):
            open_source(config, manifest, "holdout")
        return cls(
            stage,
            manifest,
            settings,
            patch_statistics(manifest.latent_mean, manifest.latent_std, settings.model.patch),
            sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.data.micro_batch_size),
        )

    @functools.cached_property
    def program(self) -> Program:
        return Program(self.settings, self.mesh, self.statistics)

    @functools.cached_property
    def compiled(self) -> CompiledStep:
        return self.program.compile()

    def planned_memory(self) -> MemoryPlan:
        """What the step needs of a device; compiles it. Raises `OutOfMemory` where that is more than it has."""
        plan = self.program.memory(self.compiled)
        own = f"--config.stages.{self.stage.name}." if self.stage.name else "--config."
        smaller = [(what.replace("--config.", own), make) for what, make in self.program.smaller()]
        require_fit(plan, self.stage.config.device_memory_gb, devices.memory_limit_gb(), smaller)
        return plan


def open_source(config: ConfigDict, manifest: Manifest, split: str = "train") -> RecordSource:
    """The records of a split. It holds files open, so a run has one for the stage it is in."""
    return RecordSource(config.data.path, manifest, split, config.data.on_corrupt)


def _manifest(stage: Stage) -> Manifest:
    config = stage.config
    try:
        return load_manifest(config.data.path)
    except DatasetError as error:
        if config.data.resolution is not None:
            root = Path(config.data.path).parent
            found = ", ".join(map(str, parts_of(root))) or "none"
            if (root / MANIFEST).exists():
                raise DatasetError(
                    f"config.data.resolution is {config.data.resolution}, and {root} is one dataset of "
                    f"{load_manifest(root).resolution} px. Leave the key and train.stages out; or move it to NEW/"
                    f"{load_manifest(root).resolution} and give `python -m preprocess build --output NEW --resolution "
                    "...` with all resolutions"
                ) from error
            raise DatasetError(
                f"config.data.resolution is {config.data.resolution}, and {root} has datasets of these resolutions: "
                f"{found}. `python -m preprocess build --output {root} --resolution ...` adds one. ({error})"
            ) from error
        if parts_of(config.data.path):
            raise DatasetError(f"{error}; or choose with --config.data.resolution") from error
        raise


def of_one_image_set(stages: list[Prepared]) -> str:
    """How the datasets of stages differ in what they must have in common, in words; "" if they do not."""
    first = stages[0]
    for each in stages[1:]:
        name = each.stage.name
        counts = [one.manifest.records("train") for one in (first, each)]
        if counts[0] != counts[1]:
            return f"stage {name} has {counts[1]} images to train on, {first.stage.name} has {counts[0]}"
        if each.settings.model.conditions != first.settings.model.conditions:
            return f"stage {name} has other conditions than {first.stage.name}"
        for encoder, identity in first.manifest.encoders.items():
            if encoder not in each.manifest.encoders:
                continue  # patches that one of them has not: `resolve` says so where they are needed
            if each.manifest.encoders[encoder].sha256 != identity.sha256:
                return f"the {encoder} encoder of stage {name} is not that of {first.stage.name}"
    return ""
