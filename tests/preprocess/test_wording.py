"""What `inspect` says of captions."""

import unicodedata

import pytest

from preprocess.inspect.wording import SHORT, skeleton, wording, words

LONG = (
    "a wide photograph of {} at the edge of a forest lake with reeds and a wooden pier on the left side under an even "
    "grey sky in late autumn"
)
THINGS = ("one swan", "two boats", "an old heron", "three children", "a red canoe", "four geese", "a fox", "an angler")


def told(captions):
    return "\n".join(wording(captions))


def test_words_of_many_scripts():
    assert words("A red-brown dog, 3 years old.") == ["a", "red", "brown", "dog", "3", "years", "old"]
    assert words("紅い犬 dog") == ["紅", "い", "犬", "dog"]
    assert words("") == words("...") == []
    for form in ("NFC", "NFD"):
        assert len(words(unicodedata.normalize(form, "Ein Hund läuft über die Wiese"))) == 6
    assert len(words("हिन्दी में एक कुत्ता")) == 4


@pytest.mark.parametrize("other", ["Photo 13: a DOG", "photo 7 - a dog!", "photo a dog"])
def test_a_skeleton_is_the_same_for_what_is_nearly_the_same(other):
    assert skeleton("photo 12, a dog") == skeleton(other) != skeleton("photo 12, a cat")


def test_good_captions_have_their_lengths_and_no_warning():
    captions = [LONG.format(thing) for thing in THINGS]
    text = told(captions)
    assert min(map(len, map(words, captions))) >= SHORT and "warning" not in text
    assert (
        "words: min 31 p5 31 median 31 p95 32 max 32 mean 31.2" in text
        and "begin with 'a wide photograph of'" in text
        and "100%" in text
    )


def test_short_captions_are_warned_about():
    text = told([LONG.format(thing) for thing in THINGS] + ["a dog"] * 2)
    assert "docs/captions.md" in text
    assert f"warning: 2 of 10 captions have fewer than {SHORT} words" in text


def test_captions_that_differ_in_numbers_only_are_counted():
    text = told([f"IMG {k:04}" for k in range(30)] + [LONG.format(thing) for thing in THINGS])
    assert "29 captions differ from others in numbers" in text and "'IMG 0001'" in text
    assert "30 at most" in text and f"{38 / 9:.2f} pictures on average" in text


def test_equal_captions_are_not_counted_twice():
    """They have a line of their own, of `advice.repeated_captions`."""
    text = told(["a dog on a lawn"] * 10 + [LONG.format(thing) for thing in THINGS])
    assert "differ from others" not in text and "10 at most" in text


def test_the_example_is_of_captions_that_differ():
    assert "as 'IMG 0001'" in told(["a dog on a lawn"] * 3 + [f"IMG {k:04}" for k in range(30)])


def test_one_caption_and_one_without_words():
    assert told(["a dog"]).startswith("  words: min 2 ")
    assert "words: min 0" in told(["...", "a dog"])
