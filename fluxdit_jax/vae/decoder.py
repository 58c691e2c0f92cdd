"""Decoding latents to images on the training machine, without PyTorch.

    decoder = load_decoder(manifest.vae)
    images = decoder.decode(latents)  # float [B, C, h, w] -> uint8 [B, h*factor, w*factor, 3]

The decoder is the one whose encoder made the data set: an `AutoencoderKL` (Flux, Stable Diffusion),
`AutoencoderKLFlux2` or `AutoencoderTiny` in diffusers' format, or `builtin:dct`. Latents are those of the data
set: VAE space after the VAE's own shift and scale, with the data set's normalisation already undone.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from fluxdit_jax.dataset.manifest import EncoderIdentity
from fluxdit_jax.vae.files import (
    DecoderError,
    find_directory,
    hash_files,
    read_config,
    read_params,
    weight_files,
)
from fluxdit_jax.vae.network import KlDecoder, TinyDecoder
from fluxdit_jax.vae.settings import KlConfig, TinyConfig
from fluxdit_jax.vae.strips import decode_in_strips

WHOLE = 128 * 128  # latent positions: 1024 x 1024 pixels of an 8x VAE
STRIP = 2**26  # values: 256 MiB of f32
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

    Images go through one at a time, so one program is compiled per latent size (h, w) whatever the batch, and the batch
    does not change the memory needed. A Flux decoder needs 160 KiB per latent position in float32, 2.5 GiB for
    1024 x 1024 pixels, when it decodes an image whole; in strips (`strips`) it needs a fixed amount of
    device memory, has a program for each kind of layer and image size, and gives the same picture.

    Attributes:
      factor: pixels per latent side.
      channels: latent channels.
      whole: most latent positions (h * w) decoded whole; a larger image is decoded in strips.
      strip: most values of one layer's strip.
    """

    def __init__(
        self,
        network: KlDecoder | TinyDecoder,
        config: KlConfig | TinyConfig,
        params: nnx.State[Any, Any],
        whole: int = WHOLE,
        strip: int = STRIP,
    ):
        self.factor = config.factor
        self.channels = config.latent_channels
        self.whole = whole
        self.strip = strip
        graph = nnx.graphdef(network)
        self._params = params
        self._network = nnx.merge(graph, params)

        def head(params: nnx.State[Any, Any], latents_1hwC: jax.Array) -> jax.Array:
            return nnx.merge(graph, params).head(latents_1hwC)

        def both(params: nnx.State[Any, Any], latents_1hwC: jax.Array) -> jax.Array:
            network = nnx.merge(graph, params)
            return network.tail(network.head(latents_1hwC))

        self._head = jax.jit(head)
        self._both = jax.jit(both)

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
            one = latents_BhwC[i : i + 1]
            if h * w <= self.whole:
                images[i] = self._both(self._params, one)[0]
            else:
                features = np.asarray(self._head(self._params, one))
                images[i] = decode_in_strips(self._network, features, self.strip)
        return images


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


_AT_ONCE = 8  # pictures, which take 28 bytes a pixel meanwhile


def decode_all(decoder: Decoder, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Decodes latents [C, h, w] of mixed sizes, in order, uint8 [H, W, 3] each; those of one size a few at a time."""
    by_size = defaultdict(list)
    for position, latent in enumerate(latents):
        by_size[latent.shape].append(position)
    images: dict[int, np.ndarray] = {}
    for positions in by_size.values():
        for start in range(0, len(positions), _AT_ONCE):
            few = positions[start : start + _AT_ONCE]
            decoded = decoder.decode(np.stack([latents[p] for p in few]).astype(np.float32))
            images.update(zip(few, decoded, strict=True))
    return [images[p] for p in range(len(latents))]


# --------------------------------------------------------------------------------------------------- loading


def load_decoder(
    identity: EncoderIdentity, path: str | None = None, dtype: str = "float32", whole: int = WHOLE
) -> Decoder:
    """The decoder that belongs to a data set's VAE.

    Args:
      identity: `manifest.vae`. Its id is `builtin:dct`, a local directory, or a Hugging Face id, which is looked for
        in the local cache first and downloaded only if it is not there.
      path: directory to take the decoder from instead; the files may lie in its `vae` subfolder.
      dtype: "float32" or "bfloat16": of the weights on the device and of the activations. Group norm statistics and
        softmax are f32 in both. On a GPU, f32 convolutions use XLA's default precision, TF32 where there is.
      whole: latent positions (h * w) above which an image is decoded in strips, see `NetworkDecoder`.

    Raises:
      DecoderError: not found, incomplete, a weight missing, unexpected or of the wrong shape, an architecture that
        this decoder does not have, or one with other channels or factor than the identity's.
      ValueError: float16 or another unknown dtype.
    """
    if dtype not in DTYPES:
        why = " (float16 overflows in this decoder's activations)" if dtype == "float16" else ""
        raise ValueError(f"VAE dtype must be float32 or bfloat16, got {dtype!r}{why}")
    if identity.id.startswith("builtin:"):
        return _load_builtin(identity, path)
    directory, network_class, config = _found(identity, path)
    files = weight_files(directory)
    sha256 = hash_files(files)
    if identity.sha256 and identity.sha256 != sha256:
        _warn_hash(identity, str(directory), sha256)
    network = nnx.eval_shape(lambda: network_class(config, DTYPES[dtype]))
    return NetworkDecoder(network, config, read_params(files, network), whole)


def require_decoder(identity: EncoderIdentity, path: str | None = None) -> None:
    """Checks that there is a decoder that fits, without its weights; raises `DecoderError` as `load_decoder`."""
    if identity.id.startswith("builtin:"):
        _load_builtin(identity, path)
    else:
        _found(identity, path)


def _found(identity: EncoderIdentity, path: str | None) -> tuple[Path, type, KlConfig | TinyConfig]:
    """(directory, class and configuration of the network)."""
    directory = find_directory(identity, path)
    network_class, config = read_config(directory)
    _check_config(directory, config, identity)
    return directory, network_class, config


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
