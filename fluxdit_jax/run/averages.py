"""Averages on disk: EMA weights in `ema/<step>` and `short_ema/<step>` of a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from fluxdit_jax.run.checkpoint import DIGEST, EMA, CheckpointError, first_line
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.run.soundness import weights_fault


def ema_steps(workdir: Path, folder: str = EMA) -> list[int]:
    """Steps with EMA weights in a run directory, ascending."""
    return sorted(int(path.name) for path in (workdir / folder).glob("*") if path.name.isdigit())


def restore_ema(workdir: Path, step: int | None = None, folder: str = EMA) -> tuple[int, Any]:
    """Loads EMA weights as host numpy arrays: (step, nested dict of f32).

    Args:
      step: which; None takes the newest.
      folder: `EMA`, or `SHORT_EMA` for those with the shorter memory (config.ema.short_decay).

    Raises:
      CheckpointError: there are none, or not of that step, or they cannot be read or used.
    """
    steps = ema_steps(workdir, folder)
    if not steps:
        why = "train first, or wait for the first save" if folder == EMA else "set config.ema.short_decay"
        raise CheckpointError(f"{workdir / folder} has no weights yet: {why}")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise CheckpointError(f"{workdir / folder} has no step {step}; it has {', '.join(map(str, steps))}")
    return step, read_ema(workdir / folder / str(step))[0]


def read_ema(path: Path) -> tuple[Any, str]:
    """(EMA weights as host numpy arrays, their digest) of a directory that `save_ema` wrote.

    Raises:
      CheckpointError: they cannot be read or used.
    """
    path = path.absolute()
    try:
        with ocp.PyTreeCheckpointer() as reader:
            metadata = reader.metadata(path)
            shapes = metadata.item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            ema = reader.restore(path, restore_args=as_numpy)
        return ema, checked_digest(ema, (metadata.custom_metadata or {}).get(DIGEST))
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error


def checked_digest(ema: Any, written: str | None) -> str:
    """The digest of weights that were read; `OSError` if it is not the one that was written, or they are broken."""
    digest = tree_digest(ema)
    if written is not None and written != digest:
        raise OSError("its numbers are not those that were written")
    fault = weights_fault(ema)
    if fault:
        raise OSError(f"its EMA weights are broken: {fault}")
    return digest
