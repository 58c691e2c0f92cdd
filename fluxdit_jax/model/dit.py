"""The diffusion transformer: velocity of a noisy latent, given its time and its conditions.

A DiT (Peebles & Xie 2023, arXiv:2212.09748) with the parts that later work kept:
one shared adaLN network and a small table per block (PixArt-alpha, arXiv:2310.00426), cross-attention to
the sequences among the conditions (the caption), QK-RMSNorm (arXiv:2302.05442), 2-D rotary positions
(arXiv:2104.09864) computed from each sample's own height and width, and SwiGLU (arXiv:2002.05202: lower
loss than GELU at equal parameters and FLOPs). Layers inside the blocks have no biases.

Flax NNX defines the modules; blocks are stacked once and scanned (`jax.lax.scan`), so that tracing and
compiling do not grow with depth. Parameters are created in f32; callers cast them to the compute dtype.

Shapes in names: B batch, N image tokens, P values of a patch, T tokens of all sequences, D width, E and V width of a
stored sequence and vector, H heads, d head size.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fluxdit_jax.model import attention
from fluxdit_jax.model.conditions import Condition, Given, joined
from fluxdit_jax.model.matmul import matmul, repeat_rows, row_major
from fluxdit_jax.model.rotary import rotary, rotate
from fluxdit_jax.model.routing import Routed, Routing, select

# What a block keeps for the backward pass; the rest is computed again.
#   none     keep everything: fastest, most memory
#   dots     keep the results of dense layers and of attention: recomputes norms and activations only
#   attention keep the results of attention, which are expensive to recompute and small
#   block    keep the block's input only: least memory, about a third more compute
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("product"), attention.keep
    ),
    "attention": attention.keep,
    "block": jax.checkpoint_policies.nothing_saveable,
}
TIME_FEATURES = 256
PROJECTOR, PROJECTOR_HIDDEN = "projector", 2  # the name of its parameters; widths of the network
N_BLOCK_MODULATIONS = 7  # shift, scale, gate for self-attention and for the MLP; gate for cross-attention


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the network's parameters and mathematics.

    Attributes:
      width: D, a multiple of `heads`; head size must be a multiple of 4 (rotary pairs on two axes).
      patch: side of a patch in latent pixels.
      channels: latent channels of the VAE.
      conditions: what the network is given; parameters are created in this order, vectors before sequences. At
        least one of them is a sequence.
      dtype: compute dtype, "bfloat16" or "float32".
      positions: one of `rotary.POSITIONS`.
      remat: a key of `REMAT_POLICIES`.
      attention: "cudnn" or "xla" (see `attention.choose_implementation`).
      tap: blocks before the projector, whose parameters are there for training alone; 0: there is none.
      target_width: values that it predicts for each token.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2
    channels: int = 16
    conditions: tuple[Condition, ...] = (Condition("text", 1024, sequence=True), Condition("vision", 1024))
    dtype: str = "bfloat16"
    positions: str = "index"
    remat: str = "none"
    attention: str = "xla"
    tap: int = 0
    target_width: int = 0

    @property
    def sequences(self) -> tuple[Condition, ...]:
        return tuple(condition for condition in self.conditions if condition.sequence)

    @property
    def vectors(self) -> tuple[Condition, ...]:
        return tuple(condition for condition in self.conditions if not condition.sequence)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_hidden(self) -> int:
        """8/3 of the width, so that SwiGLU costs what a 4x GELU does, rounded up to a multiple of 64."""
        return 64 * math.ceil(self.width * 8 / 3 / 64)

    @property
    def token_width(self) -> int:
        return self.channels * self.patch**2


class Dense(nnx.Module):
    """Matrix product with optional bias; the kernel is normal with std scale / sqrt(fan_in), truncated at 3 std."""

    def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, bias: bool = False, scale: float = 1.0):
        std = scale / math.sqrt(fan_in)
        self.kernel = nnx.Param(std * jax.random.truncated_normal(rngs.params(), -3, 3, (fan_in, fan_out)))
        self.bias = nnx.Param(jnp.zeros((fan_out,))) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # 2-D: XLA's CPU backend runs a 3-D product up to 3.7x slower than the same product flattened
        y = checkpoint_name(matmul(x.reshape(-1, x.shape[-1]), self.kernel[...]), "product")
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...]


def rms_norm(x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """x / rms(x) over the last axis, the mean square in f32 (arXiv:1910.07467)."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
    return (y if scale is None else y * scale.astype(jnp.float32)).astype(x.dtype)


def time_features(t_B: jax.Array) -> jax.Array:
    """Sinusoidal features of 1000 t, f32 [B, TIME_FEATURES]."""
    half = TIME_FEATURES // 2
    frequencies = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = 1000.0 * t_B.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class SelfAttention(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.heads, self.implementation = config.heads, config.attention
        self.qkv = Dense(config.width, 3 * config.width, rngs=rngs)
        self.q_scale = nnx.Param(jnp.ones((config.head_dim,)))
        self.k_scale = nnx.Param(jnp.ones((config.head_dim,)))
        self.out = Dense(config.width, config.width, rngs=rngs)

    def __call__(self, x_BxNxD: jax.Array, cos: jax.Array, sin: jax.Array, length_B: jax.Array) -> jax.Array:
        B, N, D = x_BxNxD.shape
        q, k, v = (y.reshape(B, N, self.heads, -1) for y in jnp.split(self.qkv(x_BxNxD), 3, axis=-1))
        q = rotate(rms_norm(q, self.q_scale[...]), cos, sin)
        k = rotate(rms_norm(k, self.k_scale[...]), cos, sin)
        y = attention.attend(q, k, v, length_B, self.implementation)
        return self.out(y.reshape(B, N, D))


class CrossAttention(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.heads, self.implementation = config.heads, config.attention
        self.q = Dense(config.width, config.width, rngs=rngs)
        self.kv = Dense(config.width, 2 * config.width, rngs=rngs)
        self.q_scale = nnx.Param(jnp.ones((config.head_dim,)))
        self.k_scale = nnx.Param(jnp.ones((config.head_dim,)))
        self.out = Dense(config.width, config.width, rngs=rngs)

    def __call__(self, x_BxNxD: jax.Array, sequence_BxTxD: jax.Array, length_B: jax.Array) -> jax.Array:
        B, N, D = x_BxNxD.shape
        T = sequence_BxTxD.shape[1]
        q = rms_norm(self.q(x_BxNxD).reshape(B, N, self.heads, -1), self.q_scale[...])
        k, v = (y.reshape(B, T, self.heads, -1) for y in jnp.split(self.kv(sequence_BxTxD), 2, axis=-1))
        k = rms_norm(k, self.k_scale[...])
        y = attention.attend(q, k, v, length_B, self.implementation)
        return self.out(y.reshape(B, N, D))


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate) * up)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.gate_up = Dense(config.width, 2 * config.mlp_hidden, rngs=rngs)
        self.down = Dense(config.mlp_hidden, config.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


class Projector(nnx.Module):
    """From a block's features to what alignment holds them against: an MLP of three layers (arXiv:2410.06940)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden = PROJECTOR_HIDDEN * config.width
        self.enter = Dense(config.width, hidden, rngs=rngs, bias=True)
        self.hidden = Dense(hidden, hidden, rngs=rngs, bias=True)
        self.leave = Dense(hidden, config.target_width, rngs=rngs, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.leave(jax.nn.silu(self.hidden(jax.nn.silu(self.enter(x)))))


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention = SelfAttention(config, rngs=rngs)
        self.cross = CrossAttention(config, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.table = nnx.Param(jnp.zeros((N_BLOCK_MODULATIONS, config.width)))

    def __call__(
        self,
        x_BxNxD: jax.Array,
        modulation_Bx7xD: jax.Array,
        sequence_BxTxD: jax.Array,
        sequence_length_B: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        length_B: jax.Array,
    ) -> jax.Array:
        m = modulation_Bx7xD + self.table[...]
        shift1, scale1, gate1, gate_cross, shift2, scale2, gate2 = (
            repeat_rows(m[:, i], x_BxNxD.shape[1]) for i in range(N_BLOCK_MODULATIONS)
        )
        x = x_BxNxD
        x = x + gate1 * self.attention(rms_norm(x) * (1 + scale1) + shift1, cos, sin, length_B)
        x = x + gate_cross * self.cross(rms_norm(x), sequence_BxTxD, sequence_length_B)
        return x + gate2 * self.mlp(rms_norm(x) * (1 + scale2) + shift2)


class DiT(nnx.Module):
    """The network; `__call__` documents its contract."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.width
        self.config = config
        self.patch_embed = Dense(config.token_width, D, rngs=rngs, bias=True)
        self.time_in = Dense(TIME_FEATURES, D, rngs=rngs, bias=True)
        self.time_out = Dense(D, D, rngs=rngs, bias=True)
        for name, width in ((c.name, c.width) for c in config.vectors):
            setattr(self, f"{name}_embed", Dense(width, D, rngs=rngs, bias=True))
            setattr(self, f"null_{name}", nnx.Param(0.02 * jax.random.normal(rngs.params(), (D,))))
        for name, width in ((c.name, c.width) for c in config.sequences):
            setattr(self, f"{name}_scale", nnx.Param(jnp.ones((width,))))
            setattr(self, f"{name}_embed", Dense(width, D, rngs=rngs, bias=True))
            setattr(self, f"null_{name}", nnx.Param(jax.random.normal(rngs.params(), (D,))))
        # Gates start at zero (every block is the identity), shifts and scales do not: a zero table plus a
        # zero network would still learn, but the conditions would reach the blocks two steps later.
        self.modulation = Dense(D, (N_BLOCK_MODULATIONS + 2) * D, rngs=rngs, bias=True, scale=0.1)
        kernel = self.modulation.kernel[...].reshape(D, N_BLOCK_MODULATIONS + 2, D)
        self.modulation.kernel[...] = kernel.at[:, jnp.array([2, 3, 6])].set(0.0).reshape(D, -1)

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.out = Dense(D, config.token_width, rngs=rngs, bias=True, scale=0.0)
        if config.tap:
            setattr(self, PROJECTOR, Projector(config, rngs=rngs))

    def __call__(
        self,
        x_BxNxP: jax.Array,
        t_B: jax.Array,
        grid_Bx2: jax.Array,
        conditions: dict[str, Given],
        routed: Routed | None = None,
        probes: tuple[jax.Array, jax.Array] | None = None,
    ) -> Any:
        """Predicts the velocity.

        Args:
          x_BxNxP: noisy normalised latent as patches, padding tokens zero.
          t_B: f32 time in [0, 1], 1 is noise.
          grid_Bx2: int32 (rows, columns) of tokens; the first rows*columns of N are real.
          conditions: all of `config.conditions`, by name.
          routed: which tokens skip the middle blocks; `x_BxNxP` is in its order then. None: no token does.
          probes: zeros of the shape and dtype of the features at the tap, `tap_shape`. The first is added to what goes
            on from there, the second to what the projector is given: their gradients are those of the features by the
            velocity and by the projector.

        Returns:
          f32 [B, N, P]; what stands at padding tokens is meaningless. With `probes` (that, the projector's f32
          [B, K, target_width] of the K tokens that are there at the tap).
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        x = self.patch_embed(x_BxNxP.astype(dtype))
        length_B = grid_Bx2[:, 0] * grid_Bx2[:, 1]
        index_BxN = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] if routed is None else routed.order_BxN
        cos, sin = rotary(grid_Bx2, index_BxN, config.head_dim, config.positions)
        sequence, sequence_length_B = joined([self._sequence(c.name, conditions[c.name]) for c in config.sequences])

        time = self.time_out(jax.nn.silu(self.time_in(time_features(t_B).astype(dtype))))
        vector = functools.reduce(jnp.add, [self._vector(c.name, conditions[c.name]) for c in config.vectors], time)
        modulation = self.modulation(jax.nn.silu(vector)).reshape(x.shape[0], -1, config.width)
        block_modulation, (shift, scale) = modulation[:, :-2], jnp.moveaxis(modulation[:, -2:, None], 1, 0)

        graph, stacked = nnx.split(self.blocks)

        def through(x: jax.Array, blocks: Any, cos: jax.Array, sin: jax.Array, length_B: jax.Array) -> jax.Array:
            def body(x: jax.Array, block_parameters: Any) -> tuple[jax.Array, None]:
                block = nnx.merge(graph, block_parameters)
                return block(row_major(x), block_modulation, sequence, sequence_length_B, cos, sin, length_B), None

            if config.remat != "none":
                body = jax.checkpoint(body, prevent_cse=False, policy=REMAT_POLICIES[config.remat])
            return jax.lax.scan(body, x, blocks)[0]

        everything, kept_B = x, length_B  # the tokens outside of the middle blocks, while x is inside
        a, b = (0, config.depth) if routed is None else routed.routing.middle(config.depth)
        ends = sorted({0, a, b, config.depth} | ({config.tap} if probes is not None else set()))
        for begin, end in itertools.pairwise(ends):
            blocks = stacked if end - begin == config.depth else jax.tree.map(lambda p, i=begin, j=end: p[i:j], stacked)
            if routed is not None and begin == a:
                everything, kept_B = x, routed.kept_B
                x = x[:, : routed.routing.length(x.shape[1])]
            K = x.shape[1]
            x = through(x, blocks, cos[:, :K], sin[:, :K], kept_B)
            if probes is not None and end == config.tap:
                projected = getattr(self, PROJECTOR)(x + probes[1]).astype(jnp.float32)
                x = x + probes[0]
            if routed is not None and end == b:
                x, kept_B = select(x, everything, kept_B), length_B
        x = rms_norm(x) * (1 + scale) + shift
        velocity = self.out(x).astype(jnp.float32)
        return velocity if probes is None else (velocity, projected)

    def _sequence(self, name: str, given: Given) -> tuple[jax.Array, jax.Array]:
        """(tokens [B, T, D], length [B]) of a sequence; that of the null is 1."""
        assert given.length_B is not None
        scale, embed, null = (getattr(self, part) for part in (f"{name}_scale", f"{name}_embed", f"null_{name}"))
        tokens = embed(rms_norm(given.values.astype(self.config.dtype), scale[...]))
        tokens = jnp.where(given.keep_B[:, None, None], tokens, null[...])
        return tokens, jnp.where(given.keep_B, given.length_B, 1)

    def _vector(self, name: str, given: Given) -> jax.Array:
        """[B, D] of a unit vector, which is scaled to a root mean square of 1."""
        embed, null = getattr(self, f"{name}_embed"), getattr(self, f"null_{name}")
        vector = embed(given.values.astype(self.config.dtype) * math.sqrt(given.values.shape[-1]))
        return jnp.where(given.keep_B[:, None], vector, null[...])


@functools.lru_cache(maxsize=8)
def build(config: ModelConfig) -> tuple[Any, Any]:
    """Returns (graph, shapes): the static graph and the parameter tree as `jax.ShapeDtypeStruct`, f32.

    The tree is nested dicts of plain arrays, so that optimizers and checkpoints need not know Flax.
    """
    abstract = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    return graph, nnx.to_pure_dict(state)


def initialize(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Creates the f32 parameters: nested dicts of arrays."""
    return nnx.to_pure_dict(nnx.split(DiT(config, rngs=nnx.Rngs(params=key)))[1])


def apply(graph: Any, params: dict[str, Any], *args: Any, **options: Any) -> Any:
    """Runs the network with a parameter tree as `build` describes it. See `DiT.__call__`."""
    return nnx.merge(graph, params)(*args, **options)


def tap_shape(config: ModelConfig, batch: int, tokens: int, routing: Routing | None = None) -> tuple[int, int, int]:
    """[B, K, D] of the features at the tap: of the K tokens that go through the block before it."""
    inside = routing is not None and tap_inside(config, routing)
    return batch, routing.length(tokens) if routing is not None and inside else tokens, config.width


def tap_inside(config: ModelConfig, routing: Routing) -> bool:
    """Whether the block before the tap is one that tokens skip."""
    begin, end = routing.middle(config.depth)
    return begin < config.tap <= end


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters, without allocating any."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(build(config)[1]))
