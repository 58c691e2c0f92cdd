"""Token routing (TREAD, arXiv:2501.04765): in training a random part of each sample's tokens skips the middle blocks.

A skipped token enters the last blocks as it left the first ones. The tokens of a sample are put in a random order
before the network sees them, so that those that stay are the first ones: the network slices and selects, and no gather
enters the gradient. Nothing is routed when pictures are drawn or held-out losses measured.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Attention kernels work on tiles: a length between two multiples costs as much as the upper one.
_TILE, _SMALL_TILE = 128, 8


@dataclasses.dataclass(frozen=True)
class Routing:
    """How many tokens skip which blocks in training.

    Attributes:
      share: of each sample's own tokens that skip the middle blocks, in [0, 1).
      first, last: blocks at either end that all tokens go through.
    """

    share: float = 0.0
    first: int = 2
    last: int = 2

    def middle(self, depth: int) -> tuple[int, int]:
        """(first, behind the last) of the blocks that are skipped."""
        return self.first, depth - self.last

    def kept(self, tokens_B: jax.Array) -> jax.Array:
        """How many of so many tokens stay, int32: `tokens * (1 - share)`, rounded up, at least 1."""
        # In integers: a product in f32 can be just above a whole number.
        parts = round(1000 * (1 - self.share))
        return jnp.maximum(1, (tokens_B * parts + 999) // 1000)

    def length(self, tokens: int) -> int:
        """Tokens that the middle blocks compute where a batch has `tokens`: those kept, rounded up to a tile."""
        kept = max(1, math.ceil(tokens * round(1000 * (1 - self.share)) / 1000))
        tile = _TILE if tokens >= 2 * _TILE else _SMALL_TILE
        return min(tokens, tile * math.ceil(kept / tile))


class Routed(NamedTuple):
    """How a micro-batch is routed.

    Attributes:
      order_BxN: int32; token i of a sample is the patch `order[i]` of its grid, the sample's own first.
      kept_B: int32; the first so many tokens go through the middle blocks.
      routing: the rest of it.
    """

    order_BxN: jax.Array
    kept_B: jax.Array
    routing: Routing


def reordered(x_BxNxP: jax.Array, order_BxN: jax.Array) -> jax.Array:
    """Tokens in the order of `Routed`."""
    return jnp.take_along_axis(x_BxNxP, order_BxN[..., None], axis=1)


def select(inner_BxKxD: jax.Array, x_BxNxD: jax.Array, kept_B: jax.Array) -> jax.Array:
    """The kept tokens from the middle blocks, [B, K, D], all others as they were before them, [B, N, D]."""
    K = inner_BxKxD.shape[1]
    stays = jnp.arange(K, dtype=jnp.int32)[None, :] < kept_B[:, None]
    head = jnp.where(stays[..., None], inner_BxKxD, x_BxNxD[:, :K])
    return jnp.concatenate([head, x_BxNxD[:, K:]], axis=1)
