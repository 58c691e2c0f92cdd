"""The folder that an export is written to: that it holds nothing else, and what an older export has left in it."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

from fluxdit_jax.dataset.manifest import MANIFEST
from fluxdit_jax.exporting.diffusers_folder import INDEX
from fluxdit_jax.exporting.samples import FOLDER as SAMPLES
from fluxdit_jax.run.checkpoint import CHECKPOINTS, EMA
from fluxdit_jax.sampling.exported import DESCRIPTION, WEIGHTS, ExportError

WORK = ".export"  # everything is written in this folder of an export and then moved
CARD = "README.md"
_CODE = ("pipeline.py", "app.py", "requirements.txt", "transformer", "scheduler")
_ENCODERS = ("vae", "text_encoder", "tokenizer", "vision_encoder")


def require_place(out: Path, workdir: Path) -> None:
    """Checks that a folder has nothing that an export would replace, but an export, or what a killed one has left.

    Raises:
      ExportError: it has; the message names it.
    """
    if out.resolve() == workdir.resolve():
        raise ExportError(f"--out {out} is the run directory itself: give a folder of its own")
    if not out.is_dir():
        return
    for name in (CHECKPOINTS, EMA, MANIFEST):
        if (out / name).exists():
            raise ExportError(f"--out {out} is a run directory or a data set (it has {name}): give a folder of its own")
    if _is_export(out / DESCRIPTION) or _is_export(out / INDEX) or (out / WORK).exists():
        return
    for name in (DESCRIPTION, INDEX, WEIGHTS, CARD, *_CODE, *_ENCODERS, SAMPLES):
        if (out / name).exists():
            raise ExportError(
                f"--out {out} holds no export and has {name}, which would be replaced: give another folder"
            )


def remove_older(out: Path) -> None:
    """Removes what an export in a folder, of whatever format, has written there; one that was stopped here, the rest.

    Its description goes first, and tells from within `WORK` what else was its.
    """
    for name in (DESCRIPTION, INDEX):
        kept = out / WORK / name
        if _is_export(out / name):
            (out / name).replace(kept)
        if kept.exists():
            _remove(out, [CARD, *([WEIGHTS] if name == DESCRIPTION else [*_CODE, *_bundled(kept)])])
            for picture in (out / SAMPLES).glob("[0-9][0-9][0-9].png"):
                picture.unlink()
            with contextlib.suppress(OSError):  # it is not there, or holds more
                (out / SAMPLES).rmdir()
            kept.unlink()


def _bundled(index: Path) -> list[str]:
    said = json.loads(index.read_text(encoding="utf-8"))
    return [name for name in _ENCODERS if said.get(name, [None])[0] is not None]


def _is_export(description: Path) -> bool:
    """Whether a file describes an export: a run directory and others have a config.json as well."""
    said = description.read_text(encoding="utf-8", errors="replace") if description.is_file() else ""
    return '"ema_step"' in said or "FluxDiTPipeline" in said


def _remove(out: Path, names: list[str]) -> None:
    for path in (out / name for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
