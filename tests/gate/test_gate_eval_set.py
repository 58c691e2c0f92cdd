"""What a set under test knows: what is asked of the model for a record, and where each record stands in the grid."""

import dataclasses

import numpy as np
from gate_pictures import full_grid, plain, set_of

from fluxdit_jax.dataset.grid import Place
from fluxdit_jax.gate.eval_set import EvalSet

GRID = full_grid(3, 2, 4)


def test_a_request_has_words_size_and_noise_of_one_and_the_vector_of_b():
    of = set_of([plain(20, 16, 24), plain(30)], seed=100)  # latents of 4 by 6 and 2 by 2
    one = of.request(0, 1)
    assert (one.caption, one.grid, one.seed, one.guidance) == ("caption 0", (2, 3), 100, 1)
    assert one.conditions["text"] is of.records[0].text and one.conditions["vision"] is of.records[1].vision
    assert set(one.conditions) == {"text", "vision"}
    assert (of.request(1, 0).seed, of.request(1, 0).grid) == (101, (1, 1))
    assert of.request(0, 1, noise_of=1).seed == 101


def test_what_makes_another_picture_makes_another_key():
    one = GRID.request(3, 11)
    assert one.key == GRID.request(3, 11).key
    others = [
        GRID.request(13, 11, noise_of=3), GRID.request(3, 12), GRID.request(3, 11, noise_of=4),
        GRID.request(3, 11, guidance=1.5), GRID.request(3, 11, vision=np.ones(24, np.float32)),
        GRID.request_alone(3, ["text"]), GRID.request_alone(3, ["vision"]),
    ]  # fmt: skip
    assert len({one.key, *(other.key for other in others)}) == 8


def test_what_is_asked_for_instead():
    tokens, vector = np.zeros((2, 2)), np.ones(3, np.float32)
    one = GRID.request(3, 11, caption="new words", made={"text": tokens}, vision=vector, guidance=3.0)
    assert (one.caption, one.seed, one.guidance) == ("new words", 3, 3.0)
    assert one.conditions["text"] is tokens and one.conditions["vision"] is vector


def test_further_conditions_are_those_of_the_record_that_gives_the_words():
    records = [
        dataclasses.replace(record, conditions=record.conditions | {"pose": np.full(2, k, np.float32)})
        for k, record in enumerate(GRID.records)
    ]
    of = dataclasses.replace(GRID, records=tuple(records))
    one = of.request(3, 11, caption="new words", made={"text": np.zeros((2, 2))})
    assert one.conditions["pose"][0] == 3 and set(one.conditions) == {"text", "vision", "pose"}
    assert of.request(3, 11).key != GRID.request(3, 11).key and set(of.request_alone(3, ["text"]).conditions) == {
        "text"
    }


def test_a_request_of_one_condition_has_no_other():
    one = GRID.request_alone(5, ["vision"])
    assert list(one.conditions) == ["vision"] and one.conditions["vision"] is GRID.records[5].vision
    assert (one.seed, one.grid) == (5, GRID.request(5, 5).grid)
    silent = GRID.request_alone(0, ["vision"]).key
    assert silent[0] is False  # the caption is not given, and plays no part


def test_places_are_in_the_order_of_the_records():
    assert GRID.places[:5] == (*(Place("p0", "original", f"l{k}") for k in range(4)), Place("p0", "mirrored", "l0"))
    assert GRID.rows == [(f"p{p}", view) for p in range(3) for view in ("original", "mirrored")]
    assert GRID.lights == ["l0", "l1", "l2", "l3"] and len(GRID) == len(GRID.by_place) == 24
    assert GRID.at(("p1", "mirrored"), "l2") == 4 * 3 + 2
    assert GRID.at(("p1", "mirrored"), "l9") is None and GRID.at(("p9", "original"), "l0") is None


def test_a_set_without_a_grid_or_with_gaps_knows_what_it_has():
    bare = set_of([plain(20)] * 2)
    assert bare.places == (None, None) and bare.rows == [] and bare.lights == [] and bare.by_place == {}
    some = set_of([plain(20)] * 3, places=[Place("p", "a", "l1"), None, Place("q", "a", "l0")])
    assert some.places[1] is None and some.rows == [("p", "a"), ("q", "a")] and some.lights == ["l1", "l0"]
    assert (some.at(("p", "a"), "l1"), some.at(("q", "a"), "l0"), some.at(("p", "a"), "l0")) == (0, 2, None)
    more = EvalSet(some.records[:1], some.truths[:1], 2, some.grid)  # the grid of a set of which few are under test
    turned = EvalSet(GRID.records, GRID.truths, 2, dict(reversed(GRID.grid.items())))
    assert turned.lights == GRID.lights[::-1] and turned.rows == GRID.rows[::-1], "rows and lights: that of the grid"
    assert turned.places == GRID.places
    assert more.rows == [("p", "a")] and more.at(("q", "a"), "l0") is None
    assert more.seed == EvalSet((), (), 2).seed == 0
