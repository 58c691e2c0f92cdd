"""The model card of an export, and what it may say of the validation."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.exporting.diffusers_folder import public
from fluxdit_jax.gate.requirement import is_of
from fluxdit_jax.run.checkpoint import EMA
from fluxdit_jax.run.weights import Weights
from fluxdit_jax.sampling.exported import ExportError
from fluxdit_jax.sampling.sizes import in_words, pictures_by_size
from fluxdit_jax.settings import Settings

log = logging.getLogger(__name__)


def card(
    settings: Settings,
    manifest: Manifest,
    weights: Weights,
    tensors: dict[str, np.ndarray],
    workdir: Path,
    *,
    verdict: str,
    usage: str,
    library: str = "fluxdit_jax",
    dtype: str = "float32",
    license: str | None = None,
    samples: Sequence[tuple[str, str]] = (),
) -> str:
    """The model card, Markdown.

    Args:
      verdict: what it says of the validation. usage: how to draw from it.
      license: its identifier on the Hub; None: the card says that it does not know.
      samples: (file, prompt) of the pictures shown.
    """
    m = settings.model
    parameters = sum(tensor.size for tensor in tensors.values())
    average = "EMA" if weights.folder == EMA else "short EMA"
    held = [(size, count) for size, count in pictures_by_size(manifest).items() if count]
    sizes = ", ".join(f"{in_words(size)} ({count:,})" for size, count in held[:12])
    sizes += f" and {len(held) - 12} more" if len(held) > 12 else ""
    dropout = ", ".join(f"{'+'.join(subset)} {share:g}" for subset, share in settings.flow.drop) or "none"
    further = "".join(
        f"| condition {name} | `{public(manifest.encoders[name].id)}`, width {manifest.encoders[name].width} |\n"
        for name in manifest.further()
    )
    terms = (
        f"Licence: {license}."
        if license
        else (
            "The licences and the content of the training images, which this card does not know, decide what the model "
            "may be used for."
        )
    )
    shown = "".join(f"| ![{_plain(prompt)}]({file}) | {_plain(prompt)} |\n" for file, prompt in samples)
    shown = f"| picture | prompt |\n|---|---|\n{shown}\n" if samples else ""
    return f"""---
library_name: {library}
pipeline_tag: text-to-image
tags: [diffusion, rectified-flow, dit]
{f"license: {license}" + chr(10) if license else ""}---

# {workdir.absolute().name}

A text-to-image diffusion transformer trained from scratch with fluxdit_jax.

| | |
|---|---|
| weights | {average} of step {weights.step:,}, {dtype} |
| digest of the weights | `{weights.digest}` |
| parameters | {parameters / 1e6:.1f} M: width {m.width}, depth {m.depth}, heads {m.heads}, patch {m.patch} |
| trained on | {manifest.records("train"):,} images at {manifest.resolution} px |
| sizes, width x height (images) | {sizes} |
| VAE | `{public(manifest.vae.id)}` (sha256 `{manifest.vae.sha256[:16]}`) |
| text encoder | `{public(manifest.text.id)}` (sha256 `{manifest.text.sha256[:16]}`) |
| vision encoder | `{public(manifest.vision.id)}` (sha256 `{manifest.vision.sha256[:16]}`) |
{further}| time shift | {settings.flow.shift:.3f} |
| condition dropout | {dropout} |
| validation | {verdict} |

{shown}{usage}

{terms}
"""


def verdict_of(workdir: Path, weights: Weights) -> str:
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


def _plain(prompt: str) -> str:
    """A prompt within a table's cell: on one line, without what Markdown or HTML would read."""
    return " ".join("".join(character for character in prompt if character not in "|<>[]`\\").split())
