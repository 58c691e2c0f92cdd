"""The light changes of a gate set, against closed forms, and on photographs that a vision encoder looks at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from fluxdit_jax.dataset.grid import Place
from preprocess.encoders import load_vision_encoder
from preprocess.inspect.separation import separate_lights
from preprocess.subset.candidates import SubsetOptions, variant
from preprocess.subset.lights import FALL, LIGHTS, Light, lit
from preprocess.subset.views import MIRRORED, ORIGINAL

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")  # in the package: no download
COLOURED = [light for light in LIGHTS if light.towards == (0, 0)]
SIDED = [light for light in LIGHTS if light.towards != (0, 0)]


def named(light: Light) -> str:
    return light.name


def linear(code: np.ndarray | float) -> np.ndarray:
    """sRGB codes to linear light, as the standard writes it."""
    value = np.asarray(code, np.float64) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def photograph(name: str, shorter: int = 128) -> np.ndarray:
    path = Path(skimage.data.__file__).with_name(name)
    with Image.open(path) as image:
        scale = shorter / min(image.size)
        size = round(image.width * scale), round(image.height * scale)
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def test_no_light_changes_no_bit(noise: np.ndarray) -> None:
    codes = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    for picture in (codes, noise):
        np.testing.assert_array_equal(lit(picture, LIGHTS[0]), picture)
    assert LIGHTS[0].name == "none" and len({light.name for light in LIGHTS}) == len(LIGHTS)


@pytest.mark.parametrize("light", COLOURED, ids=named)
def test_a_coloured_light_multiplies_linear_light(light: Light) -> None:
    for grey in range(256):
        found = lit(np.full((1, 1, 3), grey, np.uint8), light)[0, 0]
        wanted = linear(grey) * np.array(light.colour)
        # The code that is nearest: those on either side are farther off, in codes.
        exact = np.where(wanted <= 0.0031308, 12.92 * wanted, 1.055 * wanted ** (1 / 2.4) - 0.055) * 255
        assert np.abs(found - exact).max() <= 0.5 + 1e-9, grey


@pytest.mark.parametrize("light", SIDED, ids=named)
@pytest.mark.parametrize("side", [8, 256])
def test_a_light_from_a_side_falls_by_so_many_stops(light: Light, side: int) -> None:
    white = lit(np.full((side, side, 3), 255, np.uint8), light)
    x, y = light.towards
    rows = white if x else white.transpose(1, 0, 2)
    assert (rows == rows[0]).all() and (rows == rows[..., :1]).all(), "one colour, the same across"
    codes = rows[0, ::-1, 0].astype(int) if x + y > 0 else rows[0, :, 0].astype(int)  # from the lit side on
    assert (np.diff(codes) <= 0).all() and len(np.unique(codes)) > side / 2
    stops = np.log2(linear(codes))
    np.testing.assert_allclose(stops, -FALL * (np.arange(side) + 0.5) / side, atol=0.03)
    assert stops[0] - stops[-1] == pytest.approx(FALL * (side - 1) / side, abs=0.05)


@pytest.mark.parametrize("light", LIGHTS, ids=named)
def test_nothing_is_clipped_or_brighter_and_it_is_the_same_each_time(light: Light, noise: np.ndarray) -> None:
    before = noise.copy()
    found = lit(noise, light)
    assert found.dtype == np.uint8 and found.shape == noise.shape
    np.testing.assert_array_equal(noise, before)
    np.testing.assert_array_equal(lit(noise, light), found)
    np.testing.assert_array_equal(lit(noise[:, ::-1][:, ::-1], light), found)  # whatever the memory's order
    assert (found <= noise).all()
    assert max(light.colour) <= 1 and min(light.colour) > 0
    assert lit(noise[:1, :1], light).shape == (1, 1, 3)
    ramp = np.tile(np.arange(256, dtype=np.uint8)[:, None], (64, 1, 3)).reshape(64, 256, 3)
    shades = lit(ramp if light.towards[1] else ramp.transpose(1, 0, 2), light)  # codes run across the fall of light
    shades = shades if light.towards[1] else shades.transpose(1, 0, 2)
    darkest = min(len(np.unique(row[:, c])) for row in shades for c in range(3))
    assert darkest > 48, "detail is left in the darkest part"


@pytest.mark.parametrize("light", LIGHTS, ids=named)
def test_a_mirrored_picture_is_lit_from_the_same_side(light: Light, noise: np.ndarray) -> None:
    original, mirrored = variant(noise, ORIGINAL, light), variant(noise, MIRRORED, light)
    np.testing.assert_array_equal(original, lit(noise, light))
    np.testing.assert_array_equal(mirrored, lit(noise[:, ::-1], light))
    turned = (original[:, ::-1] == mirrored).all()
    assert turned == (light.towards[0] == 0)
    grey = np.full((32, 48, 3), 180, np.uint8)
    np.testing.assert_array_equal(variant(grey, MIRRORED, light), variant(grey, ORIGINAL, light))
    if light.towards[0]:
        halves = variant(noise, MIRRORED, light)[:, :20].mean(), variant(noise, MIRRORED, light)[:, 20:].mean()
        assert (halves[1] > 1.5 * halves[0]) if light.towards[0] > 0 else (halves[0] > 1.5 * halves[1])


def test_the_first_lights_are_taken_in_both_views() -> None:
    options = SubsetOptions("in", "out", lights=3)
    names = [light.name for light in LIGHTS[:3]]
    both = [(view, name) for view in (ORIGINAL, MIRRORED) for name in names]
    assert [(view, light.name) for view, light in options.variants] == both
    options = SubsetOptions("in", "out", lights=len(LIGHTS), mirror=False)
    assert [(view, light.name) for view, light in options.variants] == [(ORIGINAL, light.name) for light in LIGHTS]


def test_every_light_is_seen_on_photographs() -> None:
    """By the stand-in for a vision encoder: each light moves the vector, and others' photographs tell which it was."""
    encoder = load_vision_encoder("builtin:tone")
    usual = SubsetOptions("in", "out").variants
    vectors, places = [], []
    for name in PHOTOGRAPHS:
        picture = photograph(name)
        plain = encoder.encode(picture[None])[0]
        for light in LIGHTS[1:]:
            moved = np.linalg.norm(encoder.encode(lit(picture, light)[None])[0] - plain)
            assert moved > 0.2, (name, light.name)
        for view, light in usual:
            vectors.append(encoder.encode(variant(picture, view, light)[None])[0])
            places.append(Place(name, view, light.name))
    found = separate_lights(np.array(vectors), places)
    assert found is not None and list(found.retrieved) == [light.name for light in LIGHTS[:5]]
    assert found.unseen == [] and found.chance == 0.2
    assert np.mean(list(found.retrieved.values())) >= 0.85
    assert found.strength > 0.5
