"""A trained run to draw from. A test module asks for it with `pytest_plugins = ("drawing_fixtures",)`."""

from __future__ import annotations

from pathlib import Path

import pytest
from build_fixtures import options, write_photos
from drawing_helpers import config

from fluxdit_jax.train import train
from preprocess.build.build import build


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, draw_photo, quick_compile) -> Path:
    """A folder with photos/, ds/ and the trained run/: ema/4, ema/8 and checkpoints/8."""
    root = tmp_path_factory.mktemp("sample")
    write_photos(root / "photos", 8, draw_photo)
    build(options(root / "photos", root / "ds", resolution=64, holdout=0.0))
    assert train(config(root / "ds", root / "run")) == 0
    return root
