"""The text edit: its plan, the words that it changes, its numbers in closed form, and its verdict at each limit."""

import re

import numpy as np
import pytest
from gate_pictures import Gallery, full_grid, plain, set_of
from wording import naming

from fluxdit_jax.dataset.grid import Place
from fluxdit_jax.gate.edit import EditError, TextEdit, choose_unrelated, edited
from fluxdit_jax.gate.memorisation import Memorisation, from_other_noise
from fluxdit_jax.gate.retrieval import Library

# ------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("caption", "result"),
    [
        ("a man looking left", "a man looking right"),
        ("Looking left, a man", "looking right, a man"),
        ("looking leftwards", None),
        ("overlooking left bank", None),
        ("looking left, then looking left", "looking right, then looking right"),
        ("a man", None),
    ],
)
def test_whole_words_are_replaced(caption, result):
    assert edited(caption, "looking left", "looking right") == result


def test_an_edit_takes_its_words_literally_and_may_change_nothing():
    assert edited("a cat", "cat", "cat") is None
    assert edited("a cat", "cat", r"\1 dog") == r"a \1 dog"
    assert edited("a c++ book", "c++", "rust") == "a rust book"
    assert edited("xc++", "c++", "rust") is None and edited("c++x", "c++", "rust") == "rustx"


CAPTIONS = ["portrait of a man, looking left", "portrait of a woman, looking right", "portrait of a cat"]


@pytest.mark.parametrize(
    ("captions", "given", "words"),
    [
        (CAPTIONS, None, ("portrait of", "picture of")),
        (["a photograph of a dog"] * 2, None, ("photograph of", "picture of")),
        (["picture of a dog", "picture of it"], None, ("picture of", "image of")),
        (["a house", "a tree"], None, ("a", "one")),
        (["house with tree", "tree"], None, ("with", "having")),  # half of the captions is enough
        (["a house with tree", "a tree", "a lake"], None, ("a", "one")),
        (CAPTIONS, "man => person", ("man", "person")),
        (CAPTIONS, "cat=>big cat", ("cat", "big cat")),  # in one caption
        (["cat, looking left", "sofa, looking right"], None, ("looking", "facing")),
    ],
)
def test_the_unrelated_words_are_those_given_or_found(captions, given, words):
    assert choose_unrelated(captions, given) == words


@pytest.mark.parametrize("given", ["man", "man=>", "=>b", "", "zebra=>horse", "ma=>x", "cat=>cat"])
def test_unrelated_words_of_another_form_or_in_no_caption_are_refused(given):
    with pytest.raises(EditError, match=naming("--unrelated", repr(given))):
        choose_unrelated(CAPTIONS, given)


def test_without_a_harmless_word_one_must_be_given():
    for captions in (["Haus", "Baum"], ["a house", "Haus", "Baum"]):
        with pytest.raises(EditError, match="--unrelated"):
            choose_unrelated(captions, None)


# ------------------------------------------------------------------------------------------ the plan


def planned(of, limit=40, words="picture of=>image of"):
    asked = []

    def encode(captions):
        asked.append(list(captions))
        return [{"text": np.full((1, 2), 100 + k)} for k in range(len(captions))]

    return TextEdit.plan(of, limit, words, encode), asked


def test_a_case_is_a_record_and_the_one_of_the_other_view_in_its_light():
    of = full_grid(3, 2, 4)
    plan, _ = planned(of)
    assert len(plan.cases) == plan.possible == 24 and [index for index, _ in plan.cases] == list(range(24))
    for index, answer in plan.cases:
        a, b = of.places[index], of.places[answer]
        assert (a.photograph, a.light) == (b.photograph, b.light) and a.view != b.view
    three, _ = planned(full_grid(2, 3, 2))
    assert len(three.cases) == 24 and len(set(three.cases)) == 24  # each of twelve becomes either of two


def test_an_edited_caption_is_the_answers_with_the_records_own_vector():
    of = full_grid(3, 2, 4, seed=50)
    plan, asked = planned(of)
    for k, (index, answer) in enumerate(plan.cases):
        one, unrelated, moved = plan.edited[k], plan.unrelated[k], plan.moved[k]
        assert one.conditions["text"] is of.records[answer].text and one.caption == of.caption(answer)
        assert one.conditions["vision"] is of.records[index].vision and one.seed == 50 + index
        assert unrelated.caption == of.caption(index).replace("picture of", "image of")
        assert unrelated.conditions["vision"] is of.records[index].vision and unrelated.seed == 50 + index
        assert moved.key == from_other_noise(of, index).key
    # Encoded are the captions that no record has, each once: what is asked for is in the set.
    assert asked == [sorted({one.caption for one in plan.unrelated})] and len(asked[0]) == 6
    texts = dict(zip(asked[0], (100 + k for k in range(6))))
    assert all((one.conditions["text"] == texts[one.caption]).all() for one in plan.unrelated)
    assert plan.requests() == plan.edited + plan.unrelated + plan.moved and plan.words == ("picture of", "image of")


def test_other_noise_is_what_memorisation_draws_anyway():
    of = full_grid(3, 2, 4)
    drawn = {one.key for one in Memorisation.plan(of).moved}
    assert {one.key for one in planned(of)[0].moved} <= drawn


def test_a_caption_without_the_unrelated_word_is_asked_for_without_it():
    of = full_grid(3, 2, 4)
    plan, asked = planned(of, words="p1=>p7")
    assert [one is not None for one in plan.unrelated] == [False] * 8 + [True] * 8 + [False] * 8
    assert asked == [["picture of p7, mirrored", "picture of p7, original"]] and None not in plan.requests()
    assert len(plan.requests()) == 24 + 8 + 24
    with pytest.raises(ValueError, match="zip"):
        TextEdit.plan(of, 40, "p1=>p7", lambda captions: [])


def test_nothing_is_encoded_where_nothing_new_is_asked_for():
    """One caption has the word, and of two cases neither is its own."""
    of = full_grid(3, 2, 4)
    records = list(of.records)
    records[12] = type(records[12])(**vars(records[12]) | {"caption": "a zebra"})
    plan, asked = planned(type(of)(tuple(records), of.truths, 2, of.grid), limit=2, words="zebra=>horse")
    assert asked == [] and plan.unrelated == [None, None] and [index for index, _ in plan.cases] == [0, 23]


@pytest.mark.parametrize(("limit", "chosen"), [(1, [0]), (2, [0, 23]), (4, [0, 8, 15, 23]), (40, list(range(24)))])
def test_cases_are_spread_evenly(limit, chosen):
    plan, _ = planned(full_grid(3, 2, 4), limit=limit)
    assert [index for index, _ in plan.cases] == chosen and plan.possible == 24


@pytest.mark.parametrize(
    ("of", "possible"),
    [
        (full_grid(4, 1, 5), 0),
        (full_grid(1, 2, 4), 8),
        (set_of([plain(9)] * 30), 0),
        (set_of([plain(9)] * 2, places=[Place("p", "a", "l0"), Place("p", "b", "l1")]), 0),  # not in its light
    ],
    ids=["one view", "eight", "no grid", "gaps"],
)
def test_a_set_with_fewer_than_ten_cases_is_not_judged(of, possible):
    plan, asked = planned(of, words="zebra=>horse")  # what no caption has is not missed
    assert (plan.cases, plan.possible, plan.requests(), asked) == ([], possible, [], [])
    verdict = plan.measure(Gallery(), Library(of))
    assert not verdict.judged and not verdict.passed and re.search(naming(possible), verdict.reasons[0])
    assert (verdict.name, verdict.threshold) == ("text_edit", 0.9)


def test_ten_cases_are_enough():
    plan, _ = planned(full_grid(1, 2, 5))
    assert len(plan.cases) == plan.possible == 10


# ------------------------------------------------------------------------------------------ the measure

# Two views of photograph p in two lights, and another photograph.
TRUTHS = [plain(level) for level in (20, 60, 120, 160, 240)]
PLACES = [Place("p", "a", "l"), Place("p", "a", "m"), Place("p", "b", "l"), Place("p", "b", "m"), Place("q", "a", "l")]
FEW = set_of(TRUTHS, ["p left", "p left", "p right", "p right", "q"], PLACES)
OWN, OWN_OTHER_LIGHT, ANSWER, ANSWER_OTHER_LIGHT, STRANGER = TRUTHS


def measured(drawn, unrelated=(OWN,), moved=(OWN,), of=FEW):
    """Each case is the first record, whose answer is the third; a control's pictures are repeated to that number."""
    gallery, count = Gallery(), len(drawn)
    changed = [*gallery.of(unrelated), *[None] * count][:count]
    moved = gallery.of([*moved, *[moved[-1]] * count][:count])
    plan = TextEdit(of, [(0, 2)] * count, 10, gallery.of(drawn), changed, moved, ("photo of", "picture of"))
    return plan.measure(gallery, Library(of))


def test_the_numbers_of_what_was_drawn():
    drawn = [ANSWER] * 4 + [OWN] * 3 + [OWN_OTHER_LIGHT, ANSWER_OTHER_LIGHT, STRANGER]
    verdict = measured(drawn)
    numbers = verdict.numbers
    assert verdict.value == numbers["retrieved"] == 0.4 and not verdict.passed and verdict.judged
    assert verdict.name == "text_edit"
    assert (numbers["right_row"], numbers["right_light"], numbers["stayed"]) == (0.5, 0.8, 0.4)
    assert (numbers["questions"], numbers["unrelated_asked"]) == (10, 1)
    (reason,) = verdict.reasons
    assert re.search(naming("40 %", "90 %", "50 % the view", "40 % the old", "80 % the same light"), reason)
    assert verdict.statement.startswith("4 of 10 ") and "chance 20 %" in verdict.statement
    assert verdict.chart.x == (*[0] * 4, *[100] * 3, 60, 40, 120)
    first, second = verdict.cases[0], verdict.cases[4]
    assert (first.label, first.passed, first.score, first.answer) == ("p left => p right", True, 40, 2)
    assert (second.passed, second.score) == (False, -100) and "picture 0.png" in second.note
    assert [title for title, _ in second.pictures] == ["A", "the answer", "drawn"]
    assert all((shown == expected).all() for (_, shown), expected in zip(second.pictures, (OWN, ANSWER, OWN)))


def test_pictures_of_something_else_have_neither_view_nor_light():
    bare = set_of(TRUTHS, places=[*PLACES[:4], None])
    verdict = measured([STRANGER] * 10, of=bare)
    assert [verdict.numbers[name] for name in ("right_row", "right_light", "stayed")] == [0, 0, 0]
    assert re.search(naming("0 % the view", "0 % the old one", "0 % the same light"), verdict.reasons[0])


@pytest.mark.parametrize(
    ("right", "count", "passed"), [(10, 10, True), (9, 10, True), (8, 10, False), (9, 9, False), (36, 40, True)]
)
def test_nine_in_ten_must_be_right_and_ten_are_needed(right, count, passed):
    verdict = measured([ANSWER] * right + [OWN] * (count - right))
    assert verdict.passed == passed and verdict.value == right / count and verdict.threshold == 0.9
    assert len(verdict.reasons) == (not passed) and f"{right} of {count} " in verdict.statement


@pytest.mark.parametrize(("lost", "passed"), [(1, True), (2, False)])
def test_one_picture_in_ten_may_be_another_from_other_noise(lost, passed):
    verdict = measured([ANSWER] * 10, moved=[OWN_OTHER_LIGHT] * lost + [OWN])
    noise, unrelated = verdict.controls
    assert (noise.value, noise.bound, noise.passed) == (1 - lost / 10, 0.9, passed) and unrelated.passed
    assert verdict.passed == passed and len(verdict.reasons) == (not passed)


@pytest.mark.parametrize(("lost", "passed"), [(1, True), (2, False)])
def test_an_unrelated_word_may_change_one_picture_in_ten(lost, passed):
    verdict = measured([ANSWER] * 10, unrelated=[ANSWER] * lost + [OWN] * (10 - lost))
    noise, unrelated = verdict.controls
    assert (unrelated.value, unrelated.bound, unrelated.passed) == (1 - lost / 10, 0.9, passed) and noise.passed
    assert verdict.passed == passed and verdict.numbers["unrelated_asked"] == 10
    assert "'photo of' becomes 'picture of'" in unrelated.name


def test_without_an_unrelated_word_the_control_fails():
    verdict = measured([ANSWER] * 10, unrelated=[])
    assert (verdict.controls[1].value, verdict.numbers["unrelated_asked"], verdict.passed) == (0, 0, False)


def test_a_draw_that_gives_too_few_pictures_is_an_error():
    gallery = Gallery()
    right, own = gallery.of([ANSWER] * 2), gallery.of([OWN] * 2)
    plan = TextEdit(FEW, [(0, 2)] * 2, 10, right, [None] * 2, own, ("a", "b"))
    with pytest.raises(ValueError, match="zip"):
        plan.measure(lambda requests: gallery(requests)[:1], Library(FEW))
