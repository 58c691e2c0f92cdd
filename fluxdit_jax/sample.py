"""Draws pictures: `python -m fluxdit_jax.sample --workdir=RUN --prompt "..." --out picture.png`.

The weights are the run's newest EMA, of `ema/` or of a resumable checkpoint, or those of an export (`--model=DIR`
instead of `--workdir`). The prompt goes through the text encoder that encoded the training captions,
and a reference picture through the same vision encoder; both are those of `preprocess/`. Each PNG carries its
recipe: `--recipe picture.png --out again.png` draws it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging as absl_logging
from PIL import Image
from tqdm import tqdm

from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.fields import CAPTION, field_named
from fluxdit_jax.dataset.manifest import DatasetError, Manifest
from fluxdit_jax.device import devices
from fluxdit_jax.run.checkpoint import CheckpointError
from fluxdit_jax.run.run_directory import RunError, RunLock, load_stage
from fluxdit_jax.run.weights import Weights, places, restore_weights, weights_digest
from fluxdit_jax.sampling import exported, recipe, solvers
from fluxdit_jax.sampling.arguments import parse_arguments
from fluxdit_jax.sampling.kept import Kept
from fluxdit_jax.sampling.pipeline import Generator, conditions
from fluxdit_jax.sampling.prompts import (
    SampleError,
    encode_prompts,
    encode_reference,
    read_condition,
    read_reference,
)
from fluxdit_jax.sampling.recipe import Recipe
from fluxdit_jax.sampling.sizes import choose_size, in_words
from fluxdit_jax.settings import Settings, resolve
from fluxdit_jax.shared import atomic_files, cli, image_grid
from fluxdit_jax.shared.sanitize import shown
from fluxdit_jax.vae.decoder import Decoder, decode_all, load_decoder
from fluxdit_jax.vae.files import DecoderError
from preprocess import PreprocessError

USER_ERRORS = (
    SampleError, RunError, CheckpointError, ConfigError, DatasetError, DecoderError, PreprocessError,
    exported.ExportError, OSError,
)  # fmt: skip
BATCH = 16  # pictures computed at once at most


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to draw: what it is asked to be, its size (height, width) in pixels, and its noise."""

    prompt: str
    size: tuple[int, int]
    seed: int


def _outputs(arguments: argparse.Namespace, count: int) -> list[Path]:
    """The file of each of several pictures, beside the sheet; that of one picture is --out itself."""
    out = arguments.out
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{number:03d}") for number in range(count)]


def check_out(paths: list[Path]) -> None:
    """Raises `SampleError` for what could only fail when the pictures are drawn."""
    for path in paths:
        if path.is_dir():
            raise SampleError(f"--out {path} is a folder; give the name of a PNG file")
    try:
        atomic_files.require_writable(paths[0].parent, longest=max((path.name for path in paths), key=len))
    except OSError as error:
        raise SampleError(f"--out {paths[0]} cannot be written: {cli.explain(error)}") from error


def sample(
    arguments: argparse.Namespace, kept: Kept | None = None, progress: Callable[[int], Any] | None = None
) -> list[np.ndarray]:
    """Draws what the arguments ask for; returns the pictures, uint8 [H, W, 3].

    Args:
      kept: what stays loaded for the next picture; None: nothing.
      progress: called with the number of pictures done after each batch; None: a progress bar on a terminal.
    """
    kept = Kept() if kept is None else kept
    again: Recipe | None = arguments.read_recipe
    settings, manifest, about = _description(arguments)
    size = choose_size(arguments.size, manifest)
    requests = [
        Request(prompt, size, arguments.seed + number)
        for number, prompt in enumerate(p for p in arguments.prompt for _ in range(arguments.count))
    ]
    sweeping = bool(arguments.sweep_text or arguments.sweep_vision)
    check_out([arguments.out, *_outputs(arguments, 1 if sweeping else len(requests))])
    reference = read_reference(arguments.reference, manifest) if arguments.reference else None

    weights = _weights(arguments, settings, about, kept)
    print(f"weights: {shown(str(weights))}")
    why = "" if arguments.size else ", the most common size of the training pictures; others by --size"
    print(f"size: {in_words(size)} (width x height){why}")
    digest = weights.without_projector().digest  # which an export has as well
    if again is not None:
        others = bool(arguments.given & {"step", "weights"})
        known = weights.digest if again.digest == weights.digest else digest
        recipe.check_weights(again, known, others, arguments.recipe)
    given, told = _given(arguments, reference, manifest, again, kept)
    _note_untrained(settings, arguments, given)
    spec = _text_encoder(arguments, manifest)
    texts = encode_prompts(arguments.prompt, manifest, spec, settings.text_limit, kept)
    decoder = kept_decoder(kept, manifest, arguments.vae)
    made = Recipe(
        arguments={name: getattr(arguments, name) for name in recipe.ARGUMENTS}
        | {"size": in_words(size), "step": weights.step, "weights": weights.folder}
        | {name: str(folder.absolute()) for name in ("workdir", "model") if (folder := getattr(arguments, name))},
        digest=digest,
        weights_path=str(weights.path.absolute()),
        batch_size=again.batch_size if again and again.batch_size else min(BATCH, len(requests)),
        given=given,
        reference=told,
        circumstances=recipe.circumstances(settings, manifest, arguments.vae),
    )
    if again is not None:
        recipe.note_circumstances(again, made)
    how = {"steps": arguments.steps, "batch_size": made.batch_size, "method": arguments.method}
    model = settings, manifest.latent_mean, manifest.latent_std
    generator = kept.get("generator", (*model, *how.values()), lambda: Generator.of(settings, manifest, **how))
    params = kept.get("params", (weights.digest, settings.model.dtype), lambda: generator.cast(weights.ema))
    lock = RunLock(arguments.out.parent, f".{arguments.out.name}.lock", temporary=True, option="--out")
    try:
        asked = [made.given | text for text in texts]
        drawn = _draw(arguments, generator, params, decoder, requests, asked, None if sweeping else made, progress)
        (_write_sweep if sweeping else _write_sheet)(arguments, requests, drawn, made)
    finally:
        lock.release()
    return [image for images in drawn.values() for image in images]


def kept_decoder(kept: Kept, manifest: Manifest, vae: str | None) -> Decoder:
    """The decoder of the dataset's VAE; `vae`: its directory, if it has moved."""
    return kept.get("decoder", (manifest.vae.id, manifest.vae.sha256, vae), lambda: load_decoder(manifest.vae, vae))


def _description(arguments: argparse.Namespace) -> tuple[Settings, Manifest, dict[str, Any]]:
    """(settings, manifest, what an export says of its weights or {}) of the run or the export."""
    folder = arguments.model or arguments.workdir
    if arguments.read_recipe is not None and not folder.is_dir():
        what, option = ("model", "--model") if arguments.model else ("run", "--workdir")
        raise SampleError(
            f"--recipe {arguments.recipe}: its {what} {shown(str(folder))} is not here; say where with {option}"
        )
    if arguments.model:
        return exported.read_description(folder)
    if (folder / exported.WEIGHTS).exists() and not (folder / "dataset.json").exists():
        raise SampleError(f"--workdir {folder} is an export, not a run directory: give it with --model")
    step = arguments.step if arguments.step is not None else max(places(folder, arguments.weights), default=0)
    stage, manifest = load_stage(folder, step)
    return resolve(stage.config, manifest, stage.first), manifest, {}


def _weights(arguments: argparse.Namespace, settings: Settings, about: dict[str, Any], kept: Kept) -> Weights:
    asked = arguments.given & {"step", "weights"}
    if arguments.model:
        for name, held in (("step", about["step"]), ("weights", about["folder"])):
            if name in asked and getattr(arguments, name) != held:
                raise SampleError(f"--{name} {getattr(arguments, name)}: the export {arguments.model} has {held}")
        key = arguments.model, about["digest"]
        return kept.get("weights", key, lambda: exported.read_weights(arguments.model, settings, about))
    try:
        path = places(arguments.workdir, arguments.weights).get(arguments.step)
        load = functools.partial(restore_weights, arguments.workdir, arguments.step, arguments.weights)
        if path is None:
            return load()
        return kept.get("weights", (path, arguments.weights, weights_digest(path, arguments.weights)), load)
    except CheckpointError as error:
        if arguments.read_recipe is None or asked:
            raise
        raise SampleError(
            f"--recipe {arguments.recipe}: its weights (step {arguments.step}, digest "
            f"{shown(arguments.read_recipe.digest[:12])}) are not there any more: {error}. If an export has them, give "
            "it with --model; --step draws with others"
        ) from error


def _draw(
    arguments: argparse.Namespace,
    generator: Generator,
    params: Any,
    decoder: Decoder,
    requests: list[Request],
    asked: list[dict[str, np.ndarray]],
    made: Recipe | None,
    progress: Callable[[int], Any] | None,
) -> dict[tuple[float, float], list[np.ndarray]]:
    """Pictures of all requests by (vision scale, text scale).

    Args:
      asked: the conditions of each prompt, by name.
      made: each picture is written as soon as it is drawn, with its part of this; None: none is.
    """
    height, width = requests[0].size
    patch_pixels = generator.patch * decoder.factor
    wanted = conditions(
        generator.conditions,
        [one for one in asked for _ in range(arguments.count)],
        [(height // patch_pixels, width // patch_pixels)] * len(requests),
    )
    noise = generator.noise([request.seed for request in requests])
    of_captions = [c.name for c in generator.conditions if field_named(c.name).made_from == CAPTION]
    sweep_text = arguments.sweep_text or [arguments.guidance_text]
    sweep_vision = arguments.sweep_vision or [arguments.guidance_vision]
    drawn: dict[tuple[float, float], list[np.ndarray]] = {}
    count = len(requests) * len(sweep_text) * len(sweep_vision)
    shown_live = sys.stderr.isatty()
    off = progress is not None or not (shown_live or count > BATCH)  # in a log a line now and then
    with tqdm(total=count, unit="image", disable=off, mininterval=0.1 if shown_live else 30) as bar:
        for vision, text in itertools.product(sweep_vision, sweep_text):
            scales = dict.fromkeys(of_captions, text) | {"vision": vision} | arguments.guidance
            guidance = solvers.Guidance(scales, arguments.rescale)
            done: dict[int, np.ndarray] = {}
            for latents in generator.batches(params, wanted, noise, guidance):
                pictures = dict(zip(latents, decode_all(decoder, list(latents.values())), strict=True))
                if made is not None:
                    _write(arguments, requests, pictures, made)
                done |= pictures
                (progress or bar.update)(len(pictures))
            drawn[vision, text] = [done[number] for number in range(len(requests))]
    return drawn


def _given(
    arguments: argparse.Namespace,
    reference: tuple[np.ndarray, str] | None,
    manifest: Manifest,
    again: Recipe | None,
    kept: Kept,
) -> tuple[dict[str, np.ndarray], dict[str, str] | None]:
    """The conditions besides the prompt, and what the new recipe tells of the reference's file.

    Those of the recipe, and instead of them what --reference and --condition give.
    """
    given, told = ({}, None) if again is None else (dict(again.given), again.reference)
    if reference is not None and "vision" in arguments.condition:
        raise SampleError("--reference and --condition vision=... both give the vision vector; give one")
    if unknown := arguments.guidance.keys() - set(manifest.further()):
        known = ", ".join(manifest.further()) or "none"
        raise SampleError(f"--guidance {min(unknown)}=...: the dataset's further conditions are: {known}")
    for name, path in arguments.condition.items():
        given[name] = read_condition(name, path, manifest)
    if reference is not None:
        pixels, sha256 = reference
        told = {"path": str(arguments.reference.absolute()), "sha256": sha256}
        given["vision"] = encode_reference(pixels, manifest, arguments.vision_encoder, kept)
    elif told is not None and "vision" not in given:
        raise SampleError(
            f"--recipe {arguments.recipe}: an older version wrote it, without the vision vector. Its reference was "
            f"{shown(str(told.get('path')))}; give it with --reference"
        )
    for name, values in given.items():
        if name not in manifest.conditions:
            raise SampleError(f"--recipe {arguments.recipe}: it has the condition {name}, which this run has not")
        width = manifest.encoders[name].width
        if values.shape[-1] != width:
            option = "--reference" if name == "vision" else f"--condition {name}=FILE.npy"
            raise SampleError(
                f"--recipe {arguments.recipe}: its {name} vector has {values.shape[-1]} numbers, this run's have "
                f"{width}; give {option}"
            )
    return given, told


def _text_encoder(arguments: argparse.Namespace, manifest: Manifest) -> str | None:
    """That of the command line, or of the recipe where that needs no download."""
    spec = arguments.text_encoder
    here = not spec or spec == manifest.text.id or spec.startswith("builtin:") or Path(spec).is_dir()
    if here or "text_encoder" in arguments.given:
        return spec
    raise SampleError(
        f"--recipe {arguments.recipe}: its text encoder {shown(spec)!r} is not here, and a recipe's is not fetched; "
        "give --text-encoder"
    )


def _note_untrained(settings: Settings, arguments: argparse.Namespace, given: dict[str, np.ndarray]) -> None:
    names = [condition.name for condition in settings.model.conditions]
    absent = [name for name in names if field_named(name).made_from != CAPTION and name not in given]
    if absent and not any(share and set(absent) <= set(subset) for subset, share in settings.flow.drop):
        without = " and ".join("--reference" if name == "vision" else f"--condition {name}" for name in absent)
        print(f"note: this model never trained without {' and '.join(absent)}; without {without} expect little")
    if "vision" not in given and (arguments.sweep_vision or arguments.guidance_vision != 1.0):
        print("note: the vision scale has no effect without a vector (--reference)")
    scales = [arguments.guidance_text, arguments.guidance_vision, *arguments.guidance.values()]
    scales += [*(arguments.sweep_text or ()), *(arguments.sweep_vision or ())]
    if any(scale != 1.0 for scale in scales) and not settings.flow.dropped(names):
        print("note: this model never trained without conditions (`all` in flow.drop); guidance has nothing to lean on")


def _write_sweep(
    arguments: argparse.Namespace,
    requests: list[Request],
    drawn: dict[tuple[float, float], list[np.ndarray]],
    made: Recipe,
) -> None:
    """A row for each request and vision scale, a column for each text scale."""
    visions, texts = (list(dict.fromkeys(scales)) for scales in zip(*drawn))
    rows, titles = [], []
    for number, request in enumerate(requests):
        for vision in visions:
            rows.append([drawn[vision, text][number] for text in texts])
            titles.append(f"vision {vision:g}, seed {request.seed}: {request.prompt}")
            print(f"row {len(rows)}  vision {vision:g}  seed {request.seed}  {request.prompt!r}")
    columns = [f"text {text:g}" for text in texts]
    sheet = image_grid.grid(rows, row_titles=titles, column_titles=columns, cell=256)
    image_grid.save(sheet, arguments.out, made.notes())
    pictures = "1 picture" if len(requests) == 1 else f"{len(requests)} pictures"
    print(f"{arguments.out}  {pictures} at {len(texts)} x {len(visions)} guidance scales")


def _write(
    arguments: argparse.Namespace, requests: list[Request], pictures: dict[int, np.ndarray], made: Recipe
) -> None:
    """Writes pictures, by the number of their request."""
    paths = _outputs(arguments, len(requests))
    for number, pixels in sorted(pictures.items()):
        request = requests[number]
        notes = made.of_one(request.prompt, request.seed).notes()
        image_grid.save(Image.fromarray(pixels), paths[number], notes)
        tqdm.write(f"{paths[number]}  {pixels.shape[1]}x{pixels.shape[0]}  seed {request.seed}  {request.prompt!r}")


def _write_sheet(
    arguments: argparse.Namespace,
    requests: list[Request],
    drawn: dict[tuple[float, float], list[np.ndarray]],
    made: Recipe,
) -> None:
    """A row for each prompt, if there are several pictures."""
    (images,) = drawn.values()
    if len(images) > 1:
        rows = [images[i : i + arguments.count] for i in range(0, len(requests), arguments.count)]
        sheet = image_grid.grid(rows, row_titles=arguments.prompt, cell=256)
        image_grid.save(sheet, arguments.out, made.notes())
        print(f"{arguments.out}  the sheet of all {len(images)}")


def main() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    devices.use_compilation_cache()

    def work() -> None:
        sample(parse_arguments(sys.argv[1:]))

    cli.run(work, USER_ERRORS)


if __name__ == "__main__":
    main()
