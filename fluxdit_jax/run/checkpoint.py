"""Checkpoints of a run: resumable states, of which the latest few are kept, and EMA weights, kept for ever.

    checkpoints/<step>   one Orbax composite: `state` (masters, optimizer, EMA) and `meta` (JSON: data position)
    ema/<step>           one Orbax PyTree of nested dicts of f32 arrays, restorable without this project
    short_ema/<step>     the same of the second average, where there is one

Both carry a digest of their numbers, which is checked when they are read. Weights that are not finite, or absurdly
large, are never written, and never read as if they were good (see `soundness`).

Both are written in the background to a temporary name and renamed when complete, so a killed process leaves
either a whole checkpoint or none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fluxdit_jax.device.hosts import of_a_collective
from fluxdit_jax.run import history
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.run.run_directory import ways_on
from fluxdit_jax.run.signals import any_process
from fluxdit_jax.run.soundness import BrokenRun, state_fault, weights_fault
from fluxdit_jax.state import TrainState, shape_difference

log = logging.getLogger(__name__)
_TEMPORARY, DIGEST = "orbax-checkpoint-tmp", "digest"
_NONE = -1  # of `_Rotation.kept`
_KEPT = "kept"  # a checkpoint that does not make room for newer ones
AVERAGE_DIGEST = "{}_digest"  # of `ema`, of `short_ema`: beside the whole state's in a checkpoint's meta
CHECKPOINTS, EMA, SHORT_EMA, DAMAGED = "checkpoints", "ema", "short_ema", "damaged"  # the folders
_LOWER_RATE = "The learning rate is too high: lower optim.lr with --config.resume.allow_changes=True"
_copy = jax.jit(lambda leaf: leaf.copy())
_any_failed = False


def leaves_threads() -> bool:
    """Whether a save has failed in this process: Orbax's threads, no daemons, wait five minutes for its parts then."""
    return _any_failed


class CheckpointError(Exception):
    """No checkpoint can be restored, or it does not fit the configuration."""


@dataclasses.dataclass
class _Rotation(ocp.checkpoint_managers.PreservationPolicy):
    """Which checkpoints stay: the newest `keep`, and that of the step `kept`, `_NONE` for none; None: undecided."""

    keep: int
    kept: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        old = len(checkpoints) - self.keep
        return [number >= old or each.step == self.kept for number, each in enumerate(checkpoints)]


class Checkpoints:
    """Saves and restores one run's checkpoints. Use as a context manager, or `close` it."""

    def __init__(self, workdir: Path, keep: int, read_only: bool = False, saved: Callable[[Path], None] | None = None):
        """
        Args:
          keep: resumable checkpoints kept. read_only: touches nothing, not even what a killed process left.
          saved: called with each checkpoint that is complete.
        """
        self._saved = saved
        self._root = workdir.absolute()
        self._keep, self._read_only = keep, read_only
        self._pending: tuple[str, int] | None = None  # folder that is being written to, and the step: one at a time
        self._own: set[int] = set()  # steps of checkpoints that this object wrote or restored
        self._noted = read_only  # whether the history says that a checkpoint is complete
        self.failures = 0
        self._rotation = _Rotation(keep)
        if not read_only:
            (self._root / EMA).mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        """Makes the writers, and clears away what was not written to its end."""
        if not self._read_only and jax.process_index() == 0:
            for folder in (EMA, SHORT_EMA):
                for leftover in (self._root / folder).glob(f"*{_TEMPORARY}*"):
                    shutil.rmtree(leftover)
        self._manager = ocp.CheckpointManager(
            self._root / CHECKPOINTS,
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=None if self._read_only else self._rotation,
                cleanup_tmp_directories=not self._read_only,
                enable_async_checkpointing=True,
                read_only=self._read_only,
            ),
        )
        self._ema_saver = ocp.StandardCheckpointer()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> bool:
        """Starts writing a resumable checkpoint; False if that could not even start.

        The arrays are copied to the host before this returns, so that the state may be donated; the rest is
        done in the background. A failure, then or later, is logged and counted in `failures`: the run goes
        on with the last good checkpoint, and the next save is tried.

        A step that this object has saved or restored stays as it is.

        Raises:
          BrokenRun: the state cannot be used.
          CheckpointError: there is a checkpoint of this step, which is not of this object's run.
        """
        self.poll(wait=True)
        if step in self._manager.all_steps():
            if step not in self._own:
                raise CheckpointError(f"{self._root / CHECKPOINTS / str(step)} is there already: move it away")
            return True
        if fault := state_fault(state):
            raise BrokenRun(f"the state of step {step} is not saved: {fault}. {_LOWER_RATE}")
        self._own.add(step)
        meta = json.loads(json.dumps(meta))  # the caller's lists grow while it is being written
        for folder, average in ((EMA, state.ema), (SHORT_EMA, state.short_ema)):
            if average is not None:  # so that one average can be read, and checked, without the rest
                meta[AVERAGE_DIGEST.format(folder)] = tree_digest(average)
        if self._rotation.kept is not None:
            meta[_KEPT] = self._rotation.kept
        meta |= {DIGEST: tree_digest(state, meta)}
        return self._start(
            CHECKPOINTS,
            step,
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
            ),
        )

    def save_ema(self, step: int, ema: Any, folder: str = EMA) -> bool:
        """Starts writing `ema/<step>` (or of another `folder`), in the way of `save`.

        Raises:
          BrokenRun: the weights cannot be used.
          CheckpointError: there are other weights of this step.
        """
        self.poll(wait=True)
        path, digest = self._root / folder / str(step), tree_digest(ema)
        if path.exists():
            if ema_digest(self._root, step, folder) != digest:
                raise CheckpointError(f"{path} is there already, with other numbers: move it away")
            return True
        if fault := weights_fault(ema):
            raise BrokenRun(f"the EMA weights of step {step} are not saved: {fault}. {_LOWER_RATE}")

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            self._ema_saver.save(path, ema, custom_metadata={DIGEST: digest})

        return self._start(folder, step, write)

    def _moved(self, step: int) -> bool:
        """Whether the run directory has gone: writing would make another one in its place."""
        if gone := not (self._root / CHECKPOINTS).is_dir():
            self.failures += 1
            log.error("%s was moved or removed: step %d is not saved. Put it back: training goes on", self._root, step)
        return gone

    def save_averages(self, step: int, state: TrainState) -> None:
        """`save_ema` of each average that the state holds."""
        self.save_ema(step, state.ema)
        if state.short_ema is not None:
            self.save_ema(step, state.short_ema, SHORT_EMA)

    def _start(self, folder: str, step: int, save: Callable[[], object]) -> bool:
        try:
            if self._moved(step):
                return False
            save()
        except Exception as error:  # noqa: BLE001  Orbax raises whatever the file system raised
            self._failed(folder, step, error)
            return False
        self._pending = folder, step
        return True

    def poll(self, wait: bool = False) -> None:
        """Collects a finished write; with `wait`, waits for it.

        Orbax reports a full disk only here: not when the save is started, nor by `check_for_errors`.
        """
        if self._pending is None:
            return
        folder, step = self._pending
        if folder == CHECKPOINTS:
            writer, busy = self._manager, self._manager.is_saving_in_progress()
        else:
            writer, busy = self._ema_saver, not (self._root / folder / str(step)).exists()
        if busy and not wait:
            return
        self._pending = None
        try:
            writer.wait_until_finished()
        except Exception as error:  # noqa: BLE001  see above
            self._failed(folder, step, error)
            return
        if folder == CHECKPOINTS:
            self._note(step)
            if self._saved is not None:
                self._saved(self._root / CHECKPOINTS / str(step))

    def _note(self, step: int) -> None:
        """Says once in the run's history that a checkpoint is complete: from then on one must be there."""
        if self._noted or jax.process_index():
            return
        try:
            history.append(self._root, {"saved": step})
            self._noted = True
        except OSError as error:
            log.warning("cannot write to %s: %s", self._root / history.HISTORY, error.strerror)

    def _failed(self, folder: str, step: int, error: Exception) -> None:
        global _any_failed
        if of_a_collective(error):
            raise error  # not the disk
        self.failures += 1
        _any_failed = True
        log.error(
            "could not write %s/%d: %s. Training goes on; the checkpoints before it are intact and the next save "
            "is tried. Make space or mend the disk under %s",
            folder, step, first_line(error), self._root,
        )  # fmt: skip
        if jax.process_count() > 1:
            return  # new writers would wait for all processes, of which perhaps only this one failed
        # A writer that failed raises what is left of its errors at the next save, and its half-written files
        # go on filling the disk: start afresh. Nothing else is being written, as each save waits for the last.
        for writer in (self._manager, self._ema_saver):
            with contextlib.suppress(Exception):
                writer.close()
        self._open()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def keep_before(self, step: int, margin: int) -> int | None:
        """Keeps a checkpoint from before a step beside those that come, also after a restart: the newest that is at
        least `margin` steps older, or else the oldest.

        Returns its step if this call decides, which the first one does; None also if there is none.
        """
        if self._rotation.kept is not None:
            return None
        self.poll(wait=True)
        before = [each for each in self._manager.all_steps() if each < step]
        old = [each for each in before if each <= step - margin]
        self._rotation.kept = max(old) if old else min(before, default=_NONE)
        return self._rotation.kept if before else None

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest checkpoint that can be read; None if there is none at all.

        Args:
          abstract: the state as `jax.ShapeDtypeStruct` with shardings; the checkpoint may have been written
            on another mesh.

        A checkpoint that is damaged, or holds broken weights, is moved to `damaged/<step>`, unless this only reads; the
        one before it is taken, with an error in the log.

        Raises:
          CheckpointError: there are checkpoints and none can be restored, or one has other shapes.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: list[tuple[int, Exception]] = []
        for step in steps:
            try:
                self._check_shapes(step, abstract)
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()),
                )
                state, meta = restored["state"], restored["meta"]
                del restored
                if DIGEST not in meta:
                    raise OSError("it carries no digest of its numbers")
                if meta.pop(DIGEST) != tree_digest(state, meta):
                    raise OSError("its numbers are not those that were written")
                for folder in (EMA, SHORT_EMA):
                    meta.pop(AVERAGE_DIGEST.format(folder), None)
                self._rotation.kept = meta.pop(_KEPT, None)
                fault = state_fault(state)
                if fault:
                    raise OSError(fault)
            except Exception as error:  # noqa: BLE001  whatever reading a damaged file raises
                if isinstance(error, CheckpointError) or of_a_collective(error):
                    raise
                log.error("checkpoints/%d cannot be restored (%s); trying the one before", step, first_line(error))
                damaged.append((step, error))
                continue
            self._set_aside([step for step, _ in damaged])
            self._own.add(step)
            # Restored buffers may not be donatable; a copy made by XLA is (jax#18617). One leaf at a time, so
            # that a card never holds the state twice.
            leaves, structure = jax.tree.flatten(state)
            del state
            for number, leaf in enumerate(leaves):
                leaves[number] = _copy(leaf)
            return jax.tree.unflatten(structure, leaves), meta
        if damaged:
            listed = "; ".join(f"{step}: {first_line(error)}" for step, error in damaged)
            raise CheckpointError(
                f"none of the checkpoints in {self._root / CHECKPOINTS} can be restored ({listed}). "
                + ways_on(self._root)
            )
        return None

    def _check_shapes(self, step: int, abstract: TrainState) -> None:
        saved = self._manager.item_metadata(step)["state"]
        if not jax.tree.leaves(saved):
            raise OSError("the description of its arrays is missing")
        require_same_shapes(f"checkpoints/{step}", saved, abstract)

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged checkpoints away, if they are this run's own."""
        if self._read_only or not steps:
            return
        for step in steps if jax.process_index() == 0 else ():
            names = itertools.chain([f"{step}"], (f"{step}.{number}" for number in itertools.count(2)))
            target = next(path for name in names if not (path := self._root / DAMAGED / name).exists())
            target.parent.mkdir(exist_ok=True)
            (self._root / CHECKPOINTS / str(step)).rename(target)
            log.error("moved the damaged checkpoints/%d to %s", step, target)
        any_process([False])  # until process 0 has
        self._manager.reload()

    def close(self) -> None:
        """Waits for what is being written and releases the writers."""
        self.poll(wait=True)
        self._manager.close()
        self._ema_saver.close()


def checkpoint_steps(workdir: Path) -> list[int]:
    """Steps with a complete resumable checkpoint in a run directory, ascending. Raises `OSError`."""
    folder = workdir / CHECKPOINTS
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def ema_digest(workdir: Path, step: int, folder: str = EMA) -> str | None:
    """The digest that was written beside EMA weights; None if they carry none, or their description is damaged."""
    try:
        with ocp.PyTreeCheckpointer() as reader:
            metadata = reader.metadata((workdir / folder / str(step)).absolute())
        return (metadata.custom_metadata or {}).get(DIGEST)
    except Exception:  # noqa: BLE001  whatever reading a damaged file raises
        return None


def require_same_shapes(what: str, saved: Any, wanted: Any) -> None:
    """Raises `CheckpointError`, naming the first leaf that the trees do not share."""
    difference = shape_difference(saved, wanted)
    if difference:
        raise CheckpointError(f"{what} does not fit config.model, .alignment.block, .optim or .ema: {difference}")


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
