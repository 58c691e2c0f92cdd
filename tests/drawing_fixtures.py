"""A trained run to draw from. A test module asks for it with `pytest_plugins = ("drawing_fixtures",)`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from build_fixtures import options, write_photos
from PIL import Image
from training_helpers import tiny_config

from fluxdit_jax.sample import sample
from fluxdit_jax.sample_arguments import parse_arguments
from fluxdit_jax.train import train
from preprocess.build import build

SHORT = "photo number 3 of a dog"  # 7 tokens, as the captions have


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, draw_photo, quick_compile) -> Path:
    """A folder with photos/, ds/ and the trained run/: ema/4, ema/8 and checkpoints/8."""
    root = tmp_path_factory.mktemp("sample")
    write_photos(root / "photos", 8, draw_photo)
    build(options(root / "photos", root / "ds", resolution=64, holdout=0.0))
    assert train(config(root / "ds", root / "run")) == 0
    return root


def config(dataset: Path, workdir: Path):
    c = tiny_config(dataset, workdir)
    c.model.channels, c.model.text_width, c.model.vision_width = 16, 1024, 1024
    c.train.steps, c.checkpoint.ema_every = 8, 4
    return c


def draw(scene: Path, *arguments: str, run: str = "run") -> np.ndarray:
    """The first picture of a command with a small number of steps."""
    given = ["--workdir", str(scene / run)] if run else []
    return sample(parse_arguments([*given, "--out", str(scene / "x.png"), *arguments]))[0]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))
