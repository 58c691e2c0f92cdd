"""Edits of captions: reading them, applying them, choosing them."""

import pytest

from fluxdit_jax.shared.edit_rules import DEFAULT_RULES, EditError, Rule, choose_rules, choose_unrelated, edited

CAPTIONS = ["portrait of a man, looking left", "portrait of a woman, looking right", "portrait of a cat"]


def test_a_rule_is_read():
    rule = Rule.parse("looking left => looking right : right")
    assert rule == Rule("looking left", "looking right", "right")
    assert (rule.axis, rule.sign) == ("horizontal", 1)
    assert (Rule.parse("a:b=>c:up").old, Rule.parse("a:b=>c:up").axis, Rule.parse("a=>c:up").sign) == (
        "a:b",
        "vertical",
        -1,
    )


@pytest.mark.parametrize(
    ("direction", "axis", "sign"),
    [("right", "horizontal", 1), ("left", "horizontal", -1), ("down", "vertical", 1), ("up", "vertical", -1)],
)
def test_directions_are_those_of_rows_and_columns(direction, axis, sign):
    rule = Rule.parse(f"a=>b:{direction}")
    assert (rule.axis, rule.sign) == (axis, sign)


@pytest.mark.parametrize(
    "text", ["looking left", "a=>b", "a=>b:sideways", "=>b:left", "a=>:left", "a->b:left", "", ":up"]
)
def test_a_rule_that_cannot_be_read_is_refused(text):
    with pytest.raises(EditError, match="OLD WORDS=>NEW WORDS:DIRECTION"):
        Rule.parse(text)


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


def test_rules_given_and_default():
    assert choose_rules(CAPTIONS, []) == list(DEFAULT_RULES)
    assert choose_rules(CAPTIONS[:1], []) == [DEFAULT_RULES[0]]
    given = Rule("cat", "dog", "left")
    assert choose_rules(CAPTIONS, [given]) == [given]
    with pytest.raises(EditError, match="'zebra'"):
        choose_rules(CAPTIONS, [Rule("zebra", "horse", "left")])
    with pytest.raises(EditError, match="--edit"):
        choose_rules(["a house", "a tree"], [])


def test_the_unrelated_word_given_and_found():
    assert choose_unrelated(CAPTIONS, None) == ("portrait of", "picture of")
    assert choose_unrelated(["a house", "a tree"], None) == ("a", "one")
    assert choose_unrelated(["house with tree", "tree"], None) == ("with", "having")  # half of the captions is enough
    assert choose_unrelated(["a house with tree", "a tree", "a lake"], None) == ("a", "one")
    assert choose_unrelated(CAPTIONS, "man => person") == ("man", "person")
    for wrong in ("man", "man=>", "=>b", "zebra=>horse"):
        with pytest.raises(EditError, match="--unrelated"):
            choose_unrelated(CAPTIONS, wrong)
    with pytest.raises(EditError, match="--unrelated"):
        choose_unrelated(["Haus", "Baum"], None)
