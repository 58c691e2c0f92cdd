"""Scaled dot-product attention over a prefix of valid keys.

Two implementations of one contract: `cudnn` (flash attention, NVIDIA GPU, bf16) and `xla` (anywhere).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fluxdit_jax.model.matmul import product_f32

# Above this many f32 logits (8 MiB) the XLA path takes one head of one sample at a time: on a CPU that is faster for
# the 1,024 x 120 of cross-attention, too.
_LOGITS_AT_ONCE = 2 * 2**20
_KEPT = "attention"  # the name of what `keep` keeps of the XLA path


def keep(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """A policy for `jax.checkpoint`: keeps what attention's backward pass needs of the forward pass beside q, k, v.

    That is the output and the log-sum-exp of each row: expensive to compute and small, since the logits are not among
    them. cuDNN's attention is one primitive with both as its results; to keep a copy of its output alone would not
    spare it from being run again, as the backward pass needs the other, too.
    """
    return primitive.name.startswith("dot_product_attention_fwd") or (
        primitive.name == "name" and parameters["name"] == _KEPT
    )


def choose_implementation(dtype: jnp.dtype, head_dim: int) -> str:
    """`cudnn` where it can run (NVIDIA GPU, bf16, head_dim a multiple of 8 up to 128), else `xla`."""
    on_gpu = jax.default_backend() == "gpu"
    fits = jnp.dtype(dtype) == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if on_gpu and fits else "xla"


def attend(
    q_BxNxHxd: jax.Array,
    k_BxMxHxd: jax.Array,
    v_BxMxHxd: jax.Array,
    key_length_B: jax.Array,
    implementation: str,
) -> jax.Array:
    """softmax(q kᵀ / sqrt(d)) v over the first `key_length` keys of each sample.

    Args:
      q_BxNxHxd, k_BxMxHxd, v_BxMxHxd: queries, keys, values, all of one float dtype.
      key_length_B: int32 [B], each in 1..M; keys from there on are padding and must be finite.
      implementation: "cudnn" or "xla".

    Returns:
      [B, N, H, d] in the dtype of the queries; the softmax itself is f32.
    """
    if implementation == "cudnn":
        B, N = q_BxNxHxd.shape[:2]
        q, k, v = map(_split_by_sample, (q_BxNxHxd, k_BxMxHxd, v_BxMxHxd))
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            # every query row is computed: padding rows are thrown away by the loss
            query_seq_lengths=jnp.full((B,), N, jnp.int32),
            key_value_seq_lengths=key_length_B,
            implementation="cudnn",
        )
    if implementation != "xla":
        raise ValueError(f"attention implementation must be 'cudnn' or 'xla', got {implementation!r}")
    B, N, H, _ = q_BxNxHxd.shape
    M = k_BxMxHxd.shape[1]
    valid_BxM = jnp.arange(M, dtype=jnp.int32)[None, :] < key_length_B[:, None]
    if B * H * N * M <= _LOGITS_AT_ONCE:
        return _attend_at_once(q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, valid_BxM)
    return _attend_one_by_one(q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, valid_BxM)


def _split_by_sample(x: jax.Array) -> jax.Array:
    """x with its samples over all devices of the mesh that is set (`jax.set_mesh`), and nothing else split.

    cuDNN's attention refuses queries, keys and values that are split in different ways, as XLA may do where the weights
    that make them are split (fsdp).
    """
    axes = jax.sharding.get_abstract_mesh().axis_names
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(axes)) if axes else x


def _attend_at_once(
    q_BxNxHxd: jax.Array, k_BxMxHxd: jax.Array, v_BxMxHxd: jax.Array, valid_BxM: jax.Array
) -> jax.Array:
    scale = 1.0 / math.sqrt(q_BxNxHxd.shape[-1])
    logits = jnp.einsum("bnhd,bmhd->bhnm", q_BxNxHxd, k_BxMxHxd, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(valid_BxM[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BxMxHxd.dtype)
    return checkpoint_name(jnp.einsum("bhnm,bmhd->bnhd", weights, v_BxMxHxd), _KEPT)


# One head of one sample at a time, so that its N x M logits stay in the cache; the backward pass computes them
# again from the kept log-sum-exp, as flash attention does (arXiv:2205.14135). There they are transposed, M x N:
# no product then needs a large array turned over, which `product_f32` could not do at speed.


@jax.custom_vjp
def _attend_one_by_one(
    q_BxNxHxd: jax.Array, k_BxMxHxd: jax.Array, v_BxMxHxd: jax.Array, valid_BxM: jax.Array
) -> jax.Array:
    return _forward(q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, valid_BxM)[0]


def _forward(
    q_BxNxHxd: jax.Array, k_BxMxHxd: jax.Array, v_BxMxHxd: jax.Array, valid_BxM: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    B, _, H, d = q_BxNxHxd.shape
    scale = 1.0 / math.sqrt(d)

    def one(head: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, valid_M = head
        logits = jnp.where(valid_M[None, :], product_f32(q, k, 1, 1) * scale, -jnp.inf)
        largest = jnp.max(logits, axis=1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = jnp.sum(weights, axis=1, keepdims=True)
        out = product_f32(weights.astype(v.dtype), v, 1, 0) / total
        return out.astype(q.dtype), (largest + jnp.log(total))[:, 0]

    heads = (*map(_by_head, (q_BxNxHxd, k_BxMxHxd, v_BxMxHxd)), jnp.repeat(valid_BxM, H, axis=0))
    out, log_total = jax.lax.map(one, heads)
    out_BxNxHxd, log_total = checkpoint_name(_by_sample(out, B), _KEPT), checkpoint_name(log_total, _KEPT)
    return out_BxNxHxd, (q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, valid_BxM, out_BxNxHxd, log_total)


def _backward(kept: tuple[jax.Array, ...], g_BxNxHxd: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, valid_BxM, out_BxNxHxd, log_total = kept
    B, _, H, d = q_BxNxHxd.shape
    scale = 1.0 / math.sqrt(d)
    inner_BxNxH = jnp.sum(g_BxNxHxd.astype(jnp.float32) * out_BxNxHxd.astype(jnp.float32), axis=-1)

    def one(head: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, kT, v, g, log_total_N, inner_N, valid_M = head
        valid = valid_M[:, None]
        weights = jnp.exp(jnp.where(valid, product_f32(k, q, 1, 1) * scale, -jnp.inf) - log_total_N)
        # the `where` is for speed: without it XLA puts what follows into the library's product, which is slow
        d_weights = jnp.where(valid, product_f32(v, g, 1, 1), 0.0)
        d_logits = (weights * (d_weights - inner_N) * scale).astype(q.dtype)
        dv = product_f32(weights.astype(g.dtype), g, 1, 0)
        dk = product_f32(d_logits, q, 1, 0)
        dqT = product_f32(kT, d_logits, 1, 0)
        return dqT.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    q, k, v, g, inner = map(_by_head, (q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, g_BxNxHxd, inner_BxNxH[..., None]))
    heads = (q, k, jnp.swapaxes(k, 1, 2), v, g, log_total, inner[..., 0], jnp.repeat(valid_BxM, H, axis=0))
    dqT, dk, dv = jax.lax.map(one, heads)
    return _by_sample(jnp.swapaxes(dqT, 1, 2), B), _by_sample(dk, B), _by_sample(dv, B), None


_attend_one_by_one.defvjp(_forward, _backward)


def _by_head(x_BxNxHxd: jax.Array) -> jax.Array:
    """[B * H, N, d]."""
    x = jnp.moveaxis(x_BxNxHxd, 2, 1)
    return x.reshape(-1, *x.shape[2:])


def _by_sample(x: jax.Array, samples: int) -> jax.Array:
    """[B, N, H, d] of [B * H, N, d]."""
    return jnp.moveaxis(x.reshape(samples, -1, *x.shape[1:]), 1, 2)
