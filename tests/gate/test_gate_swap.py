"""The vision swap: its numbers in closed form, and its verdict at each limit."""

import numpy as np
import pytest
from gate_pictures import Gallery, album_of, plain
from gate_scenes import scene
from PIL import Image

from fluxdit_jax.gate import image_metrics
from fluxdit_jax.gate.memorisation import Memorisation
from fluxdit_jax.gate.pairing import swap_pairs
from fluxdit_jax.gate.swap import Swap

# Subjects 0 and 1, each in light 0 and 1, and a third that is alone: A is the first and B the second.
TRUTHS = [scene(subject, "left", light) for subject, light in (
    ("fox", 0), ("teapot", 1), ("fox", 1), ("teapot", 0), ("cactus", 0),
)]  # fmt: skip
ALBUM = album_of(
    TRUTHS,
    captions=["fox", "teapot", "fox", "teapot", "cactus"],
    keys=["c00_l0.png", "c01_l1.png", "c00_l1.png", "c01_l0.png", "c02_l0.png"],
)
A, B, RIGHT, NEITHER = TRUTHS[:4]
STRUCTURE, TONES = image_metrics.structures(TRUTHS), image_metrics.tones(TRUTHS)


def measured(pairs, swapped, own=(), random=(), album=ALBUM):
    gallery = Gallery()
    own, random = own or [B], random or [A]
    return Swap(album, pairs, gallery.of(swapped), gallery.of(own), gallery.of(random)).measure(gallery)


def test_what_is_drawn():
    """Always A's noise and size: with B's vector, with B's caption as well, and with random unit vectors."""
    album = album_of([plain(4 * k + 10, 8 + 8 * (k % 2)) for k in range(60)])
    plan = Swap.plan(album, 60)
    assert plan.pairs == swap_pairs(album, 60) and len(plan.pairs) == 60
    assert [one.key for one in plan.swapped] == [album.wanted(a, b, a).key for a, b in plan.pairs]
    assert [one.key for one in plan.own] == [album.wanted(b, b, a).key for a, b in plan.pairs[:30]]
    assert len(plan.random) == 30 and len({one.conditions["vision"].tobytes() for one in plan.random}) == 30
    for one, (a, _) in zip(plan.random, plan.pairs):
        assert (one.caption, one.grid, one.seed) == (album.caption(a), album.grid(a), album.seed_of(a))
        vision = one.conditions["vision"]
        assert vision.dtype == np.float32 and np.linalg.norm(vision) == pytest.approx(1)
    assert plan.wanted() == plan.swapped + plan.own + plan.random
    shuffled = {one.key for one in Memorisation.plan(album).shuffled}
    drawn = [one.key in shuffled for one in plan.own]  # for test 1 anyway
    assert any(drawn) and drawn == sorted(drawn, reverse=True)


@pytest.mark.parametrize("count", [1, 5])
def test_without_a_pair_there_is_nothing_to_swap(count):
    plan = Swap.plan(album_of([plain(100)] * count), 60)
    verdict = plan.measure(Gallery())
    assert plan.pairs == [] and plan.wanted() == []
    assert not verdict.passed and verdict.value == 0 and verdict.numbers == {"pairs": 0}
    assert (verdict.name, verdict.threshold) == ("vision_swap", 0.8)


@pytest.mark.parametrize(("right", "passed"), [(40, True), (39, False)])
def test_four_pairs_in_five_must_have_as_structure_and_bs_tone(right, passed):
    swapped = [RIGHT] * right + [B] * 4 + [A] * (46 - right)
    verdict = measured([(0, 1)] * 50, swapped)
    numbers = verdict.numbers
    assert verdict.passed == passed and verdict.value == numbers["passing"] == right / 50
    assert numbers["structure_of_a"] == 46 / 50 and numbers["tone_of_b"] == (right + 4) / 50
    assert [case.passed for case in verdict.cases] == [True] * right + [False] * (50 - right)
    assert all("78 %" in reason and "80 %" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(("count", "passed"), [(50, True), (49, False)])
def test_fifty_pairs_are_needed(count, passed):
    verdict = measured([(0, 1)] * count, [RIGHT] * count)
    assert verdict.passed == passed and verdict.value == 1 and verdict.numbers["pairs"] == count
    assert all("49" in reason and "50" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(("own", "random", "passed"), [(16, 13, True), (15, 13, False), (16, 12, False)])
def test_the_controls_at_their_limits(own, random, passed):
    """With its own caption B's structure; with a random vector a tone farther from B's, where equal is not farther."""
    verdict = measured(
        [(0, 1)] * 50, [RIGHT] * 50, [B] * own + [A] * (20 - own), [A] * random + [RIGHT] * (20 - random)
    )
    first, second = verdict.controls
    assert (first.value, first.bound, second.value, second.bound) == (own / 20, 0.8, random / 20, 0.65)
    assert (first.passed, second.passed, verdict.passed) == (own == 16, random == 13, passed)


@pytest.mark.parametrize(
    ("drawn", "like"),
    [(RIGHT, 2), (A, 0), (B, 1), (NEITHER, 3)],
    ids=["right", "A", "B", "neither"],
)
def test_the_numbers_of_one_pair(drawn, like):
    verdict = measured([(0, 1)], [drawn])
    numbers, chart = verdict.numbers, verdict.chart
    to_a, to_b = STRUCTURE[like] @ STRUCTURE[0], STRUCTURE[like] @ STRUCTURE[1]
    tone_a, tone_b, apart = (np.linalg.norm(TONES[i] - TONES[j]) for i, j in ((like, 0), (like, 1), (0, 1)))
    assert (numbers["structure_to_a_median"], numbers["structure_to_b_median"]) == pytest.approx((to_a, to_b))
    assert (numbers["tone_to_a_median"], numbers["tone_to_b_median"]) == pytest.approx((tone_a, tone_b))
    assert chart.x == pytest.approx(((tone_a - tone_b) / apart,)) and chart.y == pytest.approx((to_a - to_b,))
    assert chart.passed == (like == 2,) and (chart.x_lines, chart.y_lines) == ((0,), (0,))
    (case,) = verdict.cases
    assert case.score == pytest.approx(min(*chart.x, *chart.y)) and case.passed == (like == 2)
    assert "fox" in case.label and "teapot" in case.label
    assert [title for title, _ in case.pictures] == ["A: caption", "B: vector", "swapped", "the truth"]
    for (_, shown), expected in zip(case.pictures, (A, B, drawn, RIGHT)):
        assert (shown == expected).all()


def test_known_answers_are_found_and_measured():
    """The right answer of the last pair is not in the set; a picture of another size has no PSNR."""
    pairs = [(0, 1), (0, 1), (1, 0), (4, 1)]
    small = np.asarray(Image.fromarray(RIGHT).resize((32, 32), Image.Resampling.BOX))
    numbers = measured(pairs, [small, RIGHT, RIGHT, A]).numbers
    assert numbers["true_answers_known"] == 3 and numbers["exactly_the_true_answer"] == pytest.approx(2 / 3)
    assert numbers["true_answers_passing"] == 1
    median = (99 + image_metrics.psnr(NEITHER, RIGHT)) / 2
    assert numbers["psnr_to_the_true_answer_median_db"] == pytest.approx(median)
    verdict = measured(pairs, [small] * 4)
    assert verdict.numbers["psnr_to_the_true_answer_median_db"] is None
    assert [len(case.pictures) for case in verdict.cases] == [4, 4, 4, 3]
    numbers = measured([(4, 1)], [A]).numbers
    assert numbers["true_answers_known"] == 0 and "true_answers_passing" not in numbers
    assert numbers["shared_captions"] == 0.8  # all but the cactus


def test_a_set_whose_answers_the_measure_itself_does_not_pass():
    """What is called "fox in light 1" shows the fox in light 0, and "teapot in light 0" shows the fox in it."""
    wrong = album_of([A, B, A, A], captions=["fox", "teapot", "fox", "teapot"], keys=[r.key for r in ALBUM.records[:4]])
    numbers = measured([(0, 1), (1, 0)], [RIGHT, NEITHER], album=wrong).numbers
    assert numbers["true_answers_known"] == 2 and numbers["true_answers_passing"] == 0


def test_plain_pictures_have_no_structure_and_never_pass():
    """The tone goes from A's to B's, and of structure there is none to keep."""
    red, blue = plain((200, 40, 40)), plain((40, 40, 200))
    album = album_of([red, blue], captions=["red", "blue"], keys=["c00_l0.png", "c00_l1.png"])
    verdict = measured([(0, 1)], [blue], [blue], [red], album)
    numbers = verdict.numbers
    assert (verdict.value, numbers["structure_of_a"], numbers["tone_of_b"]) == (0, 0, 1)
    assert verdict.controls[0].value == 0 and not verdict.cases[0].passed
    answers = album_of([red, blue, blue], ["red", "blue", "red"], ["c00_l0.png", "c01_l1.png", "c00_l1.png"])
    assert measured([(0, 1)], [blue], [blue], [red], answers).numbers["true_answers_passing"] == 0


def test_a_light_that_is_as_near_to_a_as_to_b_is_not_taken():
    """A fine pattern and its negative: all structure differs, and the tones are equal."""
    pattern = plain(60, 64, 64)
    pattern[::2, ::2] = pattern[1::2, 1::2] = 180
    negative = 240 - pattern
    album = album_of([pattern, negative, pattern], ["a", "b", "a"], ["c00_l0.png", "c01_l1.png", "c00_l1.png"])
    assert (album.tones[0] == album.tones[1]).all()
    verdict = measured([(0, 1)], [pattern], [negative], [pattern], album)
    assert (verdict.numbers["structure_of_a"], verdict.numbers["tone_of_b"], verdict.value) == (1, 0, 0)
    assert verdict.numbers["true_answers_passing"] == 0 and verdict.chart.x == (0,)
