"""Who is paired with whom, and what an album knows of its records."""

import itertools

import numpy as np
import pytest
from gate_pictures import album_of, plain
from skimage.color import rgb2lab

from fluxdit_jax.gate.album import Album
from fluxdit_jax.gate.pairing import DISTINCT_TONES_CIE76, derangements, may_swap, swap_pairs, tone_distances

SUBJECTS = ("fox", "teapot", "lighthouse", "cactus")
LIGHTS = ((180, 180, 180), (200, 120, 60), (60, 80, 170), (180, 60, 120), (50, 150, 80))


def grid() -> Album:
    """Eight captions, each in five lights: the left half of a picture is its own, the right half has the light."""
    captions = [f"portrait of a {subject}, looking {side}" for subject in SUBJECTS for side in ("left", "right")]
    pictures = [plain(light, 16, 16) for _ in captions for light in LIGHTS]
    for number, picture in enumerate(pictures):
        picture[:, :2] = 20 * (number // 5)
    return album_of(
        pictures,
        [caption for caption in captions for _ in LIGHTS],
        [f"c{c:02d}_l{light}.png" for c in range(8) for light in range(5)],
    )


ALBUM = grid()


def test_derangements_have_no_fixed_point_and_share_no_pair():
    rounds = list(itertools.islice(derangements(ALBUM), 5))
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
        assert ALBUM.caption(a) != ALBUM.caption(b) and far[a, b] >= DISTINCT_TONES_CIE76 and allowed[a, b]
    assert {a for a, _ in pairs[:40]} == set(range(40))  # everyone once before anyone twice


@pytest.mark.parametrize("wanted", [2, 10])
def test_fewer_pairs_than_records_are_spread_over_them(wanted):
    firsts = [a for a, _ in swap_pairs(ALBUM, wanted)]
    assert firsts == np.linspace(0, len(ALBUM) - 1, wanted).round().astype(int).tolist()


def test_all_pairs_of_a_small_set_can_be_had():
    greys = album_of([plain(level) for level in (20, 120, 220)])  # two of the three distances are at least the median
    assert [len(swap_pairs(greys, wanted)) for wanted in (1, 3, 4, 1000)] == [1, 3, 4, 4]


def test_a_set_with_one_odd_picture_gives_all_pairs_with_it():
    """Each derangement has two of them only."""
    odd = album_of([plain(20)] * 5 + [plain(220)])
    assert sorted(swap_pairs(odd, 10)) == [*((k, 5) for k in range(5)), *((5, k) for k in range(5))]
    assert [len(swap_pairs(odd, wanted)) for wanted in (5, 9)] == [5, 9]


@pytest.mark.parametrize(("levels", "captions", "allowed"), [
    ((100, 118), "ab", False),  # L* differs by 7.3
    ((100, 121), "ab", True),  # by 8.5
    ((100, 200), "aa", False),
    ((20, 120, 220), "abc", True),
])  # fmt: skip
def test_pairs_of_other_captions_clearly_apart_may_be_swapped(levels, captions, allowed):
    greys = album_of([plain(level) for level in levels], captions)
    assert may_swap(greys)[0, -1] == allowed
    assert bool(swap_pairs(greys, 1)) == allowed


def test_distances_of_tone_are_differences_of_lightness():
    lightness = [rgb2lab(plain(level))[0, 0, 0] for level in (20, 120, 220)]
    expected = np.abs(np.subtract.outer(lightness, lightness))
    assert tone_distances(album_of([plain(level) for level in (20, 120, 220)])) == pytest.approx(expected, rel=1e-3)
    near_and_far = album_of([plain(level) for level in (20, 60, 100, 220)])
    allowed = may_swap(near_and_far)  # at least the median of the six distances
    assert allowed.sum() == 6 and (allowed == allowed.T).all() and allowed[0, 3] and not allowed[0, 1]


def test_pairs_are_the_same_again_and_others_with_another_seed():
    again = grid()
    assert swap_pairs(ALBUM, 30) == swap_pairs(again, 30)
    other = Album(ALBUM.records, ALBUM.truths, ALBUM.patch, seed=1)
    assert swap_pairs(ALBUM, 30) != swap_pairs(other, 30)


def test_partners_have_the_same_size_where_they_can():
    """Half of the records in another size: nobody needs to be paired across."""
    wide = []
    for index, record in enumerate(ALBUM.records):
        latent = record.latent if index % 2 else record.latent[:, :2]
        wide.append(type(record)(**{**vars(record), "latent": latent}))
    mixed = Album(tuple(wide), ALBUM.truths, ALBUM.patch)
    assert {mixed.grid(i) for i in range(4)} == {(2, 2), (1, 2)}
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
    assert one.caption == ALBUM.caption(3) and one.conditions["text"] is ALBUM.records[3].text
    assert one.conditions["vision"] is ALBUM.records[11].vision and one.grid == ALBUM.grid(20) and one.seed == 20
    assert one.key == ALBUM.wanted(3, 11, 20).key
    others = [ALBUM.wanted(13, 11, 20), ALBUM.wanted(3, 12, 20), ALBUM.wanted(3, 11, 21)]
    assert len({one.key, *(other.key for other in others)}) == 4


def test_what_is_wanted_instead():
    tokens, vector = np.zeros((2, 2)), np.ones(3, np.float32)
    one = ALBUM.wanted(3, 11, 20, caption="new words", made={"text": tokens}, vision=vector, seed=7)
    assert one.caption == "new words" and one.seed == 7
    assert one.conditions["text"] is tokens and one.conditions["vision"] is vector
    assert one.grid == ALBUM.grid(20)


def test_the_grid_and_the_seed_of_a_record():
    wide = album_of([plain(20, 16, 24)] * 3, seed=100)  # its latents are 4 by 6
    assert (wide.grid(2), wide.wanted(0, 1, 2).seed) == ((2, 3), 102)
    assert album_of([plain(20)]).seed == Album((), (), 2).seed == 0


def test_a_true_answer_needs_both_places():
    pictures = [plain(20)] * 4
    some = album_of(pictures, ["fox", "fox", "cat", "hen"], ["c00_l0.png", "c00_l1.png", "c01_l0.png", "other.png"])
    assert [some.true_answer("fox", k) for k in range(4)] == [0, 1, 0, None]
    assert [some.true_answer("cat", k) for k in range(4)] == [2, None, 2, None]
    assert [some.true_answer("hen", k) for k in range(4)] == [None] * 4
    assert some.places == (("c00", "l0"), ("c00", "l1"), ("c01", "l0"), None)


def test_nearest_finds_each_truth():
    assert (ALBUM.nearest(list(ALBUM.truths)) == np.arange(len(ALBUM))).all()
    assert ALBUM.nearest([ALBUM.truths[k] for k in (7, 7, 3)]).tolist() == [7, 7, 3]
