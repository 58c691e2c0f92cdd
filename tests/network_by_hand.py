"""The network by hand, in f64 and one sample at a time, without padding."""

from __future__ import annotations

import math

import jax
import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def normed(x, scale=1.0):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def dense(layer, x):
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def turned(x_NxHxd, rows, columns):
    """Rotary positions: pairs (i, i + d/2), the first half of them by the row, the others by the column."""
    pairs = x_NxHxd.shape[-1] // 4
    frequencies = 100.0 ** (-np.arange(pairs) / pairs)
    angles = np.concatenate([np.outer(rows, frequencies), np.outer(columns, frequencies)], axis=1)[:, None]
    a, b = np.split(x_NxHxd, 2, axis=-1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], axis=-1)


def attended(q, k, v):
    logits = np.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("hnm,mhd->nhd", weights / weights.sum(axis=-1, keepdims=True), v).reshape(len(q), -1)


def predicted(params, config, x, t, grid, text, vision, more=(), skipped=(), kept=None):
    """The velocity [N, P] of one sample's own tokens; text or vision None: that condition is dropped.

    `more`: (name, array or None) of further conditions, by rank a sequence or a vector. `skipped`: numbers of the
    blocks that only the tokens `kept` go through.
    """

    def heads(y):
        return y.reshape(len(y), config.heads, -1)

    x = dense(params["patch_embed"], x)
    everywhere = np.divmod(np.arange(len(x)), grid[1])
    sequences, vectors = [], []
    for name, values in (("text", text), ("vision", vision), *more):
        is_sequence = f"{name}_scale" in params
        if values is None:
            embedded = params[f"null_{name}"][None] if is_sequence else params[f"null_{name}"]
        elif is_sequence:
            embedded = dense(params[f"{name}_embed"], normed(values, params[f"{name}_scale"]))
        else:
            embedded = dense(params[f"{name}_embed"], values * math.sqrt(len(values)))
        (sequences if is_sequence else vectors).append(embedded)
    text = np.concatenate(sequences)
    angles = 1000.0 * t * 10_000.0 ** (-np.arange(128) / 128)
    time = dense(params["time_out"], silu(dense(params["time_in"], np.concatenate([np.cos(angles), np.sin(angles)]))))
    modulation = dense(params["modulation"], silu(time + sum(vectors))).reshape(9, config.width)
    for number in range(config.depth):
        block = jax.tree.map(lambda leaf, layer=number: leaf[layer], params["blocks"])
        inside = kept if number in skipped else np.arange(len(x))
        before, x = x, x[inside]
        rows, columns = (places[inside] for places in everywhere)
        shift1, scale1, gate1, gate_cross, shift2, scale2, gate2 = modulation[:7] + block["table"]
        own, cross, mlp = block["attention"], block["cross"], block["mlp"]
        q, k, v = map(heads, np.split(dense(own["qkv"], normed(x) * (1 + scale1) + shift1), 3, axis=-1))
        q, k = (turned(normed(y, own[f"{name}_scale"]), rows, columns) for name, y in (("q", q), ("k", k)))
        x = x + gate1 * dense(own["out"], attended(q, k, v))
        k, v = map(heads, np.split(dense(cross["kv"], text), 2, axis=-1))
        q = normed(heads(dense(cross["q"], normed(x))), cross["q_scale"])
        x = x + gate_cross * dense(cross["out"], attended(q, normed(k, cross["k_scale"]), v))
        gate, up = np.split(dense(mlp["gate_up"], normed(x) * (1 + scale2) + shift2), 2, axis=-1)
        x = x + gate2 * dense(mlp["down"], silu(gate) * up)
        after = before.copy()
        after[inside] = x
        x = after
    shift, scale = modulation[7:]
    return dense(params["out"], normed(x) * (1 + scale) + shift)
