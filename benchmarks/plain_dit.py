"""The baseline of `convergence.py`: a plain DiT of the same width, depth, heads and patch as `fluxdit_jax.model.dit`.

What Peebles & Xie 2023 (arXiv:2212.09748) describe, with cross-attention for the caption as PixArt-alpha has it
(arXiv:2310.00426): LayerNorm, an adaLN-Zero network in every block, fixed sin-cos positions, GELU MLP of four
times the width, biases everywhere, no norm of queries and keys, no rotary positions. The vision vector, as any other,
is added to the time embedding, where DiT adds the class. Called as `model.DiT` is, so that the same step trains it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxdit_jax.model.attention import attend
from fluxdit_jax.model.conditions import Given, joined
from fluxdit_jax.model.dit import TIME_FEATURES, ModelConfig, time_features


class Linear(nnx.Module):
    """Matrix product with bias; Xavier uniform, or zero."""

    def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, zero: bool = False):
        bound = 0.0 if zero else math.sqrt(6 / (fan_in + fan_out))
        kernel = jax.random.uniform(rngs.params(), (fan_in, fan_out), minval=-bound, maxval=bound)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((fan_out,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        flat = jnp.dot(x.reshape(-1, x.shape[-1]), self.kernel[...]) + self.bias[...]
        return flat.reshape(*x.shape[:-1], -1)


def layer_norm(x: jax.Array) -> jax.Array:
    """(x - mean) / deviation over the last axis in f32, without scale or bias."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def positions(grid_Bx2: jax.Array, tokens: int, width: int) -> jax.Array:
    """Sin-cos positions: half of the width for the row, half for the column, f32 [B, tokens, width]."""
    frequencies = 10_000.0 ** (-jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
    index = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    columns = grid_Bx2[:, 1:2]
    axes = (index // columns, index % columns)
    angles = [axis.astype(jnp.float32)[..., None] * frequencies for axis in axes]
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=-1)


class PlainBlock(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.width
        self.heads = config.heads
        self.modulation = Linear(D, 6 * D, rngs=rngs, zero=True)
        self.qkv, self.out = Linear(D, 3 * D, rngs=rngs), Linear(D, D, rngs=rngs)
        self.cross_q, self.cross_kv = Linear(D, D, rngs=rngs), Linear(D, 2 * D, rngs=rngs)
        self.cross_out = Linear(D, D, rngs=rngs, zero=True)
        self.up, self.down = Linear(D, 4 * D, rngs=rngs), Linear(4 * D, D, rngs=rngs)

    def _heads(self, x_BxNxC: jax.Array, parts: int) -> list[jax.Array]:
        B, N, _ = x_BxNxC.shape
        return [y.reshape(B, N, self.heads, -1) for y in jnp.split(x_BxNxC, parts, axis=-1)]

    def __call__(self, x_BxNxD, condition_BxD, text_BxTxD, text_length_B, length_B):
        shape = x_BxNxD.shape
        modulation = jnp.split(self.modulation(jax.nn.silu(condition_BxD))[:, None], 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x_BxNxD
        q, k, v = self._heads(self.qkv(layer_norm(x) * (1 + scale1) + shift1), 3)
        x = x + gate1 * self.out(attend(q, k, v, length_B, "xla").reshape(shape))
        (q,), (k, v) = self._heads(self.cross_q(x), 1), self._heads(self.cross_kv(text_BxTxD), 2)
        x = x + self.cross_out(attend(q, k, v, text_length_B, "xla").reshape(shape))
        hidden = jax.nn.gelu(self.up(layer_norm(x) * (1 + scale2) + shift2), approximate=True)
        return x + gate2 * self.down(hidden)


class PlainDiT(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.width
        self.config = config
        self.patch_embed = Linear(config.token_width, D, rngs=rngs)
        self.time_in, self.time_out = Linear(TIME_FEATURES, D, rngs=rngs), Linear(D, D, rngs=rngs)
        for condition in (*config.vectors, *config.sequences):
            setattr(self, f"{condition.name}_embed", Linear(condition.width, D, rngs=rngs))
            setattr(self, f"null_{condition.name}", nnx.Param(0.02 * jax.random.normal(rngs.params(), (D,))))

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs):
            return PlainBlock(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.modulation = Linear(D, 2 * D, rngs=rngs, zero=True)
        self.out = Linear(D, config.token_width, rngs=rngs, zero=True)

    def __call__(
        self, x_BxNxP: jax.Array, t_B: jax.Array, grid_Bx2: jax.Array, conditions: dict[str, Given]
    ) -> jax.Array:
        """As `fluxdit_jax.model.dit.DiT.__call__`: f32 velocity [B, N, P]."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        tokens = x_BxNxP.shape[1]
        places = positions(grid_Bx2, tokens, config.width).astype(dtype)
        x = self.patch_embed(x_BxNxP.astype(dtype)) + places
        length_B = grid_Bx2[:, 0] * grid_Bx2[:, 1]

        text, text_length_B = joined([self._sequence(c.name, conditions[c.name]) for c in config.sequences])
        time = self.time_out(jax.nn.silu(self.time_in(time_features(t_B).astype(dtype))))
        condition = functools.reduce(jnp.add, [self._vector(c.name, conditions[c.name]) for c in config.vectors], time)
        graph, stacked = nnx.split(self.blocks)

        def body(x, block_parameters):
            block = nnx.merge(graph, block_parameters)
            return block(x, condition, text, text_length_B, length_B), None

        if config.remat != "none":
            body = jax.checkpoint(body, prevent_cse=False)
        x, _ = jax.lax.scan(body, x, stacked)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(condition))[:, None], 2, axis=-1)
        return self.out(layer_norm(x) * (1 + scale) + shift).astype(jnp.float32)

    def _sequence(self, name: str, given: Given) -> tuple[jax.Array, jax.Array]:
        embed, null = getattr(self, f"{name}_embed"), getattr(self, f"null_{name}")
        tokens = embed(given.values.astype(self.config.dtype))
        return jnp.where(given.keep_B[:, None, None], tokens, null[...]), jnp.where(given.keep_B, given.length_B, 1)

    def _vector(self, name: str, given: Given) -> jax.Array:
        embed, null = getattr(self, f"{name}_embed"), getattr(self, f"null_{name}")
        vector = embed(given.values.astype(self.config.dtype) * math.sqrt(given.values.shape[-1]))
        return jnp.where(given.keep_B[:, None], vector, null[...])


def build(config: ModelConfig) -> Any:
    """The static graph, to be given to `model.apply` with parameters of `initialize`."""
    return nnx.split(nnx.eval_shape(lambda: PlainDiT(config, rngs=nnx.Rngs(0))))[0]


def initialize(config: ModelConfig, key: jax.Array) -> dict:
    """f32 parameters as nested dicts."""
    return nnx.to_pure_dict(nnx.split(PlainDiT(config, rngs=nnx.Rngs(params=key)))[1])


def flops_per_sample(config: ModelConfig, tokens: int, lengths: dict[str, int]) -> int:
    """Forward matrix-product FLOPs of a sample, counted as `cost.flops_per_sample` does."""
    D, N, T = config.width, tokens, sum(lengths[c.name] for c in config.sequences)
    block = 2 * N * D * 4 * D + 4 * N * N * D
    block += 2 * N * D * 2 * D + 2 * T * D * 2 * D + 4 * N * T * D
    block += 2 * N * D * 8 * D + 2 * D * 6 * D
    ends = 2 * N * 2 * config.token_width * D + sum(2 * lengths[c.name] * c.width * D for c in config.sequences)
    vector = 2 * D * (TIME_FEATURES + D + sum(c.width for c in config.vectors) + 2 * D)
    return config.depth * block + ends + vector
