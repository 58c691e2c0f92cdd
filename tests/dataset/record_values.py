"""A record as values that compare bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np

from fluxdit_jax.dataset.records import Record


def values(record: Record) -> dict[str, object]:
    """Its fields by name, arrays as their dtypes, shapes and bytes."""
    return {field.name: _plain(getattr(record, field.name)) for field in dataclasses.fields(Record)}


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value
