"""A run of a random network, of pictures that are not square, exported as a pipeline of diffusers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from build_fixtures import options
from diffusers import DiffusionPipeline
from drawing_helpers import config
from PIL import Image
from training_helpers import lively

from fluxdit_jax.dataset.manifest import Manifest, load_manifest
from fluxdit_jax.export import export
from fluxdit_jax.model import dit
from fluxdit_jax.run.checkpoint import Checkpoints
from fluxdit_jax.run.run_directory import record_start
from fluxdit_jax.sample import sample
from fluxdit_jax.sampling.arguments import parse_arguments
from fluxdit_jax.settings import resolve
from preprocess.build.build import build

TRUSTED = {"trust_remote_code": True}


@dataclasses.dataclass(frozen=True)
class Scene:
    """A folder with photos/, ds/, run/ and exported/, which diffusers draws from."""

    root: Path
    manifest: Manifest

    def ours(self, *given: str) -> list[np.ndarray]:
        out = str(self.root / "ours.png")
        return sample(parse_arguments(["--workdir", str(self.root / "run"), "--out", out, *given]))

    def pipe(self, folder: str = "exported", **more: Any) -> Any:
        pipe = DiffusionPipeline.from_pretrained(self.root / folder, **TRUSTED, **more)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def make(root: Path, draw_photo: Any, bundle: str = "none", **encoders: Any) -> Scene:
    (root / "photos").mkdir()
    for number in range(3):
        height, width = (64, 160) if number else (96, 96)
        Image.fromarray(draw_photo(height, width, number)).save(root / "photos" / f"p{number}.png")
        (root / "photos" / f"p{number}.txt").write_text(f"photo number {number} of a dog")
    build(options(root / "photos", root / "ds", resolution=64, holdout=0.0, **encoders))
    manifest = load_manifest(root / "ds")
    c = config(root / "ds", root / "run")
    c.model.width, c.model.depth, c.flow.shift = 32, 2, 2.0
    settings = resolve(c, manifest)
    with Checkpoints(root / "run", keep=2) as checkpoints:
        checkpoints.save_ema(3, lively(dit.build(settings.model)[1], seed=3, scale=0.1))
    record_start(root / "run", c, manifest)
    export(root / "run", root / "exported", form="diffusers", license="cc0-1.0", bundle=bundle)
    return Scene(root, manifest)
