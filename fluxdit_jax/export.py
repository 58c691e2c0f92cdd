"""Exports a run's EMA: `python -m fluxdit_jax.export --workdir=RUN --out=DIR`.

DIR gets `model.safetensors` (f32, names joined by dots; without what serves training alone), `config.json` (all that is
needed to use it, see `exported`) and `README.md`, a model card. `python -m fluxdit_jax.sample --model=DIR` draws from
it. Without --step the weights are the newest of `ema/` and of the resumable checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shlex
import shutil
from pathlib import Path

import numpy as np
from absl import logging as absl_logging
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.manifest import DatasetError, Manifest
from fluxdit_jax.gate.requirement import is_of
from fluxdit_jax.run.checkpoint import EMA, SHORT_EMA, CheckpointError
from fluxdit_jax.run.run_directory import RunError, RunLock, load_stage
from fluxdit_jax.run.weights import Weights, restore_weights
from fluxdit_jax.sampling.exported import DESCRIPTION, WEIGHTS, ExportError, describe, flatten
from fluxdit_jax.sampling.sizes import in_words, pictures_by_size
from fluxdit_jax.settings import Settings, resolve
from fluxdit_jax.shared import atomic_files, cli
from fluxdit_jax.shared.paths import given_path

log = logging.getLogger(__name__)

WORK = ".export"  # everything is written in this folder of DIR and then moved


USER_ERRORS = (RunError, CheckpointError, ConfigError, DatasetError, ExportError, OSError)


def export(workdir: Path, out: Path, step: int | None = None, folder: str = EMA) -> Path:
    """Writes the EMA of `step` (None: the newest) and says which; returns the path of the weights.

    Args:
      folder: which average, see `restore_weights`.
    """
    atomic_files.require_writable(out)
    weights = restore_weights(workdir, step, folder)
    stage, manifest = load_stage(workdir, weights.step)
    settings = resolve(stage.config, manifest, stage.first)
    print(f"weights: {weights}")
    verdict = _verdict(workdir, weights)
    weights = weights.without_projector()
    tensors = flatten(weights.ema)
    texts = {
        "README.md": card(settings, manifest, weights, tensors, workdir, verdict),
        DESCRIPTION: json.dumps(describe(stage.config, settings, manifest, weights), indent=1) + "\n",
    }
    lock, work = RunLock(out, f"{WORK}/lock", temporary=True, option="--out"), out / WORK
    try:
        with cli.undoing(lambda: shutil.rmtree(work, ignore_errors=True)):
            _clear(work)  # of what a killed process left
            _write(work, tensors, {"format": "fluxdit_jax", "ema_step": str(weights.step)}, texts)
            # While config.json is missing nobody takes new weights with an old description for an export.
            (out / DESCRIPTION).unlink(missing_ok=True)
            for name in (WEIGHTS, *texts):
                (work / name).replace(out / name)
    finally:
        _clear(work)
        lock.release()
        with contextlib.suppress(OSError):  # the next one is in it already
            work.rmdir()
    return out / WEIGHTS


def _write(work: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str], texts: dict[str, str]) -> None:
    try:
        save_file(tensors, work / WEIGHTS, metadata=metadata)
    except SafetensorError as error:
        raise ExportError(f"{work / WEIGHTS}: {error}") from error
    for name, text in texts.items():
        atomic_files.write_whole(work / name, text)
    shutil.copymode(work / DESCRIPTION, work / WEIGHTS)  # safetensors makes its file for the owner alone


def _clear(work: Path) -> None:
    for path in work.iterdir():
        if path.name != "lock":
            path.unlink()


def card(
    settings: Settings,
    manifest: Manifest,
    weights: Weights,
    tensors: dict[str, np.ndarray],
    workdir: Path,
    verdict: str,
) -> str:
    """The model card, Markdown; `verdict` is what it says of the validation."""
    m = settings.model
    parameters = sum(tensor.size for tensor in tensors.values())
    average = "EMA" if weights.folder == EMA else "short EMA"
    held = [(size, count) for size, count in pictures_by_size(manifest).items() if count]
    sizes = ", ".join(f"{in_words(size)} ({count:,})" for size, count in held[:12])
    sizes += f" and {len(held) - 12} more in `{DESCRIPTION}`" if len(held) > 12 else ""
    dropout = ", ".join(f"{'+'.join(subset)} {share:g}" for subset, share in settings.flow.drop) or "none"
    further = "".join(
        f"| condition {name} | `{manifest.encoders[name].id}`, width {manifest.encoders[name].width} |\n"
        for name in manifest.further()
    )
    return f"""---
library_name: fluxdit_jax
pipeline_tag: text-to-image
tags: [diffusion, rectified-flow, dit]
---

# {workdir.name}

A text-to-image diffusion transformer trained from scratch with fluxdit_jax.

| | |
|---|---|
| weights | {average} of step {weights.step:,}, float32 |
| digest of the weights | `{weights.digest}` |
| parameters | {parameters / 1e6:.1f} M: width {m.width}, depth {m.depth}, heads {m.heads}, patch {m.patch} |
| trained on | {manifest.records("train"):,} images at {manifest.resolution} px |
| sizes, width x height (images) | {sizes} |
| VAE | `{manifest.vae.id}` (sha256 `{manifest.vae.sha256[:16]}`) |
| text encoder | `{manifest.text.id}` (sha256 `{manifest.text.sha256[:16]}`) |
| vision encoder | `{manifest.vision.id}` (sha256 `{manifest.vision.sha256[:16]}`) |
{further}| time shift | {settings.flow.shift:.3f} |
| condition dropout | {dropout} |
| validation | {verdict} |

    python -m fluxdit_jax.sample --model=DIR --prompt "..." --out picture.png

draws from this directory. `config.json` holds or names everything that sampling needs. The VAE, the text encoder and,
for a reference, the vision encoder are not in here: they are looked for under the names above, or where `--vae`,
`--text-encoder` and `--vision-encoder` say, and are checked by their digests.

The licences and the content of the
training images, which this card does not know, decide what the model may be used for.
"""


def _verdict(workdir: Path, weights: Weights) -> str:
    """What the run's validation says of these weights; a report of others of its weights says nothing of them."""
    path = workdir / "validation" / "report.json"
    if not path.exists():
        log.warning("%s does not exist: the card says that the model was not validated", path)
        return "not validated"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if is_of(report, weights.step, weights.digest, weights.folder):
            if not report["passed"]:
                log.warning("these weights failed the gate (%s), and the card says so", path)
            return "passed" if report["passed"] else "failed"
        measured = report.get("weights")
        other = measured.get("ema_step") if isinstance(measured, dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read: {error}; validate the run again, or move it away") from error
    if type(other) is not int:
        log.warning("%s does not say of which weights it is: the card says not validated", path)
        return "not validated (the report of this run does not say of which weights it is)"
    log.warning("%s is of other weights, of step %d: the card says that these were not validated", path, other)
    return f"not validated (other weights of this run were: those of step {other:,})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fluxdit_jax.export", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workdir", type=given_path, required=True, help="run directory of fluxdit_jax.train (required)")
    add("--out", type=given_path, required=True, help="directory to write (required)")
    add("--step", type=int, help="weights of this step; default: the newest, of ema/ or of a checkpoint")
    add("--weights", choices=(EMA, SHORT_EMA), default=EMA, help="which average; default: ema")
    arguments = parser.parse_args()
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING, force=True)

    def work() -> None:
        print(export(arguments.workdir, arguments.out, arguments.step, arguments.weights))
        out = shlex.quote(str(arguments.out))
        print(f"Draw from it: python -m fluxdit_jax.sample --model {out} --prompt TEXT --out FILE.png")

    cli.run(work, USER_ERRORS)


if __name__ == "__main__":
    main()
