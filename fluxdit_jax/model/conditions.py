"""The conditions of the network: what it is given besides the noisy latent and the time.

A condition is a sequence (cross-attention) or a vector (modulation). Each has a learned null, which stands in where it
is dropped or not given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Condition:
    """A named input of the network.

    Attributes:
      name: in parameters (NAME_embed, null_NAME) and batches.
      width: of a sequence's token, or of the vector.
      sequence: whether it is a sequence.
    """

    name: str
    width: int
    sequence: bool = False


class Given(NamedTuple):
    """The values of a condition in a batch.

    Attributes:
      values: a sequence bf16 [B, T, E], zero beyond its length, or unit vectors f32 [B, V].
      keep_B: bool; False replaces the sample's condition by the null.
      length_B: of a sequence, int32, 1..T; None: a vector.
    """

    values: jax.Array
    keep_B: jax.Array
    length_B: jax.Array | None = None


def given(conditions: Iterable[Condition], batch: Mapping[str, Any], keep: Mapping[str, jax.Array]) -> dict[str, Given]:
    """What a batch gives: arrays NAME and, of a sequence, NAME_length; `keep` by name."""
    return {
        c.name: Given(batch[c.name], keep[c.name], batch[f"{c.name}_length"] if c.sequence else None)
        for c in conditions
    }


def joined(sequences: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Sequences as one: in each sample the tokens of the first, of the second and so on, then the padding.

    Args:
      sequences: (tokens [B, T_i, D], int32 length [B]) of each, at least one.

    Returns:
      [B, sum of T_i, D] and the sum of the lengths. Padding holds tokens of no meaning.
    """
    tokens_BxTxD, length_B = sequences[0]
    for more_BxTxD, more_length_B in sequences[1:]:
        T, U = tokens_BxTxD.shape[1], more_BxTxD.shape[1]
        place = jnp.arange(T + U)[None, :]
        source = jnp.where(place < length_B[:, None], place, T + (place - length_B[:, None]) % U)
        tokens_BxTxD = jnp.take_along_axis(
            jnp.concatenate([tokens_BxTxD, more_BxTxD], axis=1), source[..., None], axis=1
        )
        length_B = length_B + more_length_B
    return tokens_BxTxD, length_B
