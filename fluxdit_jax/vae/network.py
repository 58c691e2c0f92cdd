"""The decoder networks of diffusers' `AutoencoderKL`, `AutoencoderKLFlux2` and `AutoencoderTiny`, in Flax NNX.

Attributes carry diffusers' names, so that a parameter's path in the module is its name in the safetensors
file. Activations are [B, H, W, C] (diffusers: [B, C, H, W]): the layout in which XLA's convolutions are fast.
Each network is cut in two: `head` works at the latent's resolution, `tail` enlarges; for large
images `strips` runs the layers of `tail` one by one.

Sources: Rombach et al. 2022 (arXiv:2112.10752), appendix E; github.com/madebyollin/taesd.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxdit_jax.vae.settings import Flux2Config, KlConfig, TinyConfig

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
EPSILON = 1e-6
SCORES = 2**24  # attention scores held at a time: 64 MiB of f32


Moments = tuple[jax.Array, jax.Array]  # mean and variance of each channel group, f32 [B, groups] each


def moments_of(x_BHWC: jax.Array, groups: int, rows: tuple[int | jax.Array, int | jax.Array] | None = None) -> Moments:
    """Moments of x, or of its rows `rows[0]` to `rows[1]` (excluded; both may be traced).

    Two passes: one pass (the mean of squares less the square of the mean) loses digits.
    """
    if rows is None:
        where_H11 = None
    else:
        row = jnp.arange(x_BHWC.shape[1])
        where_H11 = ((row >= rows[0]) & (row < rows[1]))[:, None, None]

    def mean(values_BHWC: jax.Array) -> jax.Array:
        per_channel_BC = values_BHWC.mean((1, 2), where=where_H11)
        return per_channel_BC.reshape(len(per_channel_BC), groups, -1).mean(-1)

    x_BHWC = x_BHWC.astype(jnp.float32)
    mean_BG = mean(x_BHWC)
    return mean_BG, mean(jnp.square(x_BHWC - _per_channel(mean_BG, x_BHWC.shape[-1])))


def _per_channel(values_BG: jax.Array, channels: int) -> jax.Array:
    return jnp.repeat(values_BG, channels // values_BG.shape[-1], axis=-1)[:, None, None, :]


class GroupNorm(nnx.Module):
    """Group normalisation of [B, H, W, C]; the arithmetic is f32.

    Where x is part of a picture, the whole picture's `moments` are given with it.
    """

    def __init__(self, channels: int, groups: int, dtype: Any):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones(channels, dtype))
        self.bias = nnx.Param(jnp.zeros(channels, dtype))

    def __call__(self, x: jax.Array, moments: Moments | None = None) -> jax.Array:
        if moments is None:
            moments = moments_of(x, self.groups)
        mean, variance = (_per_channel(m, x.shape[-1]) for m in moments)
        scale = self.scale[...].astype(jnp.float32) * jax.lax.rsqrt(variance + EPSILON)
        y = (x.astype(jnp.float32) - mean) * scale + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Upsample(nnx.Module):
    """Nearest-neighbour enlargement of [B, H, W, C] to [B, H*factor, W*factor, C]."""

    def __init__(self, factor: int):
        self.factor = factor

    def __call__(self, x: jax.Array) -> jax.Array:
        return x.repeat(self.factor, axis=1).repeat(self.factor, axis=2)


class Activation(nnx.Module):
    """An activation function as a layer, because diffusers counts it as one in its parameter names."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.name](x)


def _conv(size: int, inputs: int, outputs: int, dtype: Any, bias: bool = True) -> nnx.Conv:
    return nnx.Conv(
        inputs, outputs, (size, size), padding="SAME", use_bias=bias, dtype=dtype, param_dtype=dtype,
        rngs=nnx.Rngs(0),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- AutoencoderKL


class Resnet(nnx.Module):
    """diffusers' `ResnetBlock2D` without time embedding: norm, act, conv, twice, plus the input."""

    def __init__(self, inputs: int, outputs: int, config: KlConfig, dtype: Any):
        self.act_fn = config.act_fn
        self.norm1 = GroupNorm(inputs, config.norm_num_groups, dtype)
        self.conv1 = _conv(3, inputs, outputs, dtype)
        self.norm2 = GroupNorm(outputs, config.norm_num_groups, dtype)
        self.conv2 = _conv(3, outputs, outputs, dtype)
        if inputs != outputs:
            self.conv_shortcut = _conv(1, inputs, outputs, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(x), x)

    def first(self, x: jax.Array, moments: Moments | None = None) -> jax.Array:
        """The first half, [B, H, W, inputs] to [B, H, W, outputs]."""
        return self.conv1(ACTIVATIONS[self.act_fn](self.norm1(x, moments)))

    def second(self, y: jax.Array, x: jax.Array, moments: Moments | None = None) -> jax.Array:
        """The second half: y of `first` (and its moments) and x again, to [B, H, W, outputs]."""
        y = self.conv2(ACTIVATIONS[self.act_fn](self.norm2(y, moments)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nnx.Module):
    """One head over all positions of [B, h, w, C], plus the input. Memory is linear in the positions."""

    def __init__(self, channels: int, config: KlConfig, dtype: Any):
        linear = functools.partial(nnx.Linear, channels, channels, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        self.group_norm = GroupNorm(channels, config.norm_num_groups, dtype)
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.to_out = nnx.List([linear()])

    def __call__(self, x: jax.Array) -> jax.Array:
        normed = self.group_norm(x)
        return x + jnp.stack([self._image(image) for image in normed])

    def _image(self, x_hwC: jax.Array) -> jax.Array:
        h, w, C = x_hwC.shape
        x_NC = x_hwC.reshape(h * w, C)
        q_NC, k_NC, v_NC = self.to_q(x_NC), self.to_k(x_NC), self.to_v(x_NC)

        def one_query(q_C: jax.Array) -> jax.Array:
            scores_N = jnp.dot(k_NC, q_C, preferred_element_type=jnp.float32) / math.sqrt(C)
            return jax.nn.softmax(scores_N).astype(v_NC.dtype) @ v_NC

        # All scores of a 1024 px image would take 1 GiB; the batch size turns the products into matrix ones.
        y_NC = jax.lax.map(one_query, q_NC, batch_size=max(1, SCORES // (h * w)))
        return self.to_out[0](y_NC).reshape(h, w, C)


class MidBlock(nnx.Module):
    """Resnet, attention (if the config has it), resnet."""

    def __init__(self, channels: int, config: KlConfig, dtype: Any):
        self.resnets = nnx.List([Resnet(channels, channels, config, dtype) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, config, dtype)] if config.mid_block_add_attention else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class UpsampleConv(nnx.Module):
    """Doubles [B, H, W, C] and smooths it with a convolution."""

    def __init__(self, channels: int, dtype: Any):
        self.upsample = Upsample(2)
        self.conv = _conv(3, channels, channels, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(self.upsample(x))


class UpBlock(nnx.Module):
    """diffusers' `UpDecoderBlock2D`: resnets, then (but in the last block) an enlargement."""

    def __init__(self, inputs: int, outputs: int, config: KlConfig, dtype: Any, last: bool):
        self.resnets = nnx.List(
            [Resnet(inputs if i == 0 else outputs, outputs, config, dtype) for i in range(config.layers_per_block + 1)]
        )
        self.upsamplers = nnx.List([] if last else [UpsampleConv(outputs, dtype)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class KlStack(nnx.Module):
    """The layers that diffusers calls `AutoencoderKL.decoder`; `KlDecoder` runs them."""

    def __init__(self, config: KlConfig, dtype: Any):
        widths = config.decoder_widths[::-1]
        self.conv_in = _conv(3, config.latent_channels, widths[0], dtype)
        self.mid_block = MidBlock(widths[0], config, dtype)
        self.up_blocks = nnx.List(
            [
                UpBlock(widths[max(i - 1, 0)], width, config, dtype, last=i == len(widths) - 1)
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, dtype)
        self.conv_out = _conv(3, widths[-1], 3, dtype)


class LatentStatistics(nnx.Module):
    """diffusers' `bn` of an `AutoencoderKLFlux2`: mean and variance of each channel at each place of a patch, f32."""

    def __init__(self, config: Flux2Config):
        self.patch = config.patch_size
        self.epsilon = config.batch_norm_eps
        width = config.latent_channels * math.prod(self.patch)
        self.running_mean = nnx.Param(jnp.zeros(width, jnp.float32))
        self.running_var = nnx.Param(jnp.ones(width, jnp.float32))

    def restore(self, latents: jax.Array) -> jax.Array:
        """f32 [B, h, w, C] of mean 0 and variance 1 to the encoder's own values; h, w: multiples of the patch."""
        B, h, w, C = latents.shape
        rows, columns = self.patch

        def by_place(values: jax.Array) -> jax.Array:
            return values.reshape(C, rows, columns).transpose(1, 2, 0)[:, None]  # [rows, 1, columns, C]

        std = by_place(jnp.sqrt(self.running_var[...] + self.epsilon))
        patches = latents.reshape(B, h // rows, rows, w // columns, columns, C)
        return (patches * std + by_place(self.running_mean[...])).reshape(latents.shape)


class KlDecoder(nnx.Module):
    """The decoder of an `AutoencoderKL` or `AutoencoderKLFlux2`."""

    def __init__(self, config: KlConfig, dtype: Any):
        if isinstance(config, Flux2Config):
            self.bn = LatentStatistics(config)
        if config.use_post_quant_conv:
            self.post_quant_conv = _conv(1, config.latent_channels, config.latent_channels, dtype)
        self.decoder = KlStack(config, dtype)
        self.scaling_factor = config.scaling_factor
        self.shift_factor = config.shift_factor or 0.0
        self.dtype = dtype

    def head(self, latents: jax.Array) -> jax.Array:
        """f32 [B, h, w, latent_channels] after scale and shift, to features [B, h, w, C]."""
        if hasattr(self, "bn"):
            x = self.bn.restore(latents).astype(self.dtype)
        else:
            x = (latents / self.scaling_factor + self.shift_factor).astype(self.dtype)
        if hasattr(self, "post_quant_conv"):
            x = self.post_quant_conv(x)
        return self.decoder.mid_block(self.decoder.conv_in(x))

    def tail(self, features: jax.Array) -> jax.Array:
        """[B, h, w, C] to f32 images [B, h*factor, w*factor, 3], about [-1, 1], not clipped."""
        x = features
        for block in self.decoder.up_blocks:
            x = block(x)
        return self.to_image(x)

    def to_image(self, x: jax.Array, moments: Moments | None = None) -> jax.Array:
        """The layers after the last block: [B, H, W, C] to f32 [B, H, W, 3]."""
        x = jax.nn.silu(self.decoder.conv_norm_out(x, moments))  # diffusers: SiLU here whatever act_fn says
        return self.decoder.conv_out(x).astype(jnp.float32)


# ------------------------------------------------------------------------------------------- AutoencoderTiny


class TinyBlock(nnx.Module):
    """diffusers' `AutoencoderTinyBlock`: three convolutions plus the input, then ReLU."""

    def __init__(self, channels: int, act_fn: str, dtype: Any):
        conv = functools.partial(_conv, 3, channels, channels, dtype)
        self.conv = nnx.List([conv(), Activation(act_fn), conv(), Activation(act_fn), conv()])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for layer in self.conv:
            y = layer(y)
        return jax.nn.relu(x + y)


class TinyStack(nnx.Module):
    """The layers that diffusers calls `AutoencoderTiny.decoder`; `TinyDecoder` runs them."""

    def __init__(self, config: TinyConfig, dtype: Any):
        width = config.decoder_block_out_channels[0]
        layers = [_conv(3, config.latent_channels, width, dtype), Activation(config.act_fn)]
        for i, count in enumerate(config.num_decoder_blocks):
            layers += [TinyBlock(width, config.act_fn, dtype) for _ in range(count)]
            if i == len(config.num_decoder_blocks) - 1:
                layers.append(_conv(3, width, 3, dtype))
            else:
                layers.append(Upsample(config.upsampling_scaling_factor))
                layers.append(_conv(3, width, width, dtype, bias=False))
        self.layers = nnx.List(layers)


class TinyDecoder(nnx.Module):
    """The decoder of an `AutoencoderTiny`.

    Attributes:
      halo: how far, in latent positions, an output pixel sees. All layers are convolutions, so it sees no further.
    """

    def __init__(self, config: TinyConfig, dtype: Any):
        self.decoder = TinyStack(config, dtype)
        self.dtype = dtype
        reach, scale = 1.0, 1
        for i, count in enumerate(config.num_decoder_blocks):
            if i > 0:
                scale *= config.upsampling_scaling_factor
                reach += 1 / scale
            reach += 3 * count / scale
        self.halo = math.ceil(reach + 1 / scale)

    def head(self, latents: jax.Array) -> jax.Array:
        """f32 [B, h, w, latent_channels] to the same shape, softly clamped to ±3."""
        return (jnp.tanh(latents / 3) * 3).astype(self.dtype)

    def tail(self, features: jax.Array) -> jax.Array:
        """[B, h, w, latent_channels] to f32 images [B, h*factor, w*factor, 3], about [-1, 1], not clipped."""
        x = features
        for layer in self.decoder.layers:
            x = layer(x)
        return x.astype(jnp.float32) * 2 - 1
