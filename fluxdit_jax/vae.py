"""Decoding latents to images on the training machine, without PyTorch.

    decoder = load_decoder(manifest.vae)
    images = decoder.decode(latents)  # float [B, C, h, w] -> uint8 [B, h*factor, w*factor, 3]

The decoder is the one whose encoder made the data set: an `AutoencoderKL` (Flux, Stable Diffusion) or
`AutoencoderTiny` in diffusers' format, or `builtin:dct`. Latents are those of the data set: VAE space after
the VAE's own shift and scale, with the data set's normalisation already undone.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from fluxdit_jax.records import EncoderIdentity
from fluxdit_jax.vae_files import (
    DecoderError,
    find_directory,
    hash_files,
    read_config,
    read_params,
    weight_files,
)
from fluxdit_jax.vae_network import KlConfig, KlDecoder, TileMoments, TinyConfig, TinyDecoder

TILE = 128  # latent positions: a 1024 px image of an 8x VAE is decoded whole
SETTLED = 1e-3  # change of the tiles' pooled statistics, in standard deviations, below which passes end
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Decoder(Protocol):
    """Anything that turns latents into images.

    Attributes:
      factor: pixels per latent side.
      channels: latent channels.
    """

    factor: int
    channels: int

    def decode(self, latents: Any) -> np.ndarray:
        """float [B, channels, h, w] to uint8 [B, h*factor, w*factor, 3]."""
        ...


class NetworkDecoder:
    """A decoder network with its weights.

    One program is compiled per latent size (h, w), two when it is tiled, whatever the batch: images go through one
    at a time, so the batch does not change the memory needed either. A Flux decoder needs 160 KiB per latent
    position in float32: 2.5 GiB for 1024 x 1024 pixels.

    Attributes:
      factor: pixels per latent side.
      channels: latent channels.
      tile: latent side; more than tile*tile positions are decoded in tiles of at most this side.
      passes: passes over the tiles that the last tiled image took.
    """

    def __init__(
        self,
        network: KlDecoder | TinyDecoder,
        config: KlConfig | TinyConfig,
        params: nnx.State,
        tile: int = TILE,
    ):
        self.factor = config.factor
        self.channels = config.latent_channels
        self.tile = tile
        self.passes = 0
        self._overlap = 2 * network.halo
        self._moments_shape = (network.norms, 2, network.groups)
        self._params = params
        graph = nnx.graphdef(network)

        def whole(params: nnx.State, latents_1hwC: jax.Array) -> jax.Array:
            network = nnx.merge(graph, params)
            return network.tail(network.head(latents_1hwC))[0]

        def head(params: nnx.State, latents_1hwC: jax.Array) -> jax.Array:
            return nnx.merge(graph, params).head(latents_1hwC)

        def tail(
            params: nnx.State,
            features_1hwF: jax.Array,
            start: tuple,
            owned: tuple,
            given: jax.Array,
            known: jax.Array,
            size: tuple[int, int],
        ) -> tuple[jax.Array, jax.Array]:
            part = jax.lax.dynamic_slice(features_1hwF, (0, *start, 0), (1, *size, features_1hwF.shape[-1]))
            moments = TileMoments(size, owned, given, known)
            image = nnx.merge(graph, params).tail(part, moments)[0]
            return image, jnp.stack(moments.seen) if moments.seen else given

        self._whole = jax.jit(whole)
        self._head = jax.jit(head)
        self._tail = jax.jit(tail, static_argnames="size")

    def decode(self, latents: Any) -> np.ndarray:
        """float [B, channels, h, w] to uint8 [B, h*factor, w*factor, 3].

        An image with a value that is not finite comes out black, with a warning: a preview of a diverged model
        must not stop the run that would have reported it.

        Raises:
          ValueError: not a float array of `channels` channels.
        """
        images = self.decode_float(latents)
        bad = ~np.isfinite(images).all(axis=(1, 2, 3))
        if bad.any():
            warnings.warn(
                f"{int(bad.sum())} of {len(bad)} decoded images have values that are not finite and are drawn "
                f"black (rows {np.flatnonzero(bad).tolist()}): the latents or the VAE's weights are damaged, or "
                "the model has diverged",
                stacklevel=2,
            )
            images[bad] = -1
        return np.rint(np.clip(images * 127.5 + 127.5, 0, 255)).astype(np.uint8)

    def decode_float(self, latents: Any) -> np.ndarray:
        """float [B, channels, h, w] to float32 [B, h*factor, w*factor, 3], about [-1, 1], not clipped.

        Raises:
          ValueError: not a float array of `channels` channels.
        """
        latents_BChw = np.asarray(latents)
        is_float = latents_BChw.dtype.kind == "f" or latents_BChw.dtype == ml_dtypes.bfloat16
        if latents_BChw.ndim != 4 or latents_BChw.shape[1] != self.channels or not is_float:
            raise ValueError(
                f"the VAE decodes float latents [B, {self.channels}, h, w], "
                f"got {latents_BChw.dtype} {list(latents_BChw.shape)}"
            )
        B, _, h, w = latents_BChw.shape
        latents_BhwC = latents_BChw.astype(np.float32).transpose(0, 2, 3, 1)
        images = np.empty((B, h * self.factor, w * self.factor, 3), np.float32)
        for i in range(B):
            if h * w > self.tile**2:
                images[i] = self._decode_tiled(latents_BhwC[i : i + 1])
            else:
                images[i] = self._whole(self._params, latents_BhwC[i : i + 1])
        return images

    def _decode_tiled(self, latents_1hwC: np.ndarray) -> np.ndarray:
        """`head` on the whole, `tail` on tiles, equal to the untiled picture up to `SETTLED`.

        Neighbours overlap by twice the network's reach, so that in the part that a tile owns the convolutions see what
        they would see in the whole image; attention is in `head`. What is left are the group norms, which need the
        mean and variance over the whole image (taken per tile, they shift the colours of every tile). So each pass
        pools what the norms saw in all tiles, and the next pass uses that. Norm n is exact after n + 1 passes at
        the latest, because it depends on those before it alone; in practice a few passes settle all of them. All
        tiles of a pass share their statistics, so there is no seam to blend at any time.
        """
        _, h, w, _ = latents_1hwC.shape
        features = self._head(self._params, latents_1hwC)
        image = np.empty((h * self.factor, w * self.factor, 3), np.float32)
        moments = np.zeros(self._moments_shape, np.float32)
        for passes in range(1, len(moments) + 3):
            pooled = self._tile_pass(features, moments, passes > 1, image)
            # "not >=", so that a change that is not a number ends it too.
            settled = passes > 1 and not moments_change(moments, pooled) >= SETTLED
            if settled or not moments.size:
                break
            moments = pooled
        self.passes = passes
        return image

    def _tile_pass(
        self, features: jax.Array, given: np.ndarray, known: bool, image: np.ndarray
    ) -> np.ndarray:
        """Decodes all tiles into `image`; returns the pooled moments that the norms saw."""
        h, w = features.shape[1:3]
        size = (min(h, self.tile), min(w, self.tile))
        f = self.factor
        seen, areas = [], []
        for y, top, bottom in tile_rows(h, size[0], self._overlap):
            for x, left, right in tile_rows(w, size[1], self._overlap):
                owned = ((top - y, bottom - y), (left - x, right - x))
                part, moments = self._tail(self._params, features, (y, x), owned, given, known, size=size)
                rows, columns = (slice(first * f, last * f) for first, last in owned)
                image[top * f : bottom * f, left * f : right * f] = np.asarray(part)[rows, columns]
                seen.append(np.asarray(moments))
                areas.append((bottom - top) * (right - left))
        return pool_moments(np.stack(seen), np.array(areas))


def tile_rows(side: int, tile: int, overlap: int) -> list[tuple[int, int, int]]:
    """The fewest equal tiles that cover `side`, neighbours sharing at least `overlap`.

    Returns: (start of the tile, first position that it owns, end of what it owns) for each; the owned parts make up
    the side, and end at least `overlap // 2` inside a tile's edge unless that is the image's edge.
    """
    if tile >= side:
        return [(0, 0, side)]
    count = -(-(side - overlap) // (tile - overlap))
    starts = [i * (side - tile) // (count - 1) for i in range(count)]
    cuts = [0, *((a + tile + b) // 2 for a, b in zip(starts, starts[1:])), side]
    return list(zip(starts, cuts, cuts[1:]))


def pool_moments(moments: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Means and variances of parts, f32 [parts, norms, 2, groups], and their areas, to those of the whole."""
    share = (areas / areas.sum())[:, None, None]
    means, variances = moments[:, :, 0].astype(np.float64), moments[:, :, 1].astype(np.float64)
    mean = (share * means).sum(0)
    variance = (share * (variances + np.square(means - mean))).sum(0)
    return np.stack([mean, variance], axis=1).astype(np.float32)


def moments_change(old: np.ndarray, new: np.ndarray) -> float:
    """Largest change of a mean, or of a standard deviation, in standard deviations."""
    deviation = np.sqrt(new[:, 1]) + 1e-12
    mean = np.abs(new[:, 0] - old[:, 0]) / deviation
    return float(max(mean.max(), np.abs(1 - np.sqrt(old[:, 1]) / deviation).max()))


class BuiltinDecoder:
    """`builtin:dct`, on the host in numpy. Attributes as in `Decoder`."""

    def __init__(self) -> None:
        from preprocess.encoders.builtin import DctVae  # numpy only

        self._codec = DctVae()
        self.factor = self._codec.factor
        self.identity = self._codec.identity
        self.channels = self.identity.width

    def decode(self, latents: Any) -> np.ndarray:
        """float [B, channels, h, w] to uint8 [B, h*factor, w*factor, 3]."""
        return self._codec.decode(np.asarray(latents))


# --------------------------------------------------------------------------------------------------- loading


def load_decoder(
    identity: EncoderIdentity, path: str | None = None, dtype: str = "float32", tile: int = TILE
) -> Decoder:
    """The decoder that belongs to a data set's VAE.

    Args:
      identity: `manifest.vae`. Its id is `builtin:dct`, a local directory, or a Hugging Face id, which is looked for
        in the local cache first and downloaded only if it is not there.
      path: directory to take the decoder from instead; the files may lie in its `vae` subfolder.
      dtype: "float32" or "bfloat16": of the weights on the device and of the activations. Group norm statistics and
        softmax are f32 in both. On a GPU, f32 convolutions use XLA's default precision, TF32 where there is.
      tile: latent side above whose square an image is decoded in tiles.

    Raises:
      DecoderError: not found, incomplete, a weight missing, unexpected or of the wrong shape, an architecture that
        this decoder does not have, or one with other channels or factor than the identity's.
      ValueError: float16, another unknown dtype, or a tile too small for its overlap.
    """
    if dtype not in DTYPES:
        why = " (float16 overflows in this decoder's activations)" if dtype == "float16" else ""
        raise ValueError(f"VAE dtype must be float32 or bfloat16, got {dtype!r}{why}")
    if identity.id.startswith("builtin:"):
        return _load_builtin(identity, path)
    directory = find_directory(identity, path)
    network_class, config = read_config(directory)
    _check_config(directory, config, identity)
    files = weight_files(directory)
    sha256 = hash_files(files)
    if identity.sha256 and identity.sha256 != sha256:
        _warn_hash(identity, str(directory), sha256)
    network = nnx.eval_shape(lambda: network_class(config, DTYPES[dtype]))
    if tile <= 2 * network.halo:
        raise ValueError(f"tile must be above {2 * network.halo} latent positions for this VAE, got {tile}")
    return NetworkDecoder(network, config, read_params(files, network), tile)


def _check_config(directory: Path, config: KlConfig | TinyConfig, identity: EncoderIdentity) -> None:
    """Raises `DecoderError` if the VAE's latents are not the data set's."""
    ours: dict[str, Any] = {"channels": config.latent_channels, "factor": config.factor}
    if isinstance(config, KlConfig):
        ours |= {"scale": config.scaling_factor, "shift": config.shift_factor or 0.0}
    theirs = {"channels": identity.width} | {k: v for k, v in identity.options.items() if k in ours}
    wrong = [f"{key} {ours[key]} instead of {value}" for key, value in theirs.items() if ours[key] != value]
    if wrong:
        raise DecoderError(
            f"{directory}: this VAE has {', '.join(wrong)}, which the data set's VAE {identity.id!r} has; give "
            "the VAE that made the data set"
        )


def _load_builtin(identity: EncoderIdentity, path: str | None) -> BuiltinDecoder:
    if identity.id != "builtin:dct":
        raise DecoderError(f"unknown built-in VAE {identity.id!r}; there is only 'builtin:dct'")
    if path:
        raise DecoderError(
            f"the data set was encoded by 'builtin:dct', whose latents no VAE in {path!r} can decode; leave the "
            "VAE directory empty, or encode the data set with that VAE"
        )
    decoder = BuiltinDecoder()
    if identity.sha256 and identity.sha256 != decoder.identity.sha256:
        _warn_hash(identity, "this version's builtin:dct", decoder.identity.sha256)
    return decoder


def _warn_hash(identity: EncoderIdentity, found: str, sha256: str) -> None:
    warnings.warn(
        f"the data set was encoded by {identity.id!r} with weights of sha256 {identity.sha256}, the decoder comes "
        f"from {found} with sha256 {sha256}: pictures may differ from the data set's",
        stacklevel=3,
    )
