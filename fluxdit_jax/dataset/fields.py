"""What a record stores: every tensor, declared once.

`DECLARED` is the table. The record and its checks, the shards' features, the index, the manifest, what a build makes
again after a change, batches with their padding, and the network's conditions follow from it. Every field but the
latent and the cells is a *condition*: what the network is given besides the noisy latent and the time.

A name that is not in the table is that of a precomputed vector (`preprocess build --condition pose=DIR`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from fluxdit_jax.dataset.cells import factors_of

BF16, F32, INT8 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.int8)
# Kinds. A latent is [C, h, w], a sequence [n, E] with a length of its own, a vector [V] of unit L2 norm, cells are
# [n, V + 2] as `cells` packs them: a target of training, which the network is not given.
GRID, SEQUENCE, VECTOR, CELLS = "grid", "sequence", "vector", "cells"
_DTYPES = {GRID: BF16, SEQUENCE: BF16, VECTOR: F32, CELLS: INT8}
_SHAPES = {GRID: "[C, h, w]", SEQUENCE: "[n >= 1, width]", VECTOR: "[width]", CELLS: "[n >= 1, width]"}
IMAGE, CAPTION, FILE = "image", "caption", "file"  # what a tensor is made from
Layout = dict[str, "int | None"]  # of a shard's fields but the latent: the width of a row, None for a vector
_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
# Not names of further conditions: features and columns of a record, arrays of a batch, modules of the network, and
# `all` in the dropout.
_RESERVED = re.compile(
    r"all|bucket_height|bucket_width|caption|cells|content_hash|encoded_size|grid|height|index|key|latent|original_size|"
    r"patch|projector|replaced|row|shard|source|split|t|tokens|vae|weight|width|(other|keep|null|drop)_.*|.*_(id|length)"
)


@dataclasses.dataclass(frozen=True)
class Field:
    """A stored tensor.

    Attributes:
      name: in records, batches and parameters.
      kind: GRID (the latent), SEQUENCE, VECTOR or CELLS; it decides rank, dtype and check.
      made_from: IMAGE, CAPTION (of a picture with several captions there are several), or FILE: precomputed.
      maker: what makes it, in words.
    """

    name: str
    kind: str
    made_from: str
    maker: str

    @property
    def encoder(self) -> str:
        """Name of its encoder in the manifest: but for the latent its own."""
        return "vae" if self.kind == GRID else self.name

    @property
    def dtype(self) -> np.dtype:
        return _DTYPES[self.kind]

    @property
    def in_rows(self) -> bool:
        """Whether it is [n, width], with n of its own in every record."""
        return self.kind in (SEQUENCE, CELLS)

    def fault(self, array: np.ndarray) -> str | None:
        """What is wrong with an array of this field, None if nothing is."""
        shape = _SHAPES[self.kind]
        if array.ndim != shape.count(",") + 1 or array.dtype != self.dtype or 0 in array.shape:
            return f"must be {self.dtype} {shape}, got {array.dtype} {list(array.shape)}"
        if self.kind != VECTOR:
            finite = np.isfinite(factors_of(array)).all() if self.kind == CELLS else _all_finite(array)
            return None if finite else "has a value that is not finite"
        with np.errstate(all="ignore"):
            if abs(float(np.dot(array, array)) - 1.0) < 1.9e-3:  # clear in f32; borderline norms are taken in f64
                return None
        if not np.isfinite(array).all():
            return "has a value that is not finite"
        norm = float(np.linalg.norm(array.astype(np.float64)))
        return None if abs(norm - 1.0) <= 1e-3 else f"must have unit L2 norm, got {norm:.6f}"


LATENT = Field("latent", GRID, IMAGE, "VAE")
TEXT = Field("text", SEQUENCE, CAPTION, "text encoder")
VISION = Field("vision", VECTOR, IMAGE, "vision encoder")
PATCHES = Field("patches", CELLS, IMAGE, "vision encoder")
USUAL = (TEXT.name, VISION.name)  # the conditions that every dataset has
DECLARED = {field.name: field for field in (LATENT, TEXT, VISION, PATCHES)}


def field_named(name: str) -> Field:
    """The declared field of this name, or the precomputed vector of an undeclared one."""
    return DECLARED.get(name) or Field(name, VECTOR, FILE, f"--condition {name}")


def name_fault(name: str) -> str | None:
    """Why a further condition cannot have this name, None if it can."""
    if not _NAME.fullmatch(name):
        return "a name is at most 31 of a-z, 0-9 and _, and begins with a letter"
    if _RESERVED.fullmatch(name):
        return "the name is reserved"
    return None


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Names of fields in the order of the table, then the undeclared ones by name."""
    names = set(names)
    return (*(name for name in DECLARED if name in names), *sorted(names - DECLARED.keys()))


def conditions(layout: Layout) -> tuple[str, ...]:
    """Names of the conditions."""
    return tuple(name for name in layout if field_named(name).kind != CELLS)


def of_captions(layout: Layout) -> list[Field]:
    """The conditions that are made from captions."""
    return [field for field in map(field_named, ordered(layout)) if field.made_from == CAPTION]


def _all_finite(array_bf16: np.ndarray) -> bool:
    """Whether no exponent is all ones; on the bits, because bfloat16 has no fast `isfinite` in numpy.

    -inf and negative NaN are at least 0xFF80 as uint16; +inf and positive NaN are at least 0x7F80 as int16.
    """
    return array_bf16.view(np.uint16).max() < 0xFF80 and array_bf16.view(np.int16).max() < 0x7F80
