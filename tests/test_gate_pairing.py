"""Who is paired with whom, and what an album knows of its records."""

import numpy as np
import pytest
from gate_scenes import SUBJECTS, album

from fluxdit_jax.gate.album import Album
from fluxdit_jax.gate.pairing import CLEARLY, derangements, may_swap, swap_pairs, tone_distances

ALBUM = album()


def test_derangements_have_no_fixed_point_and_share_no_pair():
    rounds = derangements(ALBUM, 5)
    for partner in rounds:
        assert sorted(partner) == list(range(len(ALBUM)))
        assert (partner != np.arange(len(ALBUM))).all()
    pairs = {(i, int(j)) for partner in rounds for i, j in enumerate(partner)}
    assert len(pairs) == 5 * len(ALBUM)


def test_partners_differ_in_caption_and_clearly_in_tone():
    allowed, far = may_swap(ALBUM), tone_distances(ALBUM)
    pairs = swap_pairs(ALBUM, 60)
    assert len(pairs) == len(set(pairs)) == 60
    for a, b in pairs:
        assert ALBUM.caption(a) != ALBUM.caption(b) and far[a, b] >= CLEARLY and allowed[a, b]
    assert {a for a, _ in pairs[:40]} == set(range(40))  # everyone once before anyone twice


def test_fewer_pairs_than_records_are_spread_over_them():
    firsts = [a for a, _ in swap_pairs(ALBUM, 10)]
    assert len(set(firsts)) == 10 and max(firsts) >= 36 and min(firsts) <= 3


def test_pairs_are_the_same_again_and_others_with_another_seed():
    again = album()
    assert swap_pairs(ALBUM, 30) == swap_pairs(again, 30)
    other = Album(ALBUM.records, ALBUM.truths, ALBUM.patch, seed=1)
    assert swap_pairs(ALBUM, 30) != swap_pairs(other, 30)


def test_partners_have_the_same_size_where_they_can():
    """Half of the records in another size: nobody needs to be paired across."""
    wide = []
    for index, record in enumerate(ALBUM.records):
        latent = record.latent if index % 2 else record.latent[:, :6]
        wide.append(type(record)(**{**vars(record), "latent": latent}))
    mixed = Album(tuple(wide), ALBUM.truths, ALBUM.patch)
    assert {mixed.grid(i) for i in range(4)} == {(4, 4), (3, 4)}
    for a, b in swap_pairs(mixed, 40):
        assert mixed.grid(a) == mixed.grid(b)


def test_one_record_or_one_caption_cannot_be_swapped():
    alone = Album(ALBUM.records[:1], ALBUM.truths[:1], ALBUM.patch)
    same = Album(ALBUM.records[:5], ALBUM.truths[:5], ALBUM.patch)  # one caption in five lights
    assert swap_pairs(alone, 10) == [] and swap_pairs(same, 10) == []


def test_an_album_knows_the_true_answer_of_a_grid():
    caption = ALBUM.caption(ALBUM.places.index(("c03", "l0")))
    assert caption == f"portrait of a {SUBJECTS[1]}, looking right"
    answer = ALBUM.true_answer(caption, ALBUM.places.index(("c05", "l2")))
    assert ALBUM.places[answer] == ("c03", "l2")
    assert ALBUM.true_answer("portrait of a stranger, looking right", 0) is None
    foreign = Album(ALBUM.records, ALBUM.truths, ALBUM.patch, keys=r"shot_(?P<composition>\d)(?P<lighting>\d)")
    assert foreign.true_answer(caption, 0) is None and foreign.places[0] is None


@pytest.mark.parametrize("key", ["c07_l3.png", "sub/folder/c07_l3.webp"])
def test_the_demonstration_sets_keys_are_recognised(key):
    record = type(ALBUM.records[0])(**{**vars(ALBUM.records[0]), "key": key})
    assert Album((record,), ALBUM.truths[:1], 2).places == (("c07", "l3"),)


def test_what_is_wanted_comes_from_the_right_records():
    one = ALBUM.wanted(3, 11, 20)
    assert one.caption == ALBUM.caption(3) and one.text is ALBUM.records[3].text
    assert one.vision is ALBUM.records[11].vision and one.grid == ALBUM.grid(20) and one.seed == 20
    assert one.key == ALBUM.wanted(3, 11, 20).key
    others = [ALBUM.wanted(13, 11, 20), ALBUM.wanted(3, 12, 20), ALBUM.wanted(3, 11, 21)]
    assert len({one.key, *(other.key for other in others)}) == 4


def test_nearest_finds_each_truth():
    assert (ALBUM.nearest(list(ALBUM.truths)) == np.arange(len(ALBUM))).all()
