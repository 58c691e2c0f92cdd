"""The diffusion transformer of fluxdit_jax in PyTorch: velocity of a noisy latent, given its time and conditions.

A DiT (Peebles & Xie 2023, arXiv:2212.09748) with one shared adaLN network and a table per block (arXiv:2310.00426),
cross-attention to the sequences among the conditions, QK-RMSNorm (arXiv:2302.05442), 2-D rotary positions
(arXiv:2104.09864) and SwiGLU (arXiv:2002.05202). It computes what `fluxdit_jax.model.dit.DiT` computes.

Shapes in names: B batch, N image tokens, P values of a patch, T tokens of a sequence, D width, H heads, d head size.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

TIME_FEATURES = 256
ROPE_THETA = 100.0
SCALED_SIDE = 16.0  # with scaled positions the picture's area is this squared
BLOCK_MODULATIONS = 7  # shift, scale, gate of self-attention; gate of cross-attention; shift, scale, gate of the MLP


def rms_norm(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x / rms(x) over the last axis, computed in f32, in the dtype of x."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (y if scale is None else y * scale.float()).to(x.dtype)


def rotary(grid: torch.Tensor, tokens: int, head_dim: int, positions: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each token's angles, f32 [B, N, head_dim / 2], from (rows, columns) int [B, 2]."""
    pairs = head_dim // 4
    frequencies = ROPE_THETA ** (-torch.arange(pairs, device=grid.device, dtype=torch.float32) / pairs)
    index, columns = torch.arange(tokens, device=grid.device)[None], grid[:, 1:2]
    place = torch.stack([index // columns, index % columns], -1).float()
    if positions == "scaled":
        place = place * (SCALED_SIDE / grid.prod(1).float().sqrt())[:, None, None]
    angles = (place[..., None] * frequencies).flatten(2)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[B, N, H, d]: turns the pairs (x[i], x[i + d/2]) in f32."""
    a, b = x.float().chunk(2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[B, N, H, d] each; valid bool [B, M], None: all keys, which lets PyTorch choose its fastest kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if valid is None else valid[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(width // heads)) for _ in range(2))

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in self.qkv(x).chunk(3, -1))
        q, k = rotate(rms_norm(q, self.q_scale), cos, sin), rotate(rms_norm(k, self.k_scale), cos, sin)
        return self.out(attend(q, k, v, valid).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(width // heads)) for _ in range(2))

    def forward(self, x: torch.Tensor, sequence: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        q = rms_norm(self.q(x).unflatten(-1, (self.heads, -1)), self.q_scale)
        k, v = (y.unflatten(-1, (self.heads, -1)) for y in self.kv(sequence).chunk(2, -1))
        return self.out(attend(q, rms_norm(k, self.k_scale), v, valid).flatten(2))


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate) * up)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.attention, self.cross = SelfAttention(width, heads), CrossAttention(width, heads)
        self.mlp = Mlp(width, hidden)
        self.table = nn.Parameter(torch.zeros(BLOCK_MODULATIONS, width))

    def forward(
        self,
        x: torch.Tensor,
        modulation: torch.Tensor,
        sequence: torch.Tensor,
        sequence_valid: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        m = (modulation + self.table.to(modulation.dtype))[:, :, None]
        x = x + m[:, 2] * self.attention(rms_norm(x) * (1 + m[:, 1]) + m[:, 0], cos, sin, valid)
        x = x + m[:, 3] * self.cross(rms_norm(x), sequence, sequence_valid)
        return x + m[:, 6] * self.mlp(rms_norm(x) * (1 + m[:, 5]) + m[:, 4])


class VectorEmbedding(nn.Module):
    """A condition that is a unit vector, which is scaled to a root mean square of 1."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.linear, self.null = nn.Linear(size, width), nn.Parameter(torch.zeros(width))

    def forward(self, values: torch.Tensor | None, keep: torch.Tensor | None, B: int) -> torch.Tensor:
        """[B, D]: the null without values [B, V], and where keep, bool [B], is False."""
        null = self.null.expand(B, -1)
        if values is None:
            return null
        vector = self.linear(values.to(null.dtype) * math.sqrt(values.shape[-1]))
        return vector if keep is None else torch.where(keep[:, None], vector, null)


class SequenceEmbedding(nn.Module):
    """A condition that is a sequence, whose tokens are normalised."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.linear, self.null = nn.Linear(size, width), nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, values: torch.Tensor | None, keep: torch.Tensor | None, B: int) -> torch.Tensor:
        """[B, T, D] of values [B, T, E], all of them the null where keep, bool [B], is False; [B, 1, D] without."""
        null = self.null.expand(B, 1, -1)
        if values is None:
            return null
        tokens = self.linear(rms_norm(values.to(null.dtype), self.scale))
        return tokens if keep is None else torch.where(keep[:, None, None], tokens, null)


class FluxDiT(ModelMixin, ConfigMixin):
    """The network; `forward` documents its contract.

    Args:
      width, depth, heads: of the blocks.
      patch: side of a token in latent pixels. channels: of the latent.
      conditions: name, width and kind ("sequence" or "vector") of each, in the order of the run.
      positions: "index" or "scaled".
      mlp_hidden: of the MLPs; None: 8/3 of the width, rounded up to a multiple of 64.
      auto_map: kept in config.json for diffusers' `AutoModel`.
    """

    source = Path(__file__).read_text(encoding="utf-8")  # for a pipeline that is saved again
    _no_split_modules = ["Block"]  # noqa: RUF012  diffusers' name
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int = 2,
        channels: int = 16,
        conditions: tuple[tuple[str, int, str], ...] = (("text", 1024, "sequence"), ("vision", 1024, "vector")),
        positions: str = "index",
        mlp_hidden: int | None = None,
        auto_map: dict[str, str] | None = None,
    ):
        super().__init__()
        self.sequences = [name for name, _, kind in conditions if kind == "sequence"]
        self.vectors = [name for name, _, kind in conditions if kind == "vector"]
        token_width = channels * patch**2
        self.patch_embed = nn.Linear(token_width, width)
        self.time_in, self.time_out = nn.Linear(TIME_FEATURES, width), nn.Linear(width, width)
        # Parameters stand in the module whose `forward` uses them: offloading brings them when it is called.
        kinds = {"sequence": SequenceEmbedding, "vector": VectorEmbedding}
        # Not by the names alone, which may be those of a ModuleDict's own attributes ("type").
        self.embed = nn.ModuleDict({f"of_{name}": kinds[kind](size, width) for name, size, kind in conditions})
        self.modulation = nn.Linear(width, (BLOCK_MODULATIONS + 2) * width)
        hidden = mlp_hidden or 64 * math.ceil(width * 8 / 3 / 64)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.out = nn.Linear(width, token_width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        grid: torch.Tensor | tuple[int, int],
        conditions: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Predicts the velocity.

        Args:
          hidden_states: noisy normalised latents as patches [B, N, P], in any float dtype; padding tokens zero.
          timestep: f32 [B], 1 is noise.
          grid: (rows, columns) of all samples, which have no padding then; or int [B, 2], of each.
          conditions: of each condition NAME: a vector f32 [B, V], or a sequence [B, T, E] with NAME_length int [B]
            (without it all T are real). keep_NAME bool [B]: where False, the learned null stands for it; a condition
            that is missing is null in all samples.

        Returns:
          f32 [B, N, P]; what stands at padding tokens is meaningless.
        """
        config, dtype = self.config, self.patch_embed.weight.dtype
        x = self.patch_embed(hidden_states.to(dtype))
        B, N, D = x.shape
        if isinstance(grid, torch.Tensor):
            valid = torch.arange(N, device=x.device)[None] < grid.prod(1)[:, None]
            places = grid
        else:
            valid, places = None, torch.tensor([grid], device=x.device)
        cos, sin = rotary(places, N, D // config.heads, config.positions)
        sequence, sequence_valid = self._sequences(conditions, B, x.device)

        half = TIME_FEATURES // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angles = 1000.0 * timestep.float()[:, None] * frequencies
        time = self.time_out(F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()], -1).to(dtype))))
        for name in self.vectors:
            time = time + self.embed[f"of_{name}"](conditions.get(name), conditions.get(f"keep_{name}"), B)
        modulation = self.modulation(F.silu(time)).unflatten(-1, (BLOCK_MODULATIONS + 2, D))
        for block in self.blocks:
            x = block(x, modulation[:, :-2], sequence, sequence_valid, cos, sin, valid)
        x = rms_norm(x) * (1 + modulation[:, -1:]) + modulation[:, -2:-1]
        return self.out(x).float()

    def _sequences(
        self, conditions: dict[str, torch.Tensor], B: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(tokens [B, T, D] of all sequences behind each other, which of them are real: bool [B, T], None: all)."""
        tokens, valid = [], []
        for name in self.sequences:
            given = conditions if name in conditions else {}
            keep, length = given.get(f"keep_{name}"), given.get(f"{name}_length")
            embedded = self.embed[f"of_{name}"](given.get(name), keep, B)
            T = embedded.shape[1]
            if length is None:
                length = torch.full((B,), T, device=device)
            if keep is not None:
                length = torch.where(keep, length, torch.ones_like(length))
            tokens.append(embedded)
            valid.append(torch.arange(T, device=device)[None] < length[:, None])
        whole = all(f"{n}_length" not in conditions and f"keep_{n}" not in conditions for n in self.sequences)
        return torch.cat(tokens, 1), None if whole else torch.cat(valid, 1)
