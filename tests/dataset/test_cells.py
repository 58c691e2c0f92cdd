"""Cells of patches as they are stored: packed into int8, averaged over their area, the same at every resolution."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from fluxdit_jax import alignment
from fluxdit_jax.dataset import cells


def test_packed_cells_are_close_to_what_was_packed():
    rng = np.random.default_rng(4)
    values = (rng.standard_t(6, size=(300, 1024)) * rng.uniform(0.01, 50, (300, 1))).astype(np.float32)
    rows = cells.packed(values)
    assert rows.dtype == np.int8 and rows.shape == (300, 1026)
    back = cells.unpacked(rows)
    cosine = np.sum(back * values, 1) / np.linalg.norm(back, axis=1) / np.linalg.norm(values, axis=1)
    assert cosine.min() > 0.999
    np.testing.assert_array_equal(back, alignment.unpacked(jnp.asarray(rows)[None])[0])
    assert np.isnan(cells.factors_of(cells.packed(np.full((1, 4), np.nan, np.float32)))).all()
    assert not cells.unpacked(cells.packed(np.zeros((1, 4), np.float32))).any()


def test_a_cell_is_the_mean_over_its_area():
    rng = np.random.default_rng(6)
    patches = rng.normal(size=(6, 9, 5)).astype(np.float32)
    np.testing.assert_allclose(
        cells.pooled(patches, (3, 3)), patches.reshape(3, 2, 3, 3, 5).mean(axis=(1, 3)), atol=1e-6
    )
    np.testing.assert_allclose(cells.pooled(patches, (6, 9)), patches, atol=1e-6)
    np.testing.assert_allclose(cells.pooled(np.ones((7, 5, 2)), (4, 3)), 1, atol=1e-6)
    uneven = cells.pooled(np.arange(3.0).reshape(3, 1, 1), (2, 1))[:, 0, 0]
    np.testing.assert_allclose(uneven, [(0 + 0.5 * 1) / 1.5, (2 + 0.5 * 1) / 1.5], atol=1e-6)


def test_pictures_of_one_shape_have_the_same_cells_at_every_resolution():
    for height, width in ((1024, 1024), (1280, 768), (512, 2048), (896, 1152)):
        grids = {cells.grid_of((height // k, width // k), 1024 // k, 256) for k in (1, 2, 4)}
        assert len(grids) == 1
        ((rows, columns),) = grids
        assert rows == round(height / 64) and columns == round(width / 64)
    assert math.prod(cells.grid_of((1024, 1024), 1024, 1024)) == 1024
