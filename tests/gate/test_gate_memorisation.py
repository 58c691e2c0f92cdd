"""Memorisation: its numbers in closed form, and its verdict at each limit."""

import numpy as np
import pytest
from gate_pictures import Gallery, album_of, plain
from gate_scenes import scene
from skimage.color import rgb2lab

from fluxdit_jax.gate.memorisation import Memorisation

GREYS = [plain(20 + 10 * k) for k in range(20)]


def measured(truths, own, shuffled=None, partner=None, **more):
    """The verdict on an album of `truths` of which the model draws `own`."""
    album, gallery = album_of(truths, **more), Gallery()
    partner = np.roll(np.arange(len(truths)), 1) if partner is None else partner
    shuffled = [truths[k] for k in partner] if shuffled is None else shuffled
    return Memorisation(album, partner, gallery.of(own), gallery.of(shuffled)).measure(gallery)


def lightness(picture) -> float:
    return float(rgb2lab(picture)[0, 0, 0])


def test_memorisation_plans_own_and_shuffled_conditions():
    album = album_of(GREYS[:5])
    plan = Memorisation.plan(album)
    assert [one.key for one in plan.own] == [album.wanted(i, i, i).key for i in range(5)]
    assert [one.key for one in plan.shuffled] == [
        album.wanted(int(j), int(j), i).key for i, j in enumerate(plan.partner)
    ]
    assert sorted(plan.partner) == list(range(5)) and (plan.partner != np.arange(5)).all()
    assert plan.wanted() == plan.own + plan.shuffled


def test_the_numbers_of_plain_pictures():
    """All are drawn two grey levels too light, but 0 comes as 1, which shares its caption, and 5 as 6."""
    captions = ["one", "one", *(f"{k}" for k in range(2, 20))]
    own = [plain(22 + 10 * k) for k in range(20)]
    own[0], own[5] = GREYS[1], GREYS[6]
    verdict = measured(GREYS, own, captions=captions)
    numbers = verdict.numbers
    assert (verdict.value, numbers["retrieved"], numbers["right_caption"]) == (0.9, 0.9, 0.95)
    assert numbers["psnr_median_db"] == pytest.approx(20 * np.log10(255 / 2))
    assert numbers["psnr_worst_db"] == pytest.approx(20 * np.log10(255 / 10))
    assert (numbers["pictures"], numbers["twins"], numbers["structure"]) == (20, 0, 0)
    differences = [abs(lightness(a) - lightness(t)) for a, t in zip(own, GREYS)]
    assert numbers["tone_difference"] == pytest.approx(np.median(differences), rel=1e-3)
    assert numbers["ssim_worst"] < numbers["ssim_median"] < 1
    assert numbers["shuffled_follow_their_new_conditions"] == 1

    first, second = verdict.cases[:2]
    assert (first.label, first.passed, second.passed) == ("one", False, True)
    assert first.score == pytest.approx(20 * np.log10(25.5) - 1000) and "picture 1.png" in first.note
    assert second.score == pytest.approx(20 * np.log10(127.5)) and "picture" not in second.note
    assert [title for title, _ in first.pictures] == ["original", "drawn"]
    assert (first.pictures[0][1] == GREYS[0]).all() and (first.pictures[1][1] == GREYS[1]).all()
    chart = verdict.chart
    assert chart.x[:2] == pytest.approx((10, 2)) and chart.y[:2] == pytest.approx((0, 8))
    assert chart.passed == tuple(case.passed for case in verdict.cases)


def stripes(light: int) -> np.ndarray:
    """Columns of grey levels 100 and 100 + `light`: contrast light / 2, roughness `light`."""
    return plain(100) + np.uint8(light) * (np.arange(8) % 2).astype(np.uint8)[None, :, None]


@pytest.mark.parametrize(
    ("truth", "drawn", "contrast", "roughness"),
    [
        (stripes(40), stripes(20), 0.5, 20.1 / 40.1),
        (stripes(40), stripes(0), 0, 0.1 / 40.1),
        (stripes(0), stripes(40), 20, 40.1 / 0.1),
        (stripes(40), np.transpose(stripes(40), (1, 0, 2)), 1, 0.1 / 40.1),
    ],
)
def test_contrast_and_roughness_against_the_originals(truth, drawn, contrast, roughness):
    verdict = measured([truth], [drawn])
    assert verdict.numbers["contrast"] == pytest.approx(contrast)
    assert verdict.numbers["roughness"] == pytest.approx(roughness, rel=1e-5)
    assert verdict.chart.y == (255,)  # there is no other picture


def test_structure_is_compared_with_the_own_original_and_with_the_most_alike():
    truths = [scene(subject, "left", 0) for subject in ("fox", "teapot", "cactus")]
    numbers = measured(truths, [truths[0]] * 3).numbers
    assert numbers["structure_of_the_nearest"] == pytest.approx(1) and numbers["structure"] < 0.3
    assert numbers["retrieved"] == pytest.approx(1 / 3)
    assert measured(truths, truths).numbers["structure"] == pytest.approx(1)


def test_originals_less_than_two_grey_levels_apart_are_twins():
    truths = [plain(level) for level in (100, 101, 150, 152)]
    verdict = measured(truths, [plain(level) for level in (101, 100, 152, 150)])
    assert verdict.numbers["twins"] == 2
    assert [case.passed for case in verdict.cases] == [True, True, False, False]
    assert verdict.chart.y == pytest.approx((49, 50, 0, 0))  # the nearest that is no twin


@pytest.mark.parametrize(("missed", "passed"), [(1, True), (2, False)])
def test_one_picture_in_a_hundred_may_be_missed(missed, passed):
    truths = [plain(20 + 2 * k) for k in range(100)]
    verdict = measured(truths, [truths[k + 1] if k < missed else truths[k] for k in range(100)])
    assert verdict.passed == passed and verdict.value == 1 - missed / 100
    assert [reason for reason in verdict.reasons if "98 %" not in reason or "99 %" not in reason] == []


@pytest.mark.parametrize(("count", "passed"), [(20, True), (19, False)])
def test_twenty_pictures_are_needed(count, passed):
    verdict = measured(GREYS[:count], GREYS[:count])
    assert verdict.passed == passed and verdict.value == 1
    assert all("19" in reason and "20" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(("kept", "passed"), [(3, True), (4, False)])
def test_the_shuffle_may_give_the_old_picture_as_often_as_chance_does(kept, passed):
    """Chance is 1 in 20; three standard deviations more are 0.196."""
    partner = np.roll(np.arange(20), 1)
    shuffled = [GREYS[k if k < kept else partner[k]] for k in range(20)]
    verdict = measured(GREYS, GREYS, shuffled, partner)
    (control,) = verdict.controls
    assert control.bound == pytest.approx(0.05 + 3 * (0.05 * 0.95 / 20) ** 0.5)
    assert control.value == kept / 20 and control.passed == verdict.passed == passed
    assert verdict.numbers["shuffled_follow_their_new_conditions"] == 1 - kept / 20
