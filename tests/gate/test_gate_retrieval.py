"""Retrieval: distances, ranks and shares against numbers found by hand."""

import math

import numpy as np
import pytest
from gate_pictures import full_grid, plain, set_of
from gate_scenes import LIGHTS, scene
from PIL import Image

from fluxdit_jax.dataset.grid import Place
from fluxdit_jax.gate.retrieval import Library, distances, thumbnails
from fluxdit_jax.shared.psnr import psnr

pytest_plugins = ("gate_fixtures",)
FOX = scene("fox", "left", 0)
GREYS = Library(set_of([plain(level) for level in (0, 50, 100, 101, 200)]))


def test_distances_are_root_mean_squares():
    a, b = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 10, np.uint8)
    half = a.copy()
    half[:32] = 20
    found = distances(thumbnails([a, b]), thumbnails([a, b, half]))
    np.testing.assert_array_equal(found[:, :2], [[0, 10], [10, 0]])
    np.testing.assert_allclose(found[:, 2], [math.sqrt(200), 10])
    assert thumbnails([a]).shape == (1, 32 * 32 * 3) and thumbnails([a]).dtype == np.float32


def test_the_distance_of_a_picture_to_itself_is_exactly_zero():
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3)).astype(np.uint8)
    assert (distances(thumbnails(noise), thumbnails(noise)).diagonal() == 0).all()


def test_pictures_of_other_shapes_are_compared_at_a_common_size():
    tall = np.asarray(Image.fromarray(FOX).resize((96, 160), Image.Resampling.BICUBIC))
    near, far = distances(thumbnails([tall]), thumbnails([FOX, scene("teapot", "left", 0)]))[0]
    assert near < 5 < far


def test_psnr_of_known_differences():
    grey = plain(100, 32, 32)
    assert psnr(grey, grey + 1) == pytest.approx(20 * math.log10(255), abs=1e-6)
    assert psnr(grey, grey + 51) == pytest.approx(20 * math.log10(5), abs=1e-6)
    one_value = grey.copy()
    one_value[0, 0, 0] += 1
    assert psnr(grey, grey) == 99.0 and psnr(grey, one_value) == pytest.approx(10 * math.log10(255**2 * 3072))
    large = plain(100, 1024, 1280)
    off = large.copy()
    off[0, 0, 0] += 1
    assert psnr(large, off) == 99.0  # 114 dB


# ------------------------------------------------------------------------------------------ what is retrieved


@pytest.mark.parametrize(
    ("drawn", "answer", "nearest", "rank", "own", "other"),
    [
        (0, 0, 0, 1, 0, 50),
        (20, 0, 0, 1, 20, 30),
        (30, 0, 1, 2, 30, 20),
        (25, 0, 0, 1, 25, 25),  # as near to both: not farther than any other
        (25, 1, 1, 1, 25, 25),
        (200, 0, 4, 5, 200, 0),
        (160, 1, 4, 4, 110, 40),
        (255, 4, 4, 1, 55, 154),
    ],
)
def test_nearest_rank_and_margin_of_greys(drawn, answer, nearest, rank, own, other):
    found = GREYS.retrieve([plain(drawn)], [answer])
    assert (found.nearest.tolist(), found.rank.tolist()) == ([nearest], [rank])
    assert (found.own[0], found.other[0], found.margin[0]) == pytest.approx((own, other, other - own))
    assert found.hit.tolist() == [nearest == answer] and found.share == (nearest == answer)


def test_originals_less_than_two_grey_levels_apart_are_twins():
    assert GREYS.twins.sum() == 5 + 2 and GREYS.twins[2, 3] and GREYS.twins[3, 2]
    found = GREYS.retrieve([plain(101), plain(100), plain(101)], [2, 3, 1])
    assert found.nearest.tolist() == [2, 3, 3] and found.rank.tolist() == [1, 1, 3]
    assert found.own.tolist() == [0, 0, 51] and found.other.tolist() == [51, 50, 0]  # the nearest that is no twin
    assert not Library(set_of([plain(100), plain(102)])).twins[0, 1]


def test_the_distance_of_two_pictures_of_the_set_is_the_median():
    assert GREYS.usual_distance == pytest.approx(99.5)  # of 1, 50, 50, 51, 99, 100, 100, 101, 150, 200
    assert Library(set_of([plain(10)])).usual_distance == 0


def test_the_numbers_of_several_pictures():
    drawn = [plain(10), plain(30), plain(200), plain(90, 8, 16)]
    found = GREYS.retrieve(drawn, [0, 0, 1, 2])
    numbers = found.numbers()
    assert (numbers["questions"], numbers["retrieved"], numbers["chance"]) == (4, 0.5, 0.2)
    assert found.rank.tolist() == [1, 2, 4, 1] and (numbers["rank_median"], numbers["rank_worst"]) == (1.5, 4)
    assert found.margin.tolist() == pytest.approx([40 - 10, 20 - 30, 0 - 150, 40 - 10])
    assert numbers["margin_median"] == pytest.approx((30 - 10) / 2)
    db = [20 * math.log10(255 / off) for off in (10, 30, 150)]
    assert found.psnr[:3] == pytest.approx(db) and np.isnan(found.psnr[3])  # of another size
    assert (numbers["psnr_median_db"], numbers["psnr_worst_db"]) == pytest.approx((db[1], db[2]))
    assert numbers["right_row"] is None and numbers["right_light"] is None  # no grid
    chart = found.chart()
    assert chart.x == pytest.approx((10, 30, 150, 10)) and chart.y == pytest.approx((40, 20, 0, 40))
    assert chart.passed == (True, False, False, True) and chart.x_lines == chart.y_lines == ()


def test_a_case_in_words_names_the_picture_that_was_drawn_instead():
    found = GREYS.retrieve([plain(10), plain(30), plain(90, 8, 16)], [0, 0, 2])
    first, second, third = (found.note(k) for k in range(3))
    assert "28.1 dB" in first and "30.0 grey levels" in first and "picture" not in first
    assert "rank 2" in second and "picture 1.png" in second
    assert "dB" not in third and "30.0" in third


def test_nothing_asked_for_is_nothing_found():
    found = GREYS.retrieve([], [])
    assert found.share == 0 and found.share_alike("row") is None
    assert found.numbers() == {
        "questions": 0, "retrieved": 0.0, "chance": 0.2, "rank_median": None, "rank_worst": 0, "margin_median": None,
        "psnr_median_db": None, "psnr_worst_db": None, "right_row": None, "right_light": None,
    }  # fmt: skip
    assert found.chart().x == ()


def test_each_picture_has_an_answer():
    with pytest.raises(ValueError, match="zip"):
        GREYS.retrieve([plain(10)], [0, 1])


def test_the_only_picture_of_a_set_is_always_found():
    found = Library(set_of([plain(10)])).retrieve([plain(200)], [0])
    assert found.hit.all() and found.rank.tolist() == [1] and found.other[0] == math.inf
    assert found.chart().y == (255.0,) and found.numbers()["margin_median"] is None


# ------------------------------------------------------------------------------------------ in a grid


def test_right_row_and_right_light_are_those_of_the_nearest():
    of = full_grid(2, 2, 3)
    library = Library(of)
    at = {place: of.truths[index] for place, index in of.by_place.items()}
    answer = Place("p0", "original", "l1")
    drawn = [at[answer], at[Place("p0", "original", "l2")], at[Place("p0", "mirrored", "l1")],
             at[Place("p1", "original", "l1")], at[Place("p1", "mirrored", "l0")]]  # fmt: skip
    found = library.retrieve(drawn, [of.by_place[answer]] * 5)
    assert (found.share, found.share_alike("row"), found.share_alike("light")) == (1 / 5, 2 / 5, 3 / 5)
    numbers = found.numbers()
    assert (numbers["right_row"], numbers["right_light"]) == (2 / 5, 3 / 5)


def test_a_picture_without_a_place_is_in_no_row_and_no_light():
    of = set_of([plain(0), plain(100), plain(200)], places=[Place("p", "a", "l"), Place("p", "a", "m"), None])
    found = Library(of).retrieve([plain(0), plain(100), plain(200), plain(0)], [0, 0, 0, 1])
    assert (found.share_alike("row"), found.share_alike("light")) == (3 / 4, 1 / 4)
    assert Library(of).retrieve([plain(0), plain(0)], [0, 2]).share_alike("row") is None  # the answer has none


@pytest.mark.parametrize("light", range(1, len(LIGHTS)))
def test_the_same_scene_in_another_light_is_another_picture(light):
    """And so is the other side, and another subject in the same light."""
    of = set_of([scene("fox", "left", light), FOX, scene("fox", "right", light), scene("teapot", "left", light)])
    found = Library(of).retrieve([of.truths[0]], [0])
    assert found.hit.all() and found.other[0] > 10


@pytest.mark.slow  # draws the demonstration set, about 10 s
def test_every_picture_of_the_demonstration_set_is_told_from_the_others(demo_set):
    library = Library(demo_set)
    found = library.retrieve(demo_set.truths, range(100))
    assert found.share == 1 and library.twins.sum() == 100 and found.margin.min() > 4
    assert (found.share_alike("row"), found.share_alike("light")) == (1, 1)
    assert len(demo_set.rows) == 20 and len(demo_set.lights) == 5
