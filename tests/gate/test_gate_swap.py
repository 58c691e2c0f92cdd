"""The vision swap: who is paired with whom, its numbers in closed form, and its verdict at each limit."""

import collections
import re

import numpy as np
import pytest
from gate_pictures import Gallery, full_grid, plain, set_of
from wording import naming

from fluxdit_jax.dataset.grid import Place
from fluxdit_jax.gate.retrieval import Library
from fluxdit_jax.gate.swap import Pair, Swap, pairs

GRID = full_grid(4, 2, 5)  # 8 rows of 5 lights: 40 answers with 6 partners each

# ------------------------------------------------------------------------------------------ the pairs


def places(of, pair: Pair) -> tuple[Place, Place, Place]:
    return of.places[pair.a], of.places[pair.b], of.places[pair.answer]


@pytest.mark.parametrize(
    "of",
    [GRID, full_grid(3, 1, 2), full_grid(2, 3, 4, seed=9), full_grid(10, 2, 5)],
    ids=["4x2x5", "3x1x2", "2x3x4", "10x2x5"],
)
def test_a_pair_asks_for_a_record_under_the_light_of_another_photograph(of):
    found = pairs(of, 10_000)
    count, lights, rows = len(of), len(of.lights), len(of.rows)
    others = rows - rows // len({photograph for photograph, _ in of.rows})
    assert len(found) == count * others == len({(pair.b, pair.answer) for pair in found}) and lights > 1
    for pair in found:
        a, b, answer = places(of, pair)
        assert a.row == answer.row and a.light != answer.light == b.light and b.photograph != answer.photograph
        assert all(type(index) is int for index in (pair.a, pair.b, pair.answer))


@pytest.mark.parametrize("wanted", [1, 4, 5, 7, 39, 40, 41, 60, 123, 239, 240])
def test_lights_are_in_turn_and_rows_come_once_before_one_comes_again(wanted):
    found = pairs(GRID, wanted)
    assert len(found) == wanted
    by_light = collections.defaultdict(list)
    for pair in found:
        by_light[GRID.places[pair.answer].light].append(GRID.places[pair.answer].row)
    counts = [len(by_light[light]) for light in GRID.lights]
    assert max(counts) - min(counts) <= 1
    for rows in by_light.values():
        for start in range(0, len(rows), 8):
            assert len(set(rows[start : start + 8])) == len(rows[start : start + 8])
    assert [GRID.places[pair.answer].light for pair in found[:5]] == GRID.lights[: min(5, wanted)]


def test_partners_and_starting_lights_are_spread():
    """Sixty pairs: no record is often a partner, and `a` is under all of the other lights."""
    found = pairs(GRID, 60)
    assert max(collections.Counter(pair.b for pair in found).values()) <= 6
    assert {GRID.places[pair.a].light for pair in found} == set(GRID.lights)
    assert len({(GRID.places[p.a].light, GRID.places[p.answer].light) for p in found}) > 15  # of 20


def test_pairs_are_the_same_again_and_others_with_another_seed():
    assert pairs(GRID, 60) == pairs(full_grid(4, 2, 5), 60)
    assert pairs(GRID, 40) == pairs(GRID, 60)[:40]  # the curve and the control take the first ones
    assert pairs(GRID, 60) != pairs(full_grid(4, 2, 5, seed=1), 60)


def test_gaps_of_a_grid_are_not_asked_for():
    """Of p0 one light is missing, of p1 there is one alone: nothing of it can be asked for, but it is a partner."""
    there = [("p0", "l0"), ("p0", "l1"), ("p1", "l2"), ("p2", "l0"), ("p2", "l1"), ("p2", "l2")]
    of = set_of([plain(30 * k) for k in range(7)], places=[*(Place(p, "v", light) for p, light in there), None])
    found = {(pair.b, pair.answer) for pair in pairs(of, 100)}
    assert found == {(3, 0), (4, 1), (0, 3), (1, 4), (2, 5)}
    for pair in pairs(of, 100):
        a, b, answer = places(of, pair)
        assert a.row == answer.row and a.light != answer.light == b.light


@pytest.mark.parametrize(
    "of",
    [full_grid(1, 2, 5), full_grid(4, 2, 1), full_grid(1, 1, 1), set_of([plain(100)] * 5)],
    ids=["one photograph", "one light", "one picture", "no grid"],
)
def test_nothing_to_swap_is_not_judged(of):
    assert pairs(of, 60) == []
    plan = Swap.plan(of, 60)
    assert plan.requests() == [] and plan.pairs == [] and plan.possible == 0
    verdict = plan.measure(Gallery(), Library(of))
    assert not verdict.passed and not verdict.judged and verdict.value == 0 and verdict.numbers == {}
    assert (verdict.name, verdict.threshold) == ("vision_swap", 0.8)
    assert ("no grid" in verdict.reasons[0]) == (not of.grid)


@pytest.mark.parametrize(("lights", "judged"), [(4, False), (5, True)])
def test_a_set_with_fewer_than_fifty_pairs_is_not_judged(lights, judged):
    of = full_grid(4, 1, lights)  # 48 and 60 pairs
    plan = Swap.plan(of, 60)
    assert (len(plan.pairs), plan.possible) == ((60, 50) if judged else (0, 48))
    if not judged:
        verdict = plan.measure(Gallery(), Library(of))
        assert not verdict.judged and re.search(naming(4, 48, 50), verdict.reasons[0])


# ------------------------------------------------------------------------------------------ what is drawn


def test_a_swap_has_words_size_and_noise_of_a_and_the_vector_of_b():
    of = full_grid(5, 2, 5, size=(8, 16), seed=3)
    plan = Swap.plan(of, 60)
    assert plan.pairs == pairs(of, 60) and plan.possible == 50
    assert [one.key for one in plan.swapped] == [of.request(pair.a, pair.b).key for pair in plan.pairs]
    assert len(plan.random) == 30 and len({one.conditions["vision"].tobytes() for one in plan.random}) == 30
    for one, pair in zip(plan.random, plan.pairs):
        assert (one.caption, one.grid, one.seed) == (of.caption(pair.a), (1, 2), 3 + pair.a)
        vision = one.conditions["vision"]
        assert vision.dtype == np.float32 and np.linalg.norm(vision) == pytest.approx(1) and vision.shape == (50,)
    assert list(plan.guided) == [1.5, 3.0, 5.0]
    for scale, asked in plan.guided.items():
        assert [one.key for one in asked] == [of.request(p.a, p.b, guidance=scale).key for p in plan.pairs[:20]]
    assert plan.requests() == [*plan.swapped, *plan.random, *(one for asked in plan.guided.values() for one in asked)]
    assert [len(part) for part in (plan.requests(), Swap.plan(of, 10).requests())] == [60 + 30 + 60, 10 + 10 + 30]


# ------------------------------------------------------------------------------------------ the measure

# Photographs p and q in lights l and m, and a third in light m alone.
TRUTHS = [plain(level) for level in (40, 80, 120, 160, 240)]
NAMES = [("p", "l"), ("p", "m"), ("q", "l"), ("q", "m"), ("r", "m")]
FEW = set_of(TRUTHS, ["the p", "the p", "the q", "the q", "the r"], [Place(p, "v", light) for p, light in NAMES])
A, ANSWER, NEITHER, B, STRANGER = TRUTHS
PAIR = Pair(a=0, b=3, answer=1)


def measured(swapped, random=(STRANGER,), guided=None, pair=PAIR, of=FEW, possible=50):
    gallery, count = Gallery(), len(swapped)
    curve = {scale: gallery.of(pictures) for scale, pictures in (guided or {}).items()}
    plan = Swap(of, [pair] * count, possible, gallery.of(swapped), gallery.of(random), curve)
    return plan.measure(gallery, Library(of))


@pytest.mark.parametrize(("right", "passed"), [(40, True), (39, False)])
def test_four_pairs_in_five_must_give_the_answer(right, passed):
    verdict = measured([ANSWER] * right + [B] * 4 + [A] * (46 - right))
    numbers = verdict.numbers
    assert verdict.passed == passed and verdict.value == numbers["retrieved"] == right / 50
    assert (numbers["right_row"], numbers["right_light"]) == (46 / 50, (right + 4) / 50)
    assert [case.passed for case in verdict.cases] == [True] * right + [False] * (50 - right)
    assert (verdict.judged, verdict.name, verdict.threshold) == (True, "vision_swap", 0.8)
    assert verdict.statement.startswith(f"{right} of 50 ") and "chance 20 %" in verdict.statement
    for reason in verdict.reasons:
        assert re.search(naming("78 %", "80 %", "92 %", "86 %"), reason)


def test_pictures_of_something_else_have_neither_row_nor_light():
    bare = set_of(TRUTHS, places=[*FEW.places[:4], None])
    verdict = measured([STRANGER] * 50, of=bare)
    assert (verdict.numbers["right_row"], verdict.numbers["right_light"]) == (0, 0)
    assert re.search(naming("0 % A's", "0 % B's"), verdict.reasons[0])
    assert verdict.controls[0].bound == pytest.approx(2)  # one pair with a random vector says nothing


@pytest.mark.parametrize(("count", "passed"), [(50, True), (49, False)])
def test_fifty_pairs_must_be_asked_for(count, passed):
    verdict = measured([ANSWER] * count)
    assert verdict.passed == passed and verdict.judged and verdict.value == 1
    assert all("49" in reason and "50" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(("right", "passed"), [(20, True), (21, False)])
def test_a_random_vector_may_give_the_answer_as_often_as_chance(right, passed):
    """Chance is one light of two; three standard deviations more, of 25 pairs, are 0.8."""
    verdict = measured([ANSWER] * 50, [ANSWER] * right + [A] * (25 - right))
    (control,) = verdict.controls
    assert control.bound == pytest.approx(0.8) and control.value == right / 25
    assert (control.passed, verdict.passed, len(verdict.reasons)) == (passed, passed, not passed)


def test_the_curve_has_the_first_pairs_at_each_guidance():
    swapped = [ANSWER] * 15 + [A] * 5 + [ANSWER] * 30
    verdict = measured(swapped, guided={1.5: [ANSWER] * 10 + [B] * 10, 3.0: [ANSWER] * 20, 5.0: [STRANGER] * 20})
    assert verdict.numbers["guidance"] == {1.0: 0.75, 1.5: 0.5, 3.0: 1.0, 5.0: 0.0}
    assert verdict.value == 0.9 and verdict.passed
    assert measured([ANSWER] * 3 + [A]).numbers["guidance"] == {1.0: 0.75}


def test_the_share_of_each_light_is_told():
    gallery = Gallery()
    chosen = [PAIR] * 4 + [Pair(1, 2, 0)] * 2
    swapped = gallery.of([ANSWER, ANSWER, ANSWER, B, A, B])
    plan = Swap(FEW, chosen, 50, swapped, gallery.of([STRANGER]), {})
    assert plan.measure(gallery, Library(FEW)).numbers["by_light"] == {"l": 0.5, "m": 0.75}
    assert measured([ANSWER]).numbers["by_light"] == {"m": 1}  # no pair asks for the other


@pytest.mark.parametrize(
    ("drawn", "own", "other", "passed"),
    [(ANSWER, 0, 40, True), (A, 40, 0, False), (plain(90), 10, 30, True), (plain(101), 21, 19, False)],
)
def test_the_numbers_of_one_pair(drawn, own, other, passed):
    verdict = measured([drawn])
    (case,) = verdict.cases
    assert (verdict.chart.x, verdict.chart.y, verdict.chart.passed) == ((own,), (other,), (passed,))
    assert case.score == pytest.approx(other - own) and case.passed == passed and case.answer == 1
    assert re.search("the p.*the q", case.label)
    assert [title for title, _ in case.pictures] == ["A: caption", "B: vector", "the answer", "drawn"]
    for (_, shown), expected in zip(case.pictures, (A, B, ANSWER, drawn)):
        assert (shown == expected).all()


def test_a_draw_that_gives_too_few_pictures_is_an_error():
    gallery = Gallery()
    plan = Swap(FEW, [PAIR] * 3, 50, gallery.of([ANSWER] * 3), gallery.of([STRANGER]), {})
    with pytest.raises(ValueError, match="zip"):
        plan.measure(lambda requests: gallery(requests)[:1], Library(FEW))
