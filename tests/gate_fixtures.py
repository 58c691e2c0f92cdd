"""Fixtures of the gate's tests. A test module asks for them with `pytest_plugins = ("gate_fixtures",)`."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from preprocess.demo import COMPOSITIONS, LIGHTS, compose
from preprocess.encoders.builtin import DctVae


@pytest.fixture(scope="session")
def demo_pictures() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The demonstration set as the quickstart's codec keeps it: 100 pictures, and composition and light of each."""
    vae, images = DctVae(), []
    for composition in COMPOSITIONS:
        drawing = compose(composition)
        for light in LIGHTS:
            picture = Image.fromarray(drawing.shade(light))
            size = tuple(side // 4 for side in picture.size)
            small = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
            images.append(vae.decode(vae.encode(small[None]))[0])
    numbers = np.arange(len(images))
    return images, numbers // len(LIGHTS), numbers % len(LIGHTS)


@pytest.fixture(scope="session")
def demo_looking() -> list[str]:
    """Where the person of each picture looks: "left", "right" or "front"."""
    return [composition.looking for composition in COMPOSITIONS for _ in LIGHTS]
