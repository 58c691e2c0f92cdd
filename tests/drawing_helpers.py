"""A small run to draw from, and drawing from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from training_helpers import tiny_config

from fluxdit_jax.sample import sample
from fluxdit_jax.sampling.arguments import parse_arguments

SHORT = "photo number 3 of a dog"  # 7 tokens, as the captions have


def config(dataset: Path, workdir: Path):
    c = tiny_config(dataset, workdir)
    c.train.steps, c.checkpoint.ema_every = 8, 4
    return c


def draw(scene: Path, *arguments: str, run: str = "run") -> np.ndarray:
    """The first picture of a command with a small number of steps."""
    given = ["--workdir", str(scene / run)] if run else []
    return sample(parse_arguments([*given, "--out", str(scene / "x.png"), *arguments]))[0]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))
