"""Decoding a picture too large for the device: layer by layer, in strips of rows, activations on the host.

Cutting the latent into tiles and decoding each by itself, as is usual, gives every tile its own group norm
statistics: on latents with large-scale structure the tiles come out in visibly different colours, whatever their
overlap. Here every layer
runs over the whole picture before the next one starts, so the statistics are those of the whole picture and the
result differs from the untiled one by rounding only. The price is the traffic of activations to and from the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from fluxdit_jax.vae.network import KlDecoder, Moments, Resnet, TinyDecoder, UpsampleConv, moments_of


def decode_in_strips(network: KlDecoder | TinyDecoder, features_1hwC: np.ndarray, values: int) -> np.ndarray:
    """`network.tail` of the features on the host, to f32 [h*factor, w*factor, 3].

    Args:
      network: with its weights.
      values: the most values that one layer's input or output strip may have (a strip has at least a few rows).
    """
    if isinstance(network, TinyDecoder):
        # No norms: the whole network is one "layer" that sees `halo` rows to either side.
        return by_strips(TinyDecoder.tail, network, (features_1hwC,), None, 0, values, network.halo)[0][0]
    stack = network.decoder
    groups = stack.conv_norm_out.groups
    run = functools.partial(by_strips, groups=groups, values=values)
    x = features_1hwC
    x_moments = _all_moments(x, groups)
    for block in stack.up_blocks:
        for resnet in block.resnets:
            y, y_moments = run(Resnet.first, resnet, (x,), x_moments)
            x, x_moments = run(Resnet.second, resnet, (y, x), y_moments)
        for upsampler in block.upsamplers:
            x, x_moments = run(UpsampleConv.__call__, upsampler, (x,), None)
    return by_strips(KlDecoder.to_image, network, (x,), x_moments, 0, values)[0][0]


_all_moments = jax.jit(moments_of, static_argnums=1)


def by_strips(
    layer: Callable[..., jax.Array],
    module: nnx.Module,
    inputs: tuple[np.ndarray, ...],
    moments: Moments | None,
    groups: int,
    values: int,
    halo: int = 1,
) -> tuple[np.ndarray, Moments | None]:
    """`layer(module, *inputs, moments)` on strips of rows.

    Strips are equal in height and overlap by twice the halo: one compiled program for a layer and an input shape. The
    outermost `halo` rows of a strip see a cut instead of their neighbours and are thrown away.

    Args:
      layer: [1, H, W, C] arrays to [1, H*scale, W*scale, D]; an output row sees `halo` input rows to either side.
      inputs: [1, H, W, C] on the host.
      moments: of the first input, if the layer takes them.
      groups: of which the output's moments are wanted; 0: not.

    Returns: the output on the host and its moments.
    """
    graph, state = nnx.split(module)
    _, H, W, _ = inputs[0].shape
    # Of the jitted function, because that remembers the trace.
    whole = _strip.eval_shape(layer, graph, groups, state, inputs, moments, (0, H))[0]
    scale = whole.shape[1] // H
    widest = max(scale**2 * whole.shape[-1], *(x.shape[-1] for x in inputs))
    rows = max(4 * halo, values // (W * widest))
    output, parts, counts = np.empty(whole.shape, whole.dtype), [], []
    for start, top, bottom in strips(H, rows, 2 * halo):
        windows = tuple(x[:, start : start + rows] for x in inputs)
        owned = ((top - start) * scale, (bottom - start) * scale)
        part, part_moments = _strip(layer, graph, groups, state, windows, moments, owned)
        output[:, top * scale : bottom * scale] = np.asarray(part)[:, owned[0] : owned[1]]
        parts.append(part_moments)
        counts.append(bottom - top)
    return output, pool_moments(parts, counts) if groups else None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _strip(
    layer: Callable[..., jax.Array],
    graph: nnx.GraphDef[Any],
    groups: int,
    state: nnx.State[Any, Any],
    windows: tuple[jax.Array, ...],
    moments: Moments | None,
    owned: tuple[int, int],
) -> tuple[jax.Array, Moments | None]:
    module = nnx.merge(graph, state)
    output = layer(module, *windows) if moments is None else layer(module, *windows, moments)
    return output, moments_of(output, groups, owned) if groups else None


def strips(side: int, height: int, overlap: int) -> list[tuple[int, int, int]]:
    """The fewest equal strips that cover `side`, neighbours sharing at least `overlap` rows.

    Returns: (start of the strip, first row that it owns, end of what it owns) for each. The owned rows make up the side
    and keep `overlap // 2` from a strip's edge unless that is the picture's edge.
    """
    if height >= side:
        return [(0, 0, side)]
    count = -(-(side - overlap) // (height - overlap))
    starts = [i * (side - height) // (count - 1) for i in range(count)]
    cuts = [0, *((above + height + below) // 2 for above, below in zip(starts, starts[1:])), side]
    return list(zip(starts, cuts, cuts[1:]))


def pool_moments(parts: list[Moments], counts: list[int]) -> Moments:
    """Moments of parts with these numbers of values to the moments of all together (in float64, returned as f32)."""
    share = (np.array(counts) / sum(counts))[:, None, None]
    means, variances = (np.stack([np.asarray(part[i], np.float64) for part in parts]) for i in range(2))
    mean = (share * means).sum(0)
    variance = (share * (variances + np.square(means - mean))).sum(0)
    return mean.astype(np.float32), variance.astype(np.float32)
