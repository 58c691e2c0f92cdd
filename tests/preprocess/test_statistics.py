"""Mergeable moments against numpy on everything at once."""

import json

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.build.statistics import Moments


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(0, 2**31), st.floats(-1e3, 1e3))
def test_merging_equals_numpy_on_everything(widths: list[int], seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    latents = [(rng.normal(size=(3, 5, w)) * [[[1e-3]], [[1]], [[1e3]]] + offset) for w in widths]
    merged = Moments.merged(Moments.of(latent.astype(ml_dtypes.bfloat16)) for latent in latents)
    values = np.concatenate(
        [latent.astype(ml_dtypes.bfloat16).astype(np.float64).reshape(3, -1) for latent in latents], axis=1
    )
    scale = np.abs(values).max(axis=1) + 1
    assert merged.count == values.shape[1]
    assert (np.abs(merged.mean - values.mean(axis=1)) <= 1e-12 * scale).all()
    assert (np.abs(merged.std - values.std(axis=1)) <= 1e-10 * scale).all()


def test_a_far_mean_does_not_eat_the_deviation() -> None:
    values = 1e6 + np.random.default_rng(0).normal(size=(1, 100, 100))
    halves = [Moments.of(values[:, :50]), Moments.of(values[:, 50:])]
    assert abs(Moments.merged(halves).std[0] - values.std()) < 1e-9


def test_json_keeps_every_bit() -> None:
    moments = Moments.of(np.random.default_rng(1).normal(size=(4, 7, 3)))
    again = Moments.from_dict(json.loads(json.dumps(moments.to_dict())))
    assert again.count == moments.count
    assert (again.mean == moments.mean).all() and (again.squares == moments.squares).all()


def test_nothing_has_no_moments() -> None:
    assert Moments.merged([]) is None
