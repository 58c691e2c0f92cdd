"""Intervals of the bootstrap against what is known of the mean and the median."""

import numpy as np
import pytest

from fluxdit_jax.quality import measured


def test_the_mean_and_its_interval_in_closed_form():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = measured.mean(values, best={"true": 5.0})
    assert found.value == pytest.approx(values.mean()) and found.count == 400 and found.best == {"true": 5.0}
    error = values.std() / 400**0.5
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        found = measured.share(rng.random(60) < 0.3)
        inside += found.low <= 0.3 <= found.high
    assert 180 <= inside <= 199  # of 200; 95 % are 190


def test_a_share_of_none_has_a_width():
    found = measured.share(np.zeros(100, bool))
    assert (
        found.value == 0 and found.low == pytest.approx(0, abs=1e-12) and found.high == pytest.approx(0.037, abs=0.001)
    )  # Wilson's
    assert measured.share(np.ones(100, bool)).low == pytest.approx(0.963, abs=0.001)


def test_the_median():
    found = measured.median(np.array([5, 1, 9, 3, 7]))
    assert found.value == 5 and 1 <= found.low <= 3 and 7 <= found.high <= 9
    assert measured.median(np.array([4, 1])).value == 1  # the lower of two


def test_few_are_wide_and_one_has_no_interval():
    few, many = (measured.mean(np.arange(n) % 2) for n in (10, 1000))
    assert few.high - few.low > 5 * (many.high - many.low)
    one = measured.mean(np.array([0.5]))
    assert one.value == 0.5 and np.isnan(one.low) and np.isnan(one.high)
