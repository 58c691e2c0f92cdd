"""The digest: any flipped bit changes it, where the array lies does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxdit_jax.run.digest import tree_digest

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

RNG = np.random.default_rng(0)
TREE = {
    "a": RNG.normal(size=(3, 5, 2)).astype(np.float32),
    "b": {"c": np.arange(7, dtype=np.int32), "d": np.float32(1.5).reshape(())},
}
META = {"samples": 8, "batch_size": 4}


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_flipped_bit_changes_it(draw):
    leaves, structure = jax.tree.flatten(TREE)
    number = draw.draw(st.integers(0, len(leaves) - 1))
    words = leaves[number].copy().reshape(-1).view(np.uint32)
    words[draw.draw(st.integers(0, len(words) - 1))] ^= np.uint32(1 << draw.draw(st.integers(0, 31)))
    leaves[number] = words.view(leaves[number].dtype).reshape(leaves[number].shape)
    assert tree_digest(jax.tree.unflatten(structure, leaves)) != tree_digest(TREE)


def test_devices_and_host_agree():
    digest = tree_digest(TREE, META)
    assert digest == tree_digest(jax.tree.map(jnp.asarray, TREE), META)
    assert digest == tree_digest(TREE, dict(reversed(META.items())))
    assert len(digest) == 64


def test_values_that_change_places_change_it():
    tree = {"a": np.array([1.0, 2.0], np.float32), "b": np.array([3.0, 4.0], np.float32)}
    digests = {
        tree_digest(tree),
        tree_digest({"a": tree["a"][::-1], "b": tree["b"]}),
        tree_digest({"a": tree["b"], "b": tree["a"]}),
    }
    assert len(digests) == 3


@pytest.mark.parametrize("meta", [{}, {"samples": 9, "batch_size": 4}, {"samples": 8}, {"Samples": 8, "batch_size": 4}])
def test_the_object_beside_the_numbers_counts(meta):
    assert tree_digest(TREE, meta) != tree_digest(TREE, META)


def test_nan_and_negative_zero_have_bits_too():
    plain = {"a": np.zeros(3, np.float32)}
    negative = {"a": np.array([0.0, -0.0, 0.0], np.float32)}
    nan = {"a": np.array([0.0, np.nan, 0.0], np.float32)}
    assert len({tree_digest(plain), tree_digest(negative), tree_digest(nan)}) == 3
    assert tree_digest(nan) == tree_digest(jax.tree.map(jnp.asarray, nan))
