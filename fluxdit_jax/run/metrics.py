"""What a run writes about itself: `metrics.jsonl`, TensorBoard, and the packing of device metrics."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxdit_jax.run.scalars import LAYOUT, on_board
from fluxdit_jax.run.summary_writer import SummaryWriter
from fluxdit_jax.run.tracker import Tracker
from fluxdit_jax.shared.atomic_files import Appended, write_whole

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
ACCUMULATE, PLAIN, UPDATE = "accumulate", "plain", "update"  # the programs of a step, whose metrics are packed


def pack(metrics: dict[str, Any]) -> jax.Array:
    """All metrics as one f32 vector: reading it costs one transfer from the device instead of one each."""
    return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(metrics)])


def unpack(values: np.ndarray, shapes: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `pack`, on the host, given the metrics' `jax.ShapeDtypeStruct` tree."""
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
    parts = np.split(np.asarray(values), ends[:-1])
    return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


class MetricsWriter:
    """Appends scalars to `metrics.jsonl` and TensorBoard alike.

    A resumed run writes the steps after its checkpoint again, so what an interrupted run had logged beyond
    `step` is dropped first: each step stands once in both. A disk that is full does not stop a run for them:
    see `atomic_files.Appended` and `SummaryWriter`.
    """

    def __init__(self, workdir: Path, step: int, enabled: bool = True, tracker: Tracker | None = None):
        """
        Args:
          step: the run's step now. enabled: False writes nothing (all processes of a run but one).
          tracker: gets scalars and pictures as well.
        """
        self._tracker = tracker
        path = workdir / METRICS if enabled else Path(os.devnull)
        first = _first(step)
        if enabled and path.exists():
            _drop_from(path, first)
        self._file = Appended(path)
        self._board = SummaryWriter(workdir / "tensorboard", first) if enabled else None
        if self._board is not None:
            self._board.layout(LAYOUT)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of JSON with `step` and the values; the same values as TensorBoard scalars (see `scalars`).

        A value that is not finite is written as null: JSON has no NaN.
        """
        finite = {name: float(v) if math.isfinite(v) else None for name, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        if self._board is not None:
            self._board.scalars(step, {on_board(name): value for name, value in values.items()})
        if self._tracker is not None:
            self._tracker.scalars(step, values)

    def text(self, step: int, name: str, text: str) -> None:
        """A message, under `name` in TensorBoard's text page and as a string in `metrics.jsonl`."""
        self._file.write(json.dumps({"step": step, name: text}) + "\n")
        if self._board is not None:
            self._board.text(step, name, text)

    def hyperparameters(self, values: dict[str, Any]) -> None:
        """The configuration, {"group.key": value}: a row of TensorBoard's HParams page, a table among its texts."""
        if self._board is not None:
            self._board.hyperparameters(values, [on_board(name)[0] for name in ("loss", "heldout_loss")])
            rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
            self._board.text(0, "config", f"| key | value |\n|---|---|\n{rows}")

    def image(self, step: int, name: str, image_HxWx3: np.ndarray) -> None:
        if self._board is not None:
            self._board.image(step, name, image_HxWx3)
        if self._tracker is not None:
            self._tracker.image(step, name, image_HxWx3)

    def close(self) -> None:
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()
        if self._board is not None:
            self._board.close()


def _first(step: int) -> int:
    """The first step whose lines a run writes that goes on from `step`: a new one says something before its first."""
    return step + 1 if step else 0


def beyond(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines that a run drops which goes on from `step`; those that cannot be read are not among them."""
    entries = _read(path)[0] if path.exists() else []
    return [entry for entry in entries if entry["step"] >= _first(step)]


def last_step(path: Path) -> int:
    """The last step of which a line of `metrics.jsonl` tells; 0 if there is none."""
    return max((entry["step"] for entry in _read(path)[0]), default=0) if path.exists() else 0


class LogError(ValueError):
    """`metrics.jsonl` is damaged; the message names the line."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, each with its `step`. A last line that a killed process left unfinished is ignored.

    Raises:
      LogError: another line is not an object of JSON with a step.
    """
    parsed, damaged = _read(path)
    if damaged:
        raise LogError(f"{damaged[0]}. The file is damaged there: take that line out, training itself does not need it")
    return parsed


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries that can be read, and a line of words for each that cannot."""
    lines = path.read_bytes().splitlines()
    parsed, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line.decode("utf-8"))
            if not isinstance(entry, dict) or type(entry.get("step")) is not int:
                raise ValueError("no object with a step")
            parsed.append(entry)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                damaged.append(f"{path} line {number} is not JSON: {error}")
    return parsed, damaged


def _drop_from(path: Path, step: int) -> None:
    """Rewrites the file without `step` and later. A damaged one is kept beside it: a log must not stop a run."""
    entries, damaged = _read(path)
    if damaged:
        aside = path.with_name(f"{path.stem}.damaged-{step}{path.suffix}")
        shutil.copyfile(path, aside)
        log.warning(
            "%s. The damaged file is kept as %s; the run goes on with the %d lines that can be read, without %d",
            *(damaged[0], aside, len(entries), len(damaged)),
        )
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in entries if entry["step"] < step))
