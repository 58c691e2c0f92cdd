"""The weight-free encoders of `fluxdit_jax.portable.builtin` as encoders of a dataset: with an identity each."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np

from fluxdit_jax.dataset.manifest import EncoderIdentity
from fluxdit_jax.portable import builtin

BF16 = ml_dtypes.bfloat16
REVISION = "1"  # raised when the output of any of the three changes for the same input


def _identity(encoder: Any) -> EncoderIdentity:
    """The sha256 covers the encoder's options and its constant arrays."""
    digest = hashlib.sha256(
        json.dumps([encoder.name, REVISION, encoder.width, encoder.options], sort_keys=True).encode()
    )
    for array in encoder.constants:
        # In millionths: a last-bit difference in some platform's cosine must not make another encoder.
        digest.update(np.rint(array * 1e6).astype("<i8").tobytes())
    return EncoderIdentity(encoder.name, REVISION, digest.hexdigest(), "float32", encoder.width, encoder.options)


class DctVae(builtin.DctVae):
    """A `Vae` of 16 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = _identity(self)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] to bfloat16 [B, 16, H/8, W/8]; the DC of a white block is 2.

        Raises:
          ValueError: not uint8 RGB, or a side is not a multiple of 8.
        """
        return super().encode(images).astype(BF16)


class HashText(builtin.HashText):
    """A `TextEncoder` of width 1024."""

    def __init__(self, max_tokens: int = 512) -> None:
        super().__init__(max_tokens)
        self.identity = _identity(self)

    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """One bfloat16 [n, 1024] per caption, variance about 1; n counts an end token, so n >= 1."""
        return [tokens.astype(BF16) for tokens in super().encode(captions)]


class ToneVision(builtin.ToneVision):
    """A `VisionEncoder` of width 1024."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = _identity(self)
        self.also_patches = False  # it needs no preparing for them
