"""The noise of a seed: JAX's numbers, the same bits everywhere."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from fluxdit_jax.portable import noise


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_its_integers_are_those_of_jax(seed):
    expected = jax.random.bits(jax.random.key(np.uint32(seed)), (5000,), jnp.uint32)
    np.testing.assert_array_equal(noise._bits(seed, 5000), expected)


@pytest.mark.parametrize("seed", [1, 12345])
def test_its_numbers_are_those_of_jax_but_for_a_last_bit(seed):
    found, expected = noise.normal(seed, (300, 64)), np.asarray(jax.random.normal(jax.random.key(seed), (300, 64)))
    assert found.dtype == np.float32 and (found == expected).mean() > 0.95
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)


def test_they_are_normal_and_each_is_of_its_place_alone():
    many = noise.normal(3, (400, 500))
    assert kstest(many.ravel(), "norm").pvalue > 0.001 and np.abs(many).max() > 4
    np.testing.assert_array_equal(noise.normal(3, (10, 500)), many[:10])
    assert not np.array_equal(noise.normal(4, (10, 500)), many[:10])


def test_the_bits_of_a_seed():
    """Recorded on x86-64 with numpy 2.4: a picture must be the same next year and elsewhere."""
    digest = hashlib.sha256(noise.normal(42, (64, 64)).tobytes()).hexdigest()
    assert digest == "221ef829ecf1b163c57db7abb06a1f9f58f23d324ca0b08ce6421598f158511e"
