"""fluxdit_jax's network in plain PyTorch, the other side of the benchmarks of the training step.

The arithmetic is that of `fluxdit_jax.model.dit.DiT` (same layers, same order, scaled dot product attention by
PyTorch's own function); `load` copies a JAX parameter tree into it, so that the losses can be compared.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

TIME_FEATURES, ROPE_THETA = 256, 100.0


def rms_norm(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x / rms(x) over the last axis in f32, in the dtype of x."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (y if scale is None else y * scale).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[B, N, H, d]: turns the pairs (x[i], x[i + d/2]) in f32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def attend(q, k, v, valid) -> torch.Tensor:
    """[B, N, H, d] each; valid bool [B, M], None: all keys (which lets PyTorch choose its flash kernel)."""
    mask = None if valid is None else valid[:, None, None, :]
    y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return y.transpose(1, 2)


class Block(nn.Module):
    def __init__(self, D: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.attention_out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.q, self.kv = nn.Linear(D, D, bias=False), nn.Linear(D, 2 * D, bias=False)
        self.cross_out = nn.Linear(D, D, bias=False)
        self.gate_up, self.down = nn.Linear(D, 2 * hidden, bias=False), nn.Linear(hidden, D, bias=False)
        self.scales = nn.Parameter(torch.ones(4, D // heads))
        self.table = nn.Parameter(torch.zeros(7, D))

    def forward(self, x, modulation, text, text_valid, cos, sin):
        B, N, D = x.shape
        m = (modulation + self.table.to(modulation.dtype))[:, :, None]
        y = rms_norm(x) * (1 + m[:, 1]) + m[:, 0]
        q, k, v = (part.reshape(B, N, self.heads, -1) for part in self.qkv(y).chunk(3, -1))
        q = rotate(rms_norm(q, self.scales[0]), cos, sin)
        k = rotate(rms_norm(k, self.scales[1]), cos, sin)
        x = x + m[:, 2] * self.attention_out(attend(q, k, v, None).reshape(B, N, D))
        q = rms_norm(self.q(rms_norm(x)).reshape(B, N, self.heads, -1), self.scales[2])
        k, v = (part.reshape(B, text.shape[1], self.heads, -1) for part in self.kv(text).chunk(2, -1))
        k = rms_norm(k, self.scales[3])
        x = x + m[:, 3] * self.cross_out(attend(q, k, v, text_valid).reshape(B, N, D))
        gate, up = self.gate_up(rms_norm(x) * (1 + m[:, 5]) + m[:, 4]).chunk(2, -1)
        return x + m[:, 6] * self.down(F.silu(gate) * up)


class TorchDiT(nn.Module):
    """Takes x [B, N, P], t [B], rows x columns of all samples, text [B, T, E], text_length [B], vision [B, V].

    These two conditions only, both given.
    """

    def __init__(self, config):
        super().__init__()
        D, self.config = config.width, config
        widths = {condition.name: condition.width for condition in config.conditions}
        self.patch_embed = nn.Linear(config.token_width, D)
        self.time_in, self.time_out = nn.Linear(TIME_FEATURES, D), nn.Linear(D, D)
        self.vision_embed, self.text_embed = (
            nn.Linear(widths["vision"], D),
            nn.Linear(widths["text"], D),
        )
        self.text_scale = nn.Parameter(torch.ones(widths["text"]))
        self.modulation = nn.Linear(D, 9 * D)
        self.blocks = nn.ModuleList(Block(D, config.heads, config.mlp_hidden) for _ in range(config.depth))
        self.out = nn.Linear(D, config.token_width)

    def forward(self, x, t, rows, columns, text, text_length, vision):
        c = self.config
        x = self.patch_embed(x)
        pairs = c.width // c.heads // 4
        frequencies = ROPE_THETA ** (-torch.arange(pairs, device=x.device) / pairs)
        index = torch.arange(rows * columns, device=x.device)
        angles = torch.cat([(p[:, None] * frequencies) for p in (index // columns, index % columns)], -1)
        cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
        text_valid = torch.arange(text.shape[1], device=x.device)[None] < text_length[:, None]
        text = self.text_embed(rms_norm(text, self.text_scale))
        half = TIME_FEATURES // 2
        f = torch.exp(-math.log(10_000.0) * torch.arange(half, device=x.device) / half)
        angles = 1000.0 * t[:, None] * f
        time = self.time_out(F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()], -1))))
        vision = self.vision_embed(vision * math.sqrt(vision.shape[-1]))
        modulation = self.modulation(F.silu(time + vision)).reshape(x.shape[0], 9, c.width)
        for block in self.blocks:
            x = block(x, modulation[:, :7], text, text_valid, cos, sin)
        return self.out(rms_norm(x) * (1 + modulation[:, 8:]) + modulation[:, 7:8]).float()

    @torch.no_grad()
    def load(self, params: dict) -> None:
        """Copies the weights of a JAX parameter tree (the learned nulls have no part here)."""

        def put(parameter, value):
            parameter.copy_(torch.from_numpy(np.array(value, np.float32)))

        def dense(layer, tree, at=...):
            put(layer.weight, np.asarray(tree["kernel"])[at].T)
            if layer.bias is not None:
                put(layer.bias, tree["bias"])

        for name in ("patch_embed", "time_in", "time_out", "vision_embed", "text_embed", "modulation", "out"):
            dense(getattr(self, name), params[name])
        put(self.text_scale, params["text_scale"])
        own, cross, mlp = (params["blocks"][name] for name in ("attention", "cross", "mlp"))
        for i, block in enumerate(self.blocks):
            dense(block.qkv, own["qkv"], i)
            dense(block.attention_out, own["out"], i)
            dense(block.q, cross["q"], i)
            dense(block.kv, cross["kv"], i)
            dense(block.cross_out, cross["out"], i)
            dense(block.gate_up, mlp["gate_up"], i)
            dense(block.down, mlp["down"], i)
            scales = [tree[name][i] for tree in (own, cross) for name in ("q_scale", "k_scale")]
            put(block.scales, np.stack([np.asarray(scale) for scale in scales]))
            put(block.table, params["blocks"]["table"][i])
