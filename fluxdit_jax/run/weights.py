"""Which weights of a run are drawn from, validated and exported: its newest EMA.

EMA weights are in two places: `ema/<step>`, kept for ever, and inside the resumable `checkpoints/<step>`, which a run
that is training writes more often and deletes again.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from fluxdit_jax.model.dit import PROJECTOR
from fluxdit_jax.run.averages import checked_digest, ema_steps, read_ema
from fluxdit_jax.run.checkpoint import (
    AVERAGE_DIGEST,
    CHECKPOINTS,
    EMA,
    CheckpointError,
    checkpoint_steps,
    ema_digest,
    first_line,
)
from fluxdit_jax.run.digest import tree_digest


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """EMA weights on the host.

    Attributes:
      ema: nested dict of f32 numpy arrays.
      step: optimizer steps behind them.
      folder: which average: `EMA` or `SHORT_EMA`.
      path: where they were read: RUN/ema/STEP, RUN/checkpoints/STEP or an export's directory.
      digest: `tree_digest` of `ema`.
      note: what else is to be said of them, in words; or "".
    """

    ema: Any
    step: int
    folder: str
    path: Path
    digest: str
    note: str = ""

    def without_projector(self) -> Weights:
        """These without the projector of a run with alignment, which serves training alone."""
        if PROJECTOR not in self.ema:
            return self
        ema = {name: part for name, part in self.ema.items() if name != PROJECTOR}
        return dataclasses.replace(self, ema=ema, digest=tree_digest(ema))

    def __str__(self) -> str:
        name = "EMA" if self.folder == EMA else "short EMA"
        return f"{self.path} ({name}, step {self.step}{self.note})"


def places(workdir: Path, folder: str = EMA) -> dict[int, Path]:
    """Where the EMA weights of each step are: `ema/<step>`, else `checkpoints/<step>`. Raises `OSError`."""
    resumable = {step: workdir / CHECKPOINTS / str(step) for step in checkpoint_steps(workdir)}
    if folder != EMA:  # a run without the short average has none in its checkpoints either
        resumable = {step: path for step, path in resumable.items() if _written_digest(path, folder)}
    return resumable | {step: workdir / folder / str(step) for step in ema_steps(workdir, folder)}


def weights_digest(path: Path, folder: str = EMA) -> str | None:
    """The digest that was written with the weights at a path of `places(workdir, folder)`; None if there is none."""
    if path.parent.name == CHECKPOINTS:
        return _written_digest(path, folder)
    return ema_digest(path.parent.parent, int(path.name), path.parent.name)


def restore_weights(workdir: Path, step: int | None = None, folder: str = EMA) -> Weights:
    """Loads EMA weights of a run, which may be training meanwhile.

    Args:
      step: which; None takes the newest. A checkpoint that training replaces while it is read is left for the newer.
      folder: `EMA`, or `SHORT_EMA` for those with the shorter memory (config.ema.short_decay).

    Raises:
      CheckpointError: there are none, or not of that step, or they cannot be read or used.
      OSError: the run directory cannot be read.
    """
    while True:
        found = places(workdir, folder)
        if not found:
            if not workdir.is_dir():
                raise CheckpointError(f"{workdir} does not exist: give the directory of a run")
            why = (
                "train first, or wait for the first checkpoint (config.checkpoint.minutes; Ctrl-C writes one too)"
                if folder == EMA
                else "a run has them if config.ema.short_decay is set from its start"
            )
            raise CheckpointError(f"{workdir} has no weights yet in {CHECKPOINTS}/ or {folder}/: {why}")
        chosen = max(found) if step is None else step
        if chosen not in found:
            listed = ", ".join(map(str, sorted(found)))
            raise CheckpointError(f"{workdir} has no step {chosen} in {CHECKPOINTS}/ or {folder}/; it has {listed}")
        try:
            return _read(workdir, chosen, found[chosen], folder)
        except CheckpointError as error:
            now = places(workdir, folder)
            if chosen in now and (step is not None or max(now) == chosen):
                others = ", ".join(map(str, sorted(now.keys() - {chosen})))
                there = f"; there are also those of steps {others}" if others else ""
                raise CheckpointError(f"{error}{there}") from error


def _read(workdir: Path, step: int, path: Path, folder: str) -> Weights:
    if path.parent.name != CHECKPOINTS:
        ema, digest = read_ema(path)
        return Weights(ema, step, folder, path, digest)
    try:
        ema = _read_average(path, folder)
        written = _meta(path).get(AVERAGE_DIGEST.format(folder))
        digest = checked_digest(ema, written)
    except Exception as error:  # whatever reading a damaged file raises
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    kept = ema_steps(workdir, folder)
    others = f"the newest in {folder}/ is of step {kept[-1]}" if kept else f"{folder}/ has none yet"
    unchecked = "" if written else "; an older version wrote it, without a digest to check them by"
    return Weights(
        ema,
        step,
        folder,
        path,
        digest,
        f", of the resumable checkpoint, which is deleted later; {others}{unchecked}",
    )


def _read_average(checkpoint: Path, folder: str) -> Any:
    """One average out of a training state; the rest is not read. Raises whatever reading raises."""
    path = (checkpoint / "state").absolute()
    reader = ocp.PyTreeCheckpointHandler()
    try:
        wanted = {folder: reader.metadata(path).tree[folder]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        return reader.restore(path, args=arguments)[folder]
    finally:
        reader.close()


def _written_digest(checkpoint: Path, folder: str) -> str | None:
    try:
        return _meta(checkpoint).get(AVERAGE_DIGEST.format(folder))
    except (OSError, ValueError, RecursionError):
        return None  # damaged, or being deleted; reading the weights tells


def _meta(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "meta" / "metadata"
    meta = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(meta, dict):
        raise ValueError(f"{path} is no JSON object")
    return meta
