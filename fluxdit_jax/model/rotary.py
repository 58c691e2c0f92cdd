"""Rotary positions on two axes (arXiv:2104.09864), from each sample's own height and width."""

from __future__ import annotations

import jax
import jax.numpy as jnp

ROPE_THETA = 100.0  # wavelengths from 6 to about 600 tokens; 10,000 would leave most pairs nearly constant
# What rotary positions count. Attention sees differences of positions only, so centring them would change nothing.
#   index   rows and columns of tokens: a distance is so many tokens at every resolution
#   scaled  parts of the picture, whose area is SCALED_SIDE squared: a distance is so much of the picture
POSITIONS = ("index", "scaled")
SCALED_SIDE = 16.0  # at 256 px with patch 2 both count the same


def rotary(
    grid_Bx2: jax.Array, index_BxN: jax.Array, head_dim: int, positions: str = "index"
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each token's rotary angles from its row and column, f32 [B, N, head_dim / 2] each.

    Args:
      grid_Bx2: int32 (rows, columns) of each sample's token grid.
      index_BxN: int32, or [1, N] for all samples alike: the patch i of each token is at (i // columns, i % columns).
      positions: one of `POSITIONS`.
    """
    pairs = head_dim // 4  # pairs per axis: half of the head turns with the row, half with the column
    frequencies = ROPE_THETA ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    columns = grid_Bx2[:, 1:2]
    position_BxNx2 = jnp.stack([index_BxN // columns, index_BxN % columns], axis=-1).astype(jnp.float32)
    if positions == "scaled":
        area = (grid_Bx2[:, 0] * grid_Bx2[:, 1]).astype(jnp.float32)
        position_BxNx2 = position_BxNx2 * (SCALED_SIDE / jnp.sqrt(area))[:, None, None]
    angles = position_BxNx2[..., None] * frequencies
    angles = angles.reshape(*angles.shape[:2], 2 * pairs)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxNxHxd: jax.Array, cos_BxNxd2: jax.Array, sin_BxNxd2: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + d/2]) by the angles of `rotary`, in f32."""
    a, b = jnp.split(x_BxNxHxd.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BxNxd2[:, :, None], sin_BxNxd2[:, :, None]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BxNxHxd.dtype)
