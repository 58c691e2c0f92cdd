"""A run that is scored: its weights, its dataset, and what it took to train it so far."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.flow import FlowConfig
from fluxdit_jax.loader.reader import RecordSource
from fluxdit_jax.objective import patch_statistics
from fluxdit_jax.plan import training_flops
from fluxdit_jax.quality.answers import Pupil
from fluxdit_jax.quality.eye import Eye
from fluxdit_jax.run.differences import find_dataset
from fluxdit_jax.run.metrics import METRICS, read_metrics
from fluxdit_jax.run.run_directory import RunError, load_config, load_dataset, load_stage
from fluxdit_jax.run.validation_loss import ValidationLoss
from fluxdit_jax.run.weights import Weights, restore_weights
from fluxdit_jax.sampling.pipeline import Generator, besides_captions
from fluxdit_jax.settings import Settings, resolve
from fluxdit_jax.stages import stages_of
from fluxdit_jax.vae.decoder import Decoder


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A run with the weights that are scored, and its dataset.

    Attributes:
      config, manifest, settings: of the run, or of its stage that the weights are of.
      directory: of the dataset.
      first: steps of the stages before.
    """

    workdir: Path
    config: ConfigDict
    manifest: Manifest
    settings: Settings
    weights: Weights
    directory: Path
    first: int

    @classmethod
    def load(cls, workdir: Path, step: int | None, data: Path | None) -> Candidate:
        """
        Args:
          step: of the weights; None: the newest.
          data: directory of the dataset; None: where it was when the run was trained.
        """
        if not workdir.is_dir():
            raise RunError(f"{workdir} does not exist")
        load_config(workdir)  # raises for a folder that is no run, before its weights are looked for
        weights = restore_weights(workdir, step)
        stage, manifest = load_stage(workdir, weights.step)
        config = stage.config
        directory = find_dataset(workdir, stage, data)
        settings = resolve(config, manifest, stage.first)
        return cls(workdir, config, manifest, settings, weights, directory, stage.first)

    def split(self, name: str) -> RecordSource:
        """Raises `RunError` if the dataset has fewer than two records in this split."""
        if (count := self.manifest.records(name)) < 2:
            raise RunError(
                f"{self.directory} has {count} records in its {name} split, and a score takes two at least, with "
                "captions that the model has not seen: build the dataset with a larger --holdout"
            )
        return RecordSource(self.directory, self.manifest, name, self.config.data.on_corrupt)

    @property
    def untrained(self) -> str:
        """What to know of a model that was never asked for a caption alone; "" for others."""
        others = besides_captions(self.settings.model.conditions)
        if self.settings.flow.dropped(others):
            return ""
        what = " and ".join(others)
        return f"{self.workdir} never trained on captions without {what} (flow.drop); expect little of it"

    @property
    def epochs(self) -> float:
        """Of this dataset, in the present stage."""
        pictures = self.config.optim.global_batch_size * (self.weights.step - self.first)
        return pictures / self.manifest.records("train")

    def pupil(self, decoder: Decoder, eye: Eye, text: float, *, steps: int, method: str, batch: int) -> Pupil:
        """The model, to be asked, with a guidance scale of the caption."""
        generator = Generator.of(self.settings, self.manifest, steps=steps, batch_size=batch, method=method)
        return Pupil(generator, self.weights.ema, decoder, eye, self.settings.text_limit, text)

    def heldout_losses(self, pictures: int) -> np.ndarray:
        """Flow loss of holdout pictures, all conditions given, over a uniform grid of times, float64 [pictures]."""
        batch = max(1, self.config.data.micro_batch_size // (self.config.mesh.fsdp * max(1, self.config.mesh.data)))
        mean, std = self.manifest.latent_mean, self.manifest.latent_std
        return ValidationLoss(
            self.settings.model,
            FlowConfig(uniform_share=1.0),
            self.split("holdout"),
            mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp")),
            statistics=patch_statistics(mean, std, self.settings.model.patch),
            layout=self.settings.batch,
            batch_size=batch,
            pictures=pictures,
        ).of_pictures(jax.device_put(self.weights.ema, jax.devices()[0]))

    def cost(self) -> dict[str, Any]:
        """FLOPs of the training steps up to the weights, and seconds by the rates that were logged; None: unknown."""
        flops = seconds = 0.0
        path = self.workdir / METRICS
        log = read_metrics(path) if path.exists() else []
        known = True
        for stage in stages_of(load_config(self.workdir)):
            steps = min(self.weights.step, stage.last) - stage.first
            if steps <= 0:
                break
            manifest = load_dataset(self.workdir, stage.name)
            pictures = steps * stage.config.optim.global_batch_size
            flops += pictures * training_flops(resolve(stage.config, manifest, stage.first))
            rates = [e["images_per_second"] for e in log if stage.first < e["step"] <= stage.last
                     and e.get("images_per_second")]  # fmt: skip
            known = known and bool(rates)
            seconds += pictures / float(np.median(rates)) if rates else 0.0
        return {"tflop": flops / 1e12, "seconds": seconds if known else None}
