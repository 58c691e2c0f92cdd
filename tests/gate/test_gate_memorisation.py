"""Memorisation: its numbers in closed form, and its verdict at each limit."""

import numpy as np
import pytest
from gate_pictures import Gallery, full_grid, plain, set_of

from fluxdit_jax.gate.memorisation import Memorisation, from_other_noise, shuffled
from fluxdit_jax.gate.retrieval import Library

GREYS = [plain(20 + 10 * k) for k in range(20)]


def measured(truths, own, moved=None, alone=(), by_caption=(), by_vector=(), **more):
    """The verdict on a set of `truths` of which the model draws `own`, and `moved` from other noise."""
    of, gallery = set_of(truths, **more), Gallery()
    drawn = [gallery.of(pictures) for pictures in (own, truths if moved is None else moved, by_caption, by_vector)]
    return Memorisation(of, drawn[0], drawn[1], list(alone), *drawn[2:]).measure(gallery, Library(of))


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_other_noise_is_that_of_another_record_in_one_cycle(seed):
    of = full_grid(3, 2, 4, seed=seed)
    partner = shuffled(of)
    assert (partner == shuffled(of)).all() and sorted(partner) == list(range(24))
    at, met = 0, set()
    while at not in met:
        met.add(at)
        at = int(partner[at])
    assert len(met) == 24
    for index in range(24):
        one = from_other_noise(of, index)
        assert (one.caption, one.grid) == (of.caption(index), of.request(index, index).grid)
        assert partner[one.seed - seed] == index and one.seed - seed != index
    assert seed == 0 or (partner != shuffled(full_grid(3, 2, 4))).any()


def test_own_noise_and_anothers_and_one_condition_alone_are_planned():
    of = full_grid(10, 2, 6)
    plan = Memorisation.plan(of)
    assert [one.key for one in plan.own] == [of.request(i, i).key for i in range(120)]
    assert [one.key for one in plan.moved] == [from_other_noise(of, i).key for i in range(120)]
    assert len(plan.alone) == 50 and plan.alone[0] == 0 and plan.alone[-1] == 119
    assert set(np.diff(plan.alone)) <= {2, 3}  # spread evenly
    for index, by_caption, by_vector in zip(plan.alone, plan.by_caption, plan.by_vector, strict=True):
        assert (list(by_caption.conditions), list(by_vector.conditions)) == (["text"], ["vision"])
        assert by_caption.conditions["text"] is of.records[index].text and by_caption.seed == by_vector.seed == index
    assert plan.requests() == plan.own + plan.moved + plan.by_caption + plan.by_vector
    assert len(Memorisation.plan(full_grid(2, 2, 3)).alone) == 12


def test_the_numbers_of_plain_pictures():
    """All are drawn two grey levels too light, but 0 comes as 1, and 5 as 6."""
    own = [plain(22 + 10 * k) for k in range(20)]
    own[0], own[5] = GREYS[1], GREYS[6]
    verdict = measured(GREYS, own)
    numbers = verdict.numbers
    assert (verdict.value, numbers["retrieved"], numbers["questions"]) == (0.9, 0.9, 20)
    assert numbers["psnr_median_db"] == pytest.approx(20 * np.log10(255 / 2))
    assert numbers["psnr_worst_db"] == pytest.approx(20 * np.log10(255 / 10))
    assert (numbers["distance_to_the_nearest"], numbers["twins"]) == (2, 0)
    assert numbers["usual_distance"] == pytest.approx(60)  # 19 of 10, 18 of 20, 17 of 30, ...: the 95th of 190
    assert verdict.statement.startswith("18 of 20 ") and "chance 5 %" in verdict.statement

    first, second = verdict.cases[:2]
    assert (first.label, first.passed, second.passed) == ("caption 0", False, True)
    assert (first.score, second.score) == pytest.approx((-10, 6)) and (first.answer, second.answer) == (0, 1)
    assert "picture 1.png" in first.note and "picture" not in second.note
    assert [title for title, _ in first.pictures] == ["original", "drawn"]
    assert (first.pictures[0][1] == GREYS[0]).all() and (first.drawn == GREYS[1]).all()
    chart = verdict.chart
    assert chart.x[:2] == pytest.approx((10, 2)) and chart.y[:2] == pytest.approx((0, 8))
    assert chart.passed == tuple(case.passed for case in verdict.cases)


def test_one_condition_alone_is_measured_on_its_own_records():
    of = full_grid(2, 2, 5)
    truths, places = list(of.truths), of.places
    alone = [0, 7, 19]
    same_row, same_light = [truths[1], truths[7], truths[18]], [truths[5], truths[7], truths[0]]
    verdict = measured(truths, truths, alone=alone, by_caption=same_row, by_vector=same_light, places=places)
    numbers = verdict.numbers
    assert (numbers["by_caption_alone"], numbers["by_caption_alone_right_row"]) == pytest.approx((1 / 3, 1))
    assert (numbers["by_vector_alone"], numbers["by_vector_alone_right_light"]) == pytest.approx((1 / 3, 2 / 3))
    numbers = measured(truths, truths, alone=alone, by_caption=same_row, by_vector=same_light).numbers
    assert numbers["by_caption_alone_right_row"] is None and numbers["right_row"] is None


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


def test_twins_count_as_found_and_are_counted():
    truths = [plain(level) for level in (100, 101, 150, 152)]
    verdict = measured(truths, [plain(level) for level in (101, 100, 152, 150)])
    assert verdict.numbers["twins"] == 2
    assert [case.passed for case in verdict.cases] == [True, True, False, False]


# ------------------------------------------------------------------------------------------ the verdict

HUNDRED = [plain(20 + 2 * k) for k in range(100)]


@pytest.mark.parametrize(("missed", "passed"), [(1, True), (2, False)])
def test_one_picture_in_a_hundred_may_be_missed(missed, passed):
    verdict = measured(HUNDRED, [HUNDRED[k + 1] if k < missed else HUNDRED[k] for k in range(100)])
    assert verdict.passed == passed and verdict.value == 1 - missed / 100 and verdict.threshold == 0.99
    assert [reason for reason in verdict.reasons if "98 %" not in reason or "99 %" not in reason] == []


@pytest.mark.parametrize(("count", "passed"), [(20, True), (19, False)])
def test_twenty_pictures_are_needed(count, passed):
    verdict = measured(GREYS[:count], GREYS[:count])
    assert verdict.passed == passed and verdict.value == 1
    assert all("19" in reason and "20" in reason for reason in verdict.reasons)


def of_the_noise(truths, kept: int, seed: int = 0) -> list[np.ndarray]:
    """What is drawn from other noise by a model that gives the first `kept` records the picture of that noise."""
    partner = shuffled(set_of(truths, seed=seed))
    moved = list(truths)
    for index in range(kept):
        moved[index] = truths[int(np.flatnonzero(partner == index)[0])]
    return moved


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(("kept", "passed"), [(3, True), (4, False)])
def test_other_noise_may_give_its_own_picture_as_often_as_chance(kept, passed, seed):
    """Chance is 1 in 100; three standard deviations more are 0.0398."""
    verdict = measured(HUNDRED, HUNDRED, of_the_noise(HUNDRED, kept, seed), seed=seed)
    first, second = verdict.controls
    assert first.bound == pytest.approx(0.01 + 3 * (0.01 * 0.99 / 100) ** 0.5)
    assert first.value == kept / 100 and first.passed == verdict.passed == passed
    assert (second.value, second.passed) == (1 - kept / 100, True)


@pytest.mark.parametrize(("lost", "passed"), [(10, True), (11, False)])
def test_nine_in_ten_must_be_the_same_from_other_noise(lost, passed):
    """What is drawn instead belongs to neither."""
    verdict = measured(HUNDRED, HUNDRED, [plain(255)] * lost + HUNDRED[lost:])
    first, second = verdict.controls
    assert (second.value, second.bound, second.passed) == (1 - lost / 100, 0.9, passed)
    assert first.passed and verdict.passed == passed and len(verdict.reasons) == (not passed)
