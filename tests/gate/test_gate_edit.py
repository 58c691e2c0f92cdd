"""The text edit: its numbers in closed form, on strips that move by whole pixels, and its verdict at each limit."""

import functools
import re

import numpy as np
import pytest
from gate_pictures import Gallery, album_of, plain
from gate_scenes import _texture
from wording import naming

from fluxdit_jax.gate.edit import Edit
from fluxdit_jax.gate.memorisation import Memorisation
from fluxdit_jax.shared.edit_rules import Rule

TO_THE_RIGHT, TO_THE_LEFT = Rule("left", "right", "right"), Rule("right", "left", "left")
DOWN = Rule("left", "right", "down")
WORDS = ("photo of", "picture of")


@functools.cache
def strip(shift: int | None, name: str = "paint", height: int = 16, width: int = 64, grain: float = 2.0) -> np.ndarray:
    """A piece of an endless texture, `shift` pixels to the right of where it was; None: plain grey."""
    if shift is None:
        return plain(117, height, width)
    endless = np.tile(_texture(name, grain), (1, 2, 1))
    return np.rint(255 * endless[:height, 64 - shift : 64 - shift + width]).astype(np.uint8)


STRIPS = {shift: strip(shift) for shift in (None, -8, -4, 0, 2, 4, 8)}
ONE = album_of([STRIPS[0]], ["photo of a fox, left"])


def measured(edited, *, drawn=None, unrelated=(0,), seeds=(0,), rule=TO_THE_RIGHT, album=ONE, of=STRIPS):
    """The verdict where all pictures are that of the first record, moved by so many pixels; `of`: pictures by shift."""
    gallery, count = Gallery(), len(edited)
    unrelated = [*gallery.of([of[shift] for shift in unrelated]), *[None] * count][:count]
    other = [gallery.of([of[shift] for shift in seeds])] + [[]] * (count - 1)
    own, changed = gallery.of(drawn or [of[0]] * count), gallery.of([of[shift] for shift in edited])
    cases = [(0, rule, "photo of a fox, right")] * count
    return Edit(album, cases, own, changed, unrelated, other, WORDS).measure(gallery)


# ------------------------------------------------------------------------------------------ the plan

CAPTIONS = ["photo of a fox, left", "a fox, right", "photo of a cat, left", "photo of a cat, right", "photo of a hen"]


def planned(album, rules=(TO_THE_RIGHT, TO_THE_LEFT), words=WORDS, limit=40):
    asked = []

    def encode(captions):
        asked.extend(captions)
        return [{"text": np.full((1, 2), 100 + k)} for k in range(len(captions))]

    return Edit.plan(album, list(rules), words, limit, encode), asked


def test_an_edit_case_is_a_record_and_a_rule_with_the_records_vector():
    album = album_of([strip(0)] * 5, CAPTIONS, seed=50)
    plan, asked = planned(album)
    assert [(i, rule) for i, rule, _ in plan.cases] == [
        (0, TO_THE_RIGHT), (2, TO_THE_RIGHT), (1, TO_THE_LEFT), (3, TO_THE_LEFT),
    ]  # fmt: skip
    new = ["photo of a fox, right", "photo of a cat, right", "a fox, left", "photo of a cat, left"]
    changed = ["picture of a fox, left", "picture of a cat, left", "picture of a cat, right"]
    assert asked == sorted([*new[::2], *changed])  # the two cats are captions of the set
    texts = {record.caption: {"text": record.text} for record in album.records} | {
        caption: {"text": np.full((1, 2), 100 + k)} for k, caption in enumerate(asked)
    }
    for k, (i, _, caption) in enumerate(plan.cases):
        assert (caption, plan.plain[k].key) == (new[k], album.wanted(i, i, i).key)
        assert plan.edited[k].key == album.wanted(i, i, i, caption=new[k], made=texts[new[k]]).key
        for one in (plan.plain[k], plan.edited[k], plan.unrelated[k]):
            assert one is None or (one.conditions["text"] == texts[one.caption]["text"]).all()
    assert [one and one.caption for one in plan.unrelated] == [*changed[:2], None, changed[2]]
    assert [one and one.seed for one in plan.unrelated] == [50, 52, None, 53]
    wanted = [one.key for one in plan.wanted()]
    assert len(wanted) == 4 + 4 + 3 + 8 and None not in wanted


def test_other_seeds_reuse_what_the_shuffle_draws():
    album = album_of([strip(0)] * 5, CAPTIONS, seed=50)
    shuffled = {one.key for one in Memorisation.plan(album).shuffled}
    plan, _ = planned(album)
    for (i, _, _), (first, second) in zip(plan.cases, plan.seeds):
        assert first.key in shuffled and first.caption == second.caption == album.caption(i)
        assert second.seed > 1000 and second.grid == album.grid(i)
    sizes = album_of([strip(0, height=8 + 8 * k) for k in range(5)], CAPTIONS, seed=50)
    for (i, _, _), seeds in zip(*(getattr(planned(sizes)[0], name) for name in ("cases", "seeds"))):
        assert {(one.caption, one.grid) for one in seeds} == {(sizes.caption(i), sizes.grid(i))}
        assert len({one.seed for one in seeds}) == 2 and min(one.seed for one in seeds) > 1000


@pytest.mark.parametrize(("limit", "cases"), [(1, [0, 1]), (3, [0, 1]), (4, [0, 2, 1, 3]), (40, [0, 2, 1, 3])])
def test_cases_are_spread_over_the_rules_and_each_has_one(limit, cases):
    plan, _ = planned(album_of([strip(0)] * 5, CAPTIONS), limit=limit)
    assert [i for i, _, _ in plan.cases] == cases


def test_only_captions_that_no_record_has_are_encoded():
    album = album_of([strip(0)] * 4, ["fox left", "fox right", "cat left", "cat right"])
    assert planned(album, words=("fox", "cat"))[1] == []
    with pytest.raises(ValueError, match="zip"):
        Edit.plan(album, [TO_THE_RIGHT], ("fox", "hen"), 40, lambda captions: [])


# ------------------------------------------------------------------------------------------ the measure


def test_the_numbers_of_moves_by_whole_pixels():
    verdict = measured([8, 8, 8, 8, 4, 2, 0, -8, -4, None], unrelated=[0, -8, 8], seeds=[0, 0, None])
    numbers = verdict.numbers
    assert (verdict.value, numbers["right_way"], numbers["wrong_way"], numbers["not_measurable"]) == (
        0.6,
        0.6,
        0.2,
        0.1,
    )
    assert numbers["effect_median"] == (4 + 2) / 2 / 64
    assert (numbers["cases"], numbers["seeds_measured"], numbers["unrelated_median"]) == (10, 3, 8 / 64)
    assert numbers["seeds_not_recognised"] == pytest.approx(1 / 3)
    assert numbers["unedited_like_original"] == pytest.approx(1)
    assert numbers["rules"] == ["left => right: right"] and numbers["calibration"] == {}
    assert numbers["true_answers_known"] == 0 and "exactly_the_true_answer" not in numbers
    assert "60 %" in " ".join(verdict.reasons) and "20 %" in " ".join(verdict.reasons)
    chart, cases = verdict.chart, verdict.cases
    assert chart.x == tuple(shift / 64 for shift in (8, 8, 8, 8, 4, 2, 0, -8, -4, 0)) and chart.x_lines == (0.02,)
    assert chart.passed == tuple(case.passed for case in cases) == (True,) * 6 + (False,) * 4
    assert chart.y[9] == 0 and all(0.8 < found <= 1 for found in chart.y[:9])
    assert [case.score for case in cases] == [*chart.x[:9], -1]
    assert re.search(naming("12.5 %", "right"), cases[0].note) and "right" not in cases[9].note
    assert [title for title, _ in cases[0].pictures] == ["original", "drawn", "edited"]
    assert all(
        (shown == expected).all() for (_, shown), expected in zip(cases[0].pictures, (strip(0), strip(0), strip(8)))
    )


def test_what_is_not_measured_counts_as_no_movement():
    assert measured([None, 0, 4, 4]).numbers["effect_median"] == 2 / 64
    assert measured([8, 8], unrelated=[None, 0]).numbers["unrelated_median"] == 0


@pytest.mark.parametrize(
    ("rule", "turned", "sign"),
    [(TO_THE_RIGHT, False, 1), (TO_THE_LEFT, False, -1), (DOWN, True, 1), (Rule("left", "right", "up"), True, -1)],
)
def test_the_way_of_the_rule_decides(rule, turned, sign):
    of = {shift: np.transpose(image, (1, 0, 2)).copy() if turned else image for shift, image in STRIPS.items()}
    album = album_of([of[0]], ["a fox, left"])
    numbers = measured([8], unrelated=[8], seeds=[8], rule=rule, album=album, of=of).numbers
    assert numbers["effect_median"] == sign * 8 / 64
    assert (numbers["right_way"], numbers["wrong_way"]) == ((1, 0) if sign == 1 else (0, 1))
    assert (numbers["seed_spread"], numbers["unrelated_median"]) == (8 / 64, 8 / 64)


def test_a_fiftieth_of_the_side_is_no_movement():
    """One pixel of a picture that is 50 wide."""
    of = {shift: strip(shift, height=64, width=50, grain=0.8) for shift in (-1, 0, 1, 2)}
    album = album_of(
        [of[0], of[1]], ["photo of a fox, left", "photo of a fox, right"], ["c00_l0.png", "c01_l0.png"]
    )  # fmt: skip
    verdict = measured([1, 2, -1], unrelated=[1, -1, 2], album=album, of=of)
    assert verdict.numbers["right_way"] == pytest.approx(1 / 3) and verdict.numbers["wrong_way"] == 0
    assert verdict.controls[1].value == pytest.approx(1 / 3)
    calibration = verdict.numbers["calibration"]
    assert (calibration["least"], calibration["right_way"]) == (0.02, 0)


def test_a_move_in_another_scene_than_the_one_asked_for_gives_no_score():
    elsewhere = [strip(0, "another paint"), strip(0)]
    of = STRIPS | {"elsewhere": strip(8, "another paint")}
    verdict = measured(["elsewhere", 8], drawn=elsewhere, of=of)
    assert [case.passed for case in verdict.cases] == [False, True] and verdict.numbers["not_measurable"] == 0.5
    assert verdict.cases[0].score == -1 and verdict.chart.x == (0, 8 / 64)


def test_the_noise_control_allows_half_of_what_the_words_do():
    """Nine of ten movements between noises are below 4 pixels, either way; what is not recognised is told apart."""
    seeds = [0] * 9 + [-4, 8]
    verdict = measured([8, 8, 8], seeds=[*seeds, None])
    control = verdict.controls[0]
    assert (control.value, control.bound, control.passed) == (4 / 64, 4 / 64, True)
    assert verdict.numbers["seed_spread"] == 4 / 64 and verdict.numbers["seeds_not_recognised"] == 1 / 12
    assert not measured([4, 4, 4], seeds=seeds).controls[0].passed
    assert measured([-8, -8, -8]).controls[0].bound == 0
    nothing = measured([8], seeds=[None])
    assert (nothing.numbers["seed_spread"], nothing.numbers["seeds_not_recognised"]) == (1, 1)


@pytest.mark.parametrize(("moved", "passed"), [([8], True), ([8, None], False), ([8, -8], False)])
def test_an_unrelated_word_may_move_one_picture_in_ten(moved, passed):
    verdict = measured([8] * 10, unrelated=[*moved, *[0] * (10 - len(moved))])
    control = verdict.controls[1]
    assert (control.value, control.bound, control.passed) == (len(moved) / 10, 0.1, passed) and verdict.passed == passed
    assert "'photo of' becomes 'picture of'" in control.name


def test_without_an_unrelated_word_the_control_fails():
    verdict = measured([8] * 10, unrelated=[])
    assert (verdict.controls[1].value, verdict.numbers["unrelated_median"], verdict.passed) == (1, 0, False)


@pytest.mark.parametrize(
    ("edited", "passed"), [([8] * 10, True), ([8] * 9 + [0], True), ([8] * 8 + [0] * 2, False), ([8] * 9, False)]
)
def test_nine_in_ten_must_move_and_ten_are_needed(edited, passed):
    verdict = measured(edited)
    assert verdict.passed == passed and verdict.value == edited.count(8) / len(edited) and verdict.threshold == 0.9
    assert len(verdict.reasons) == (0 if passed else 1)
    assert f"in {edited.count(8)} of {len(edited)} cases" in verdict.statement


@pytest.mark.parametrize(("lost", "passed"), [(1, True), (2, False)])
def test_one_picture_in_ten_may_be_another_from_other_noise(lost, passed):
    verdict = measured([8] * 10, seeds=[0] * (10 - lost) + [None] * lost)
    assert verdict.passed == passed and verdict.numbers["seeds_not_recognised"] == lost / 10


def test_a_draw_that_gives_too_few_pictures_is_an_error():
    gallery = Gallery()
    own, changed = gallery.of([strip(0)] * 2), gallery.of([strip(8)] * 2)
    plan = Edit(ONE, [(0, TO_THE_RIGHT, "")] * 2, own, changed, [None] * 2, [[], []], WORDS)
    with pytest.raises(ValueError, match="zip"):
        plan.measure(lambda wanted: gallery(wanted)[:1])


# ------------------------------------------------------------------------------------------ known answers


def known(answers: dict[int, np.ndarray]):
    """Lights with the fox on the left and on the right: of each light the right picture is given; hens beside them."""
    pictures, captions, keys = [], [], []
    for light, right in answers.items():
        pictures += [strip(0, height=right.shape[0]), right, strip(0, "hen")]
        captions += ["photo of a fox, left", "photo of a fox, right", "photo of a hen, left"]
        keys += [f"c00_l{light}.png", f"c01_l{light}.png", f"c02_l{light}.png"]
    pictures[0] = strip(0)
    return album_of(pictures, captions, keys)


def test_the_measure_is_tried_on_true_pairs():
    """Those of one size whose answer is in the set: of five lights one has another size, and one shows nothing."""
    album = known({0: strip(None, height=8), 1: strip(8), 2: strip(2), 3: strip(None), 4: strip(4)})
    verdict = measured([8] * 10, album=album)
    assert verdict.numbers["calibration"] == {
        "true_pairs": 4, "right_way": 0.75, "median": 4 / 64, "least": 2 / 64, "most": 8 / 64,
    }  # fmt: skip
    (reason,) = verdict.reasons
    assert "75 %" in reason and not verdict.passed
    nothing = measured([8], album=known({1: strip(None)})).numbers["calibration"]
    assert nothing == {"true_pairs": 1, "right_way": 0, "median": None, "least": None, "most": None}


def test_the_measure_is_tried_on_the_axis_and_the_way_of_each_rule():
    album, gallery = known({1: strip(8)}), Gallery()
    own, changed = gallery.of([strip(0)] * 2), gallery.of([strip(8)] * 2)
    cases = [(0, TO_THE_RIGHT, "photo of a fox, right"), (0, Rule("left", "right", "left"), "photo of a fox, right")]
    plan = Edit(album, cases, own, changed, [None] * 2, [gallery.of([strip(0)]), []], WORDS)
    numbers = plan.measure(gallery).numbers
    assert numbers["calibration"] == {
        "true_pairs": 2, "right_way": 0.5, "median": 0, "least": -8 / 64, "most": 8 / 64,
    }  # fmt: skip
    assert numbers["rules"] == ["left => right: right", "left => right: left"]


def test_a_set_on_which_the_measure_is_right_passes_and_its_answers_are_shown():
    verdict = measured([8] * 9 + [0], album=known({1: strip(8)}))
    assert verdict.passed and verdict.numbers["calibration"]["right_way"] == 1
    assert (verdict.numbers["true_answers_known"], verdict.numbers["exactly_the_true_answer"]) == (10, 0.9)
    title, shown = verdict.cases[0].pictures[-1]
    assert title == "the truth" and (shown == strip(8)).all()
