"""The measure of movement: exact on known shifts, right on every true pair, silent where there is nothing to say."""

import numpy as np
import pytest
from gate_scenes import LIGHTS, SUBJECTS, scene
from scipy.ndimage import gaussian_filter

from fluxdit_jax.gate.displacement import displacement

pytest_plugins = ("gate_fixtures",)
RNG = np.random.default_rng(0)


def smooth_noise(grain: float, shape=(64, 64, 3)) -> np.ndarray:
    noise = gaussian_filter(RNG.normal(size=shape), (grain, grain, 0))
    return np.clip(128 + 50 * noise / noise.std(), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("step", [2, 4, 8, 10])
def test_a_known_shift_is_measured_exactly(subject, step):
    left, right = scene(subject, "left", 1, step), scene(subject, "right", 1, step)
    there, back = displacement(left, right), displacement(right, left)
    assert there.shift == pytest.approx(2 * step / 64, abs=1 / 64)
    assert back.shift == -there.shift
    assert there.along(-1) == -there.shift


def test_a_subject_that_crosses_the_picture():
    """Half of the side, as when "on the left" becomes "on the right"."""
    left, right = scene("fox", "left", 0, 16), scene("fox", "right", 0, 16)
    assert displacement(left, right).shift == pytest.approx(0.5, abs=1 / 64)
    assert displacement(right, left).along(-1) == pytest.approx(0.5, abs=1 / 64)


def test_a_vertical_shift():
    before, after = (np.transpose(scene("fox", side, 0), (1, 0, 2)).copy() for side in ("left", "right"))
    assert displacement(before, after, "vertical").shift == pytest.approx(0.25, abs=1 / 64)
    assert displacement(after, before, "vertical").shift == pytest.approx(-0.25, abs=1 / 64)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_what_does_not_move_is_still(subject):
    image = scene(subject, "left", 2)
    noisy = np.clip(image + RNG.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
    blurred = np.rint(gaussian_filter(image.astype(float), (1, 1, 0))).astype(np.uint8)
    brighter = np.clip(image * 1.3, 0, 255).astype(np.uint8)
    for other in (image, noisy, blurred, brighter):
        found = displacement(image, other)
        assert found.shift == 0 and found.found > 0.7


def test_light_alone_is_hardly_movement():
    shifts = [
        displacement(scene(subject, "left", 0), scene(subject, "left", light)).shift
        for subject in SUBJECTS
        for light in range(1, len(LIGHTS))
    ]
    assert all(shift == 0 for shift in shifts)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_grey_and_noise_give_no_score(subject):
    before = scene(subject, "left", 0)
    for after in (np.full_like(before, 120), RNG.integers(0, 256, before.shape).astype(np.uint8)):
        for found in (displacement(before, after), displacement(after, before)):
            assert found.shift is None and found.along(1) is None


@pytest.mark.parametrize("grain", [2.0, 4.0, 8.0])
def test_smooth_blobs_give_no_score_but_by_chance(grain):
    """The hardest case: the scenes are smooth noise themselves."""
    found = [
        displacement(scene(subject, "left", 0), smooth_noise(grain)).shift for subject in SUBJECTS for _ in range(15)
    ]
    assert sum(shift is not None for shift in found) <= 6  # of 60


def test_two_sizes_or_an_unknown_axis_are_refused():
    image = scene("fox", "left", 0)
    with pytest.raises(ValueError, match="size"):
        displacement(image, image[:, :48])
    with pytest.raises(ValueError, match="axis"):
        displacement(image, image, "depth")


@pytest.mark.slow  # draws the demonstration set, about 10 s
def test_every_true_pair_of_the_demonstration_set_is_measured_right(demo_pictures, demo_looking):
    images, composition, light = demo_pictures
    measured = []
    for i, looking in enumerate(demo_looking):
        if looking != "left":
            continue
        for number, word in enumerate(("right", "front"), start=1):  # the compositions that follow, where they exist
            j = i + 5 * number
            if j < len(images) and demo_looking[j] == word:
                measured.append(displacement(images[i], images[j]).shift)
                measured.append(-displacement(images[j], images[i]).shift)
    assert len(measured) == 2 * (8 + 4) * 5
    assert min(measured) > 0.03, measured
