"""Alignment (REPA, arXiv:2410.06940): features after a block are held against the vision encoder's patches.

A projector predicts the patch that covers each token; the loss is 1 - cosine. It helps early and hurts later
(arXiv:2505.16792), so it ends at a step, after which the network trains as without it. The network is given the
encoder's global vector, which is close to the mean of a picture's patches, so that mean is taken out of the targets.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from fluxdit_jax.dataset.cells import FACTOR_BYTES


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
    """The alignment's loss and its end.

    Attributes:
      weight: of its loss beside that of the flow.
      until: the last step with it; None: to the end.
    """

    weight: float = 0.5
    until: int | None = None

    def at(self, step: int) -> bool:
        """Whether the step with this number has it."""
        return self.until is None or step <= self.until


def unpacked(rows_BxMxW: jax.Array) -> jax.Array:
    """f32 [B, M, V] of packed cells, int8 [B, M, V + 2]."""
    factors = jax.lax.bitcast_convert_type(rows_BxMxW[..., -FACTOR_BYTES:], jnp.float16).astype(jnp.float32)
    return rows_BxMxW[..., :-FACTOR_BYTES].astype(jnp.float32) * factors[..., None]


def cell_of_token(index_BxN: jax.Array, grid_Bx2: jax.Array, cells_Bx2: jax.Array) -> jax.Array:
    """The number of the cell that covers the middle of each token, int32 [B, N].

    Args:
      index_BxN: the patch that each token is, as in `rotary.rotary`.
      grid_Bx2, cells_Bx2: (rows, columns) of the tokens and of the cells.
    """
    rows, columns = grid_Bx2[:, :1], grid_Bx2[:, 1:]
    row, column = index_BxN // columns, index_BxN % columns
    cell_row = (2 * row + 1) * cells_Bx2[:, :1] // (2 * rows)
    cell_column = (2 * column + 1) * cells_Bx2[:, 1:] // (2 * columns)
    return cell_row * cells_Bx2[:, 1:] + cell_column


def targets(rows_BxMxW: jax.Array, cells_Bx2: jax.Array, grid_Bx2: jax.Array, index_BxK: jax.Array) -> jax.Array:
    """f32 [B, K, V]: the patch of each token less the mean of the picture's."""
    patches = unpacked(rows_BxMxW)
    count_B = cells_Bx2[:, 0] * cells_Bx2[:, 1]
    real = (jnp.arange(patches.shape[1])[None, :] < count_B[:, None])[..., None]
    mean = jnp.sum(jnp.where(real, patches, 0.0), axis=1, keepdims=True) / count_B[:, None, None]
    cell = jnp.clip(cell_of_token(index_BxK, grid_Bx2, cells_Bx2), 0, patches.shape[1] - 1)
    own = jnp.take_along_axis(patches, cell[..., None], axis=1)
    centred = own - mean
    # A picture of one colour has patches that are all alike: what is left of them is rounding, and says nothing.
    tells = jnp.sum(centred**2, axis=-1, keepdims=True) > 1e-6 * jnp.sum(own**2, axis=-1, keepdims=True)
    return jnp.where(tells, centred, 0.0)


def loss(projected_BxKxV: jax.Array, target_BxKxV: jax.Array, length_B: jax.Array) -> jax.Array:
    """1 - cosine, the mean over the first `length` tokens of each sample, f32 [B]."""
    valid = jnp.arange(projected_BxKxV.shape[1])[None, :] < length_B[:, None]
    return jnp.sum(jnp.where(valid, 1 - _cosine(projected_BxKxV, target_BxKxV), 0.0), axis=1) / length_B


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Over the last axis; 0 where one is 0, with a gradient that is finite there."""
    squares = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return jnp.sum(a * b, axis=-1) * jax.lax.rsqrt(squares + 1e-12)


def agreement(flow: jax.Array, own: jax.Array) -> jax.Array:
    """Cosine of the alignment's gradient of the features with the flow's, f32."""
    flow, own = flow.astype(jnp.float32).ravel(), own.astype(jnp.float32).ravel()
    return jnp.vdot(flow, own) / jnp.maximum(jnp.linalg.norm(flow) * jnp.linalg.norm(own), 1e-30)
