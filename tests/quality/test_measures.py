"""Each measure against its definition, and moved by the fault that is its own."""

import numpy as np
import pytest

from fluxdit_jax.quality import comparison, measures
from fluxdit_jax.quality.measures import Reference


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def pictures(count, seed, width=24, spread=1.0):
    """Vectors of a dataset: a few kinds of pictures, and how single ones differ."""
    rng = np.random.default_rng(seed)
    kinds = np.random.default_rng(99).normal(size=(8, width))
    return unit(kinds[rng.integers(0, 8, count)] + spread * rng.normal(size=(count, width)))


def test_distances_are_those_of_unit_vectors():
    a, b = pictures(5, 0), pictures(7, 1)
    expected = np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=2)
    np.testing.assert_allclose(measures.distances(a, b), expected, atol=1e-6)
    distance, row = measures.nearest(a, b)
    np.testing.assert_allclose(distance, expected.min(1), atol=1e-6)
    np.testing.assert_array_equal(row, expected.argmin(1))


# ---------------------------------------------------------------------------------------------------- likeness


def test_mmd_is_its_definition():
    """Mean kernel of different pairs in each set, less twice that across, by loops."""
    x, y = pictures(9, 0), pictures(12, 1, spread=2.0)
    reference = Reference.of(y)
    apart = [np.linalg.norm(a.astype(float) - b) for i, a in enumerate(y) for b in y[:i]]
    assert reference.bandwidth == pytest.approx(np.median(apart), rel=0.05)

    def kernel(a, b):
        return np.exp(-np.sum((a.astype(float) - b) ** 2) / (2 * reference.bandwidth**2))

    def within(z):
        return np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])

    expected = within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    value, low, high = reference.mmd(x)
    assert value == pytest.approx(1000 * expected, rel=1e-5) and low < value < high


def test_mmd_of_the_dataset_against_itself_is_0_over_200_subsets():
    reference = Reference.of(pictures(800, 0))
    for count in (20, 100):
        values = np.array([reference.mmd(pictures(count, 1000 + k))[0] for k in range(200)])
        error = values.std(ddof=1) / 200**0.5
        assert abs(values.mean()) < 3.5 * error + 1000 * 2 / 800  # 2 / 800: what the fixed reference itself may be off
        assert (values < 0).mean() > 0.2  # unbiased: below 0 as well as above


def test_likeness_tells_other_pictures_and_its_interval_holds_chance():
    reference = Reference.of(pictures(600, 0))
    true, off = pictures(400, 1), pictures(400, 2, spread=3.0)
    found = measures.likeness(true, reference, {"holdout": pictures(400, 3)}, {"others": off})
    assert abs(found.value) < 0.1 * found.worst["others"] and abs(found.best["holdout"]) < 0.1 * found.worst["others"]
    assert found.high - found.low < found.worst["others"] and found.count == 400
    half = measures.likeness(np.concatenate([true[:200], off[:200]]), reference, {}, {})
    assert found.low < 0 < found.high and max(0, found.value) < half.low and half.high < found.worst["others"]


def test_a_collapsed_model_is_not_like_the_dataset():
    reference = Reference.of(pictures(600, 0))
    collapsed = np.repeat(pictures(1, 1), 150, axis=0)
    assert reference.mmd(collapsed)[0] > 20 * abs(reference.mmd(pictures(150, 2))[0])


# --------------------------------------------------------------------------------------- captions and vectors


def test_ranks_by_hand():
    true = unit(np.array([[1.0, 0], [0.9, 0.1], [0, 1.0]]))
    drawn = unit(np.array([[0.9, 0.1], [0.9, 0.1], [1.0, 0.2]]))
    assert measures.ranks(drawn, true).tolist() == [2, 1, 3]
    twins = unit(np.array([[1.0, 0], [1.0, 0], [0, 1.0]]))  # one picture twice: either is right
    assert measures.ranks(twins, twins).tolist() == [1, 1, 1]


def test_captions_that_are_followed_half_of_the_time():
    true = pictures(100, 0)
    drawn = true.copy()
    drawn[::2] = pictures(50, 1)
    found = measures.captions(drawn, true, true)
    assert found["recall@1"].value == pytest.approx(0.5, abs=0.05) and found["recall@1"].best == {"true pictures": 1.0}
    assert found["recall@1"].low < 0.5 < found["recall@1"].high
    assert found["recall@1"].worst["chance"] == 0.01 and found["recall@1"].worst["another caption's"] < 0.05
    assert 0.5 < found["recall@10"].value < 0.8
    assert found["median rank"].best == {"true pictures": 1.0} and found["median rank"].worst["chance"] == 50.5


def test_one_picture_for_all_captions_is_chance():
    true = pictures(100, 0)
    found = measures.captions(np.repeat(pictures(1, 5), 100, axis=0), true, true)
    assert found["recall@1"].value == 0.01 and found["recall@10"].value == 0.1
    assert found["median rank"].value == pytest.approx(50, abs=1)


def test_recall_at_more_than_there_are_is_not_told():
    true = pictures(8, 0)
    assert list(measures.captions(true, true, true)) == ["recall@1", "median rank"]


def test_a_vector_that_is_followed_and_one_that_is_not():
    given = pictures(80, 0)
    near = unit(given + 0.1 * np.random.default_rng(1).normal(size=given.shape))
    followed, ignored = measures.vector(near, given, given), measures.vector(pictures(80, 2), given, given)
    assert followed.low > 0.85 and followed.best["true pictures"] == pytest.approx(1)
    assert followed.worst["another's vector"] < 0.5 and ignored.high < 0.5
    assert followed.value == pytest.approx(np.mean([float(a @ b) for a, b in zip(near, given, strict=True)]), abs=1e-6)


# ----------------------------------------------------------------------------------------- copies and diversity


def test_copies_are_counted_and_named():
    train, holdout = pictures(400, 0), pictures(200, 1)
    drawn = pictures(100, 2)
    drawn[10:40] = train[7:37]
    found = measures.copies(drawn, train, holdout, train[:50])
    assert found.share.value == pytest.approx(0.3, abs=0.04) and found.train[10:40].tolist() == list(range(7, 37))
    assert found.distance[10:40].max() < 1e-3 < found.threshold
    assert found.share.best["holdout pictures"] == pytest.approx(0.01, abs=0.006)
    assert found.share.worst == {"training pictures": 1.0}
    assert measures.copies(pictures(300, 3), train, holdout, train[:50]).share.value < 0.05


def test_pictures_in_both_splits_do_not_hide_copies():
    train, holdout = pictures(400, 0), pictures(200, 1)
    holdout[:6] = train[:6]
    found = measures.copies(train[100:150], train, holdout, train[:50])
    assert found.share.value == 1.0 and found.threshold > 0.1


def test_a_vae_that_loses_much_shows_in_what_copies_come_to():
    """The test is blind then, and its ceiling says so."""
    train, holdout = pictures(400, 0), pictures(200, 1)
    lossy = unit(train[:50] + 1.5 * np.random.default_rng(5).normal(size=(50, 24)))
    assert measures.copies(holdout, train, holdout, lossy).share.worst["training pictures"] < 0.5


def test_diversity_from_one_picture_to_the_dataset():
    true = pictures(200, 0)
    same = np.repeat(pictures(6, 1)[:, None], 4, axis=1)
    other = pictures(24, 2).reshape(6, 4, -1)
    assert measures.diversity(same, true).value == pytest.approx(0, abs=1e-3)
    assert measures.diversity(other, true).value == pytest.approx(1, abs=0.1)
    near = unit(same + 0.3 * np.random.default_rng(3).normal(size=same.shape) / 24**0.5)
    assert 0.05 < measures.diversity(near, true).value < 0.5


def test_collapsed_modes_are_found_and_healthy_sets_have_none():
    true, drawn = pictures(200, 0), pictures(200, 1)
    captions = [f"caption {k}" for k in range(200)]
    assert measures.collapsed_modes(drawn, true, true, captions) == []
    assert measures.collapsed_modes(true, true, true, captions) == []
    drawn[[3, 50, 51, 90]] = drawn[3]
    drawn[[7, 8, 9]] = drawn[7]
    drawn[[20, 21]] = drawn[20]  # two may happen
    rows = [mode.rows for mode in measures.collapsed_modes(drawn, true, true, captions)]
    assert rows == [(3, 50, 51, 90), (7, 8, 9)]
    near = unit(np.repeat(drawn[:1], 30, axis=0) + 0.005 * np.random.default_rng(4).normal(size=(30, 24)))
    true[:6] = true[0]  # a dataset with some pictures more than once
    assert [len(mode.rows) for mode in measures.collapsed_modes(near, true, true, captions)] == [30]
    assert measures.collapsed_modes(near, true, true, ["a dog"] * 30) == []  # one caption may be one picture


def test_a_reference_of_one_picture_is_refused():
    with pytest.raises(ValueError, match=r"two.*\b1\b"):
        Reference.of(pictures(1, 0))


# ----------------------------------------------------------------------------------------------------- two models


def test_a_paired_difference_in_closed_form():
    rng = np.random.default_rng(0)
    shared, gain = rng.normal(0, 5, 300), rng.normal(0.5, 1, 300)
    found = comparison.paired([shared, shared + gain], "high")
    assert found.value == pytest.approx(gain.mean()) and found.error == pytest.approx(gain.std(ddof=1) / 300**0.5)
    assert found.verdict == "second" and comparison.paired([shared + gain, shared], "high").verdict == "first"
    assert comparison.paired([shared + gain, shared], "low").verdict == "second"
    assert comparison.paired([shared, shared + 0.01 * (gain - 0.5)], "high").verdict == "not told apart"
    assert comparison.paired([shared, shared + gain], "").verdict == "not told apart"
    assert comparison.paired([np.zeros(2), np.ones(2)], "high").verdict == "not told apart"  # two say nothing


def test_two_equal_models_are_told_apart_as_seldom_as_they_should():
    rng = np.random.default_rng(1)
    for count in (5, 10, 40):
        told = [comparison.paired(rng.normal(size=(2, count)), "high").verdict for _ in range(400)]
        assert sum(verdict != "not told apart" for verdict in told) <= (0 if count < 10 else 34)  # 5 % are 20


def test_likeness_of_two_models_is_compared_over_the_same_resamples():
    reference = Reference.of(pictures(300, 0))
    worse, better = pictures(200, 1, spread=2.0), pictures(200, 1, spread=1.2)
    (a, many), (b, other) = reference.resampled_mmd(worse), reference.resampled_mmd(better)
    assert a == pytest.approx(reference.mmd(worse)[0]) and b < a
    assert (other - many).std() < 0.9 * np.hypot(other.std(), many.std())  # they share their captions
