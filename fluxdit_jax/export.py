"""Exports a run's EMA: `python -m fluxdit_jax.export --workdir=RUN --out=DIR`.

DIR gets `model.safetensors` (f32, names joined by dots), `config.json` (all that is needed to use it: network,
time shift, latent statistics, encoders, sizes) and `README.md`, a model card.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fluxdit_jax import command, files
from fluxdit_jax.checkpoint import EMA, SHORT_EMA, CheckpointError, restore_ema
from fluxdit_jax.config import ConfigError, Settings, resolve
from fluxdit_jax.digest import tree_digest
from fluxdit_jax.gate.requirement import is_of
from fluxdit_jax.paths import given_path
from fluxdit_jax.records import DatasetError, Manifest
from fluxdit_jax.run_directory import RunError, RunLock, load_config, load_dataset

log = logging.getLogger(__name__)

WORK = ".export"  # everything is written in this folder of DIR and then moved


class ExportError(Exception):
    """The weights cannot be written."""


USER_ERRORS = (RunError, CheckpointError, ConfigError, DatasetError, ExportError, OSError)


def export(workdir: Path, out: Path, step: int | None = None, folder: str = EMA) -> Path:
    """Writes the EMA of `step` (None: the newest) from `folder`; returns the path of the weights."""
    files.require_writable(out)
    config, manifest = load_config(workdir), load_dataset(workdir)
    settings = resolve(config, manifest)
    step, ema = restore_ema(workdir, step, folder=folder)
    tensors = flatten(ema)
    texts = {
        "README.md": card(settings, manifest, step, tensors, workdir, _verdict(workdir, step, ema, folder)),
        "config.json": json.dumps(describe(settings, manifest, step), indent=1) + "\n",
    }
    lock, work = RunLock(out, f"{WORK}/lock", temporary=True, option="--out"), out / WORK
    try:
        with command.undoing(lambda: shutil.rmtree(work, ignore_errors=True)):
            _clear(work)  # of what a killed process left
            _write(work, tensors, {"format": "fluxdit_jax", "ema_step": str(step)}, texts)
            # While config.json is missing nobody takes new weights with an old description for an export.
            (out / "config.json").unlink(missing_ok=True)
            for name in ("model.safetensors", *texts):
                (work / name).replace(out / name)
    finally:
        _clear(work)
        lock.release()
        with contextlib.suppress(OSError):  # the next one is in it already
            work.rmdir()
    return out / "model.safetensors"


def _write(
    work: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str], texts: dict[str, str]
) -> None:
    try:
        save_file(tensors, work / "model.safetensors", metadata=metadata)
    except SafetensorError as error:
        raise ExportError(f"{work / 'model.safetensors'}: {error}") from error
    for name, text in texts.items():
        files.write_whole(work / name, text)


def _clear(work: Path) -> None:
    for path in work.iterdir():
        if path.name != "lock":
            path.unlink()


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Nested dicts of arrays as {"blocks.mlp.down.kernel": array}, f32."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        ".".join(key.key for key in path): np.ascontiguousarray(leaf, np.float32) for path, leaf in leaves
    }


def describe(settings: Settings, manifest: Manifest, step: int) -> dict[str, Any]:
    """What `config.json` says."""
    encoders = {name: dataclasses.asdict(getattr(manifest, name)) for name in ("vae", "text", "vision")}
    return {
        "model": dataclasses.asdict(settings.model),
        "flow": {
            "shift": settings.flow.shift,
            "prediction": "velocity",
            "time": "1 is noise, 0 is the image",
        },
        "tokens": settings.tokens,
        "text_tokens": settings.text_tokens,
        "latent_mean": manifest.latent_mean,
        "latent_std": manifest.latent_std,
        "sizes": manifest.buckets,
        "encoders": encoders,
        "ema_step": step,
    }


def card(
    settings: Settings,
    manifest: Manifest,
    step: int,
    tensors: dict[str, np.ndarray],
    workdir: Path,
    verdict: str,
) -> str:
    """The model card, Markdown; `verdict` is what it says of the validation."""
    m = settings.model
    parameters = sum(tensor.size for tensor in tensors.values())
    f = settings.flow
    dropout = f"text {f.drop_text:g}, vision {f.drop_vision:g}, both {f.drop_both:g}"
    return f"""---
library_name: fluxdit_jax
pipeline_tag: text-to-image
tags: [diffusion, rectified-flow, dit]
---

# {workdir.name}

A text-to-image diffusion transformer trained from scratch with fluxdit_jax.

| | |
|---|---|
| weights | EMA of step {step:,}, float32 |
| parameters | {parameters / 1e6:.1f} M: width {m.width}, depth {m.depth}, heads {m.heads}, patch {m.patch} |
| trained on | {manifest.records("train"):,} images at {manifest.resolution} px |
| VAE | `{manifest.vae.id}` (sha256 `{manifest.vae.sha256[:16]}`) |
| text encoder | `{manifest.text.id}` (sha256 `{manifest.text.sha256[:16]}`) |
| vision encoder | `{manifest.vision.id}` (sha256 `{manifest.vision.sha256[:16]}`) |
| time shift | {settings.flow.shift:.3f} |
| condition dropout | {dropout} |
| validation | {verdict} |

`config.json` holds the latent statistics and everything else that sampling needs. The licences and the content of the
training images, which this card does not know, decide what the model may be used for.
"""


def _verdict(workdir: Path, step: int, ema: Any, folder: str) -> str:
    """What the run's validation says of these weights; a report of others of its weights says nothing of them."""
    path = workdir / "validation" / "report.json"
    if not path.exists():
        log.warning("%s does not exist: the card says that the model was not validated", path)
        return "not validated"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if is_of(report, step, tree_digest(ema), folder):
            return "passed" if report["passed"] else "failed"
        measured = report.get("weights")
        other = measured.get("ema_step") if isinstance(measured, dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(
            f"{path} cannot be read: {error}; validate the run again, or move it away"
        ) from error
    if type(other) is not int:
        log.warning("%s does not say of which weights it is: the card says not validated", path)
        return "not validated (the report of this run does not say of which weights it is)"
    log.warning(
        "%s is of other weights, of step %d: the card says that these were not validated", path, other
    )
    return f"not validated (other weights of this run were: those of step {other:,})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fluxdit_jax.export", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workdir", type=given_path, required=True, help="run directory of fluxdit_jax.train"
    )
    parser.add_argument("--out", type=given_path, required=True, help="directory to write")
    parser.add_argument("--step", type=int, help="which EMA weights; default: the newest")
    parser.add_argument("--weights", choices=(EMA, SHORT_EMA), default=EMA, help="which average")
    arguments = parser.parse_args()
    absl_logging.set_verbosity(absl_logging.WARNING)
    command.run(
        lambda: print(export(arguments.workdir, arguments.out, arguments.step, arguments.weights)),
        USER_ERRORS,
    )


if __name__ == "__main__":
    main()
