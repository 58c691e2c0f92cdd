"""Captions of a photograph and of its mirrored picture: which words are exchanged, which are added."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from wording import naming

from preprocess import PreprocessError
from preprocess.subset.candidates import SubsetOptions
from preprocess.subset.views import MIRRORED, ORIGINAL, USUAL, Edit, captions_of_views, mirrored

USUALLY = [USUAL]
FACING = Edit("facing the sea", "facing the hills")


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("a cat looking left", "a cat looking right"),
        ("a cat looking right", "a cat looking left"),
        ("a cup on the left, a spoon on the right", "a cup on the right, a spoon on the left"),
        ("Left of it a dog", "Right of it a dog"),
        ("LEFT HAND, Right Hand, right hand", "RIGHT HAND, Left Hand, left hand"),
        ("Looking left, a man", "Looking right, a man"),
        ("LOOKING LEFT", "LOOKING RIGHT"),
        ("a left-handed man, left.", "a right-handed man, right."),
        ("left\nright", "right\nleft"),
        ("„links“ – left…", "„links“ – right…"),
        ("左 left 右", "左 right 右"),
    ],
)
def test_words_are_exchanged_and_keep_their_case(caption: str, wanted: str) -> None:
    assert mirrored(caption, USUALLY) == wanted
    assert mirrored(wanted, USUALLY) == caption


@pytest.mark.parametrize(
    "caption",
    [
        "a bright day", "leftover food", "the rightmost one", "upright", "cleft", "éleft", "leftß", "left_hand",
        "right2", "a dog", "looking up", "", "lookıng", "rıght", "lookıng up, rıght now",
    ],
)  # fmt: skip
def test_words_that_only_hold_them_are_left_alone(caption: str) -> None:
    assert mirrored(caption, USUALLY) == caption


def test_edits_work_both_ways_beside_left_and_right() -> None:
    assert mirrored("a man facing the sea", [FACING]) == "a man facing the hills"
    assert mirrored("A man Facing the hills on the left", [FACING]) == "A man Facing the sea on the right"
    both = [FACING, Edit("east", "west")]
    assert mirrored("east of it, facing the sea, the western west", both) == (
        "west of it, facing the hills, the western east"
    )
    assert mirrored("eastern", both) == "eastern"
    street = [Edit("auf der Straße", "auf dem Weg")]
    assert mirrored("Auf der Straße, AUF DEM WEG", street) == "Auf dem Weg, AUF DER STRASSE"


def test_the_longest_words_come_first() -> None:
    edits = [Edit("left", "right"), Edit("left behind", "taken along"), Edit("on the left behind", "over there")]
    assert mirrored("left behind", edits) == "taken along"
    assert mirrored("on the left behind", edits) == "over there"
    assert mirrored("left, taken along", edits) == "right, left behind"


def test_edits_are_words_and_no_patterns() -> None:
    edits = [Edit("c++ (left)", "a|b.*"), Edit("->", "<-")]
    assert mirrored("c++ (left) or ccc left", edits) == "a|b.* or ccc right"
    assert mirrored("a|b.* or abc", edits) == "c++ (left) or abc"
    assert mirrored("x->y <-z", edits) == "x<-y ->z"


@pytest.mark.parametrize(
    ("caption", "left", "right"),
    [
        ("a dog", "a dog, looking left", "a dog, looking right"),
        ("A dog on grass.", "A dog on grass, looking left.", "A dog on grass, looking right."),
        ("a dog \n", "a dog, looking left", "a dog, looking right"),
        ("a dog . ", "a dog, looking left.", "a dog, looking right."),
        ("ein Hund. 犬", "ein Hund. 犬, looking left", "ein Hund. 犬, looking right"),
        ("a bright dog!", "a bright dog!, looking left", "a bright dog!, looking right"),
    ],
)
def test_to_a_caption_without_such_words_they_are_added(caption: str, left: str, right: str) -> None:
    assert captions_of_views(caption, USUALLY) == (left, right)
    assert mirrored(left, USUALLY) == right


def test_captions_of_views_are_the_caption_and_its_mirrored_one() -> None:
    assert captions_of_views("A cat on the Right.", USUALLY) == ("A cat on the Right.", "A cat on the Left.")
    assert captions_of_views("a dog", [FACING, USUAL]) == ("a dog, facing the sea", "a dog, facing the hills")
    assert captions_of_views("a dog looking left", [FACING, USUAL])[1] == "a dog looking right"


def test_without_mirrored_pictures_captions_stay() -> None:
    told = SubsetOptions("in", "out").captions("a dog")
    assert told == {ORIGINAL: "a dog, looking left", MIRRORED: "a dog, looking right"}
    assert SubsetOptions("in", "out", mirror=False).captions("a dog") == {ORIGINAL: "a dog"}


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        ("looking left=>looking right", "looking left", "looking right"),
        ("  a b =>  c d ", "a b", "c d"),
        ("at 5:right=>at 5:left away", "at 5:right", "at 5:left away"),
        ("a=>b=>c", "a", "b=>c"),
        (":up=>:down", ":up", ":down"),
    ],
)
def test_edits_are_read(text: str, old: str, new: str) -> None:
    assert Edit.parse(text) == Edit(old, new)


@pytest.mark.parametrize("text", ["", "left to right", "left=right", "=>right", "left=>", " => ", "Left=>left", "=>"])
def test_what_is_no_edit_is_named(text: str) -> None:
    with pytest.raises(PreprocessError, match=naming("--edit", repr(text), "'OLD WORDS=>NEW WORDS'")):
        Edit.parse(text)


@pytest.mark.parametrize("direction", ["left", "right", "up", "down"])
def test_a_direction_is_refused_and_the_form_without_it_named(direction: str) -> None:
    given = f"smiling => frowning:{direction}"
    with pytest.raises(PreprocessError, match=naming("--edit", repr(given), "'smiling=>frowning'")) as refused:
        Edit.parse(given)
    what = re.search("'([^']*=>[^':]*)'$", str(refused.value))
    assert what and Edit.parse(what[1]) == Edit("smiling", "frowning")


WORDS = ["left", "right", "looking left", "looking right", "looking", "facing the sea", "facing the hills", "facing",
         "bright", "leftover", "a", "dog", "の", "ß", "ı", "é", "-", ".", ",", "\n", "_", "1"]  # fmt: skip


@given(st.lists(st.sampled_from(WORDS), max_size=12), st.sampled_from([" ", "", ", "]))
@example(["lookıng left"], " ")
def test_to_mirror_twice_changes_nothing(words: list[str], between: str) -> None:
    caption = between.join(words)
    for edits in (USUALLY, [FACING], [FACING, USUAL]):
        assert mirrored(mirrored(caption, edits), edits) == caption


@given(st.text(max_size=40).map(str.lower))
@example("ſ left K")
def test_any_text_may_be_a_caption(caption: str) -> None:
    assert mirrored(mirrored(caption, USUALLY), USUALLY) == caption
    if caption.strip(". \n\t\r") and mirrored(caption, USUALLY) == caption:
        first, second = captions_of_views(caption, USUALLY)
        assert first != second and mirrored(first, USUALLY) == second


def test_an_edit_takes_its_words_out_of_the_usual_exchange() -> None:
    edits = [Edit("left", "west")]
    assert mirrored("left, west, right", edits) == "west, left, right"
    assert mirrored(mirrored("left, west, right", edits), edits) == "left, west, right"
