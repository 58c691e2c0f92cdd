"""Draws pictures: `python -m fluxdit_jax.sample --workdir=RUN --prompt "..." --out picture.png`.

The weights are the run's EMA. The prompt goes through the text encoder that encoded the training captions,
and a reference picture through the same vision encoder; both are those of `preprocess/`. Each PNG carries its
recipe: `--recipe picture.png --out again.png` draws it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging as absl_logging
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from fluxdit_jax import command, devices, files, pictures, recipe, sampler
from fluxdit_jax.checkpoint import EMA, SHORT_EMA, CheckpointError, restore_ema
from fluxdit_jax.config import ConfigError, Settings, resolve
from fluxdit_jax.digest import tree_digest
from fluxdit_jax.generation import Generator, conditions
from fluxdit_jax.paths import expanded, given_path
from fluxdit_jax.prompts import SampleError, encode_prompts, encode_reference, read_prompts, read_reference
from fluxdit_jax.recipe import Recipe
from fluxdit_jax.records import DatasetError, Manifest
from fluxdit_jax.run_directory import RunError, RunLock, load_config, load_dataset
from fluxdit_jax.train_step import patch_statistics
from fluxdit_jax.untrusted import shown
from fluxdit_jax.vae import DecoderError, load_decoder
from preprocess import PreprocessError

USER_ERRORS = (
    SampleError, RunError, CheckpointError, ConfigError, DatasetError, DecoderError, PreprocessError, OSError,
)  # fmt: skip
# Of arguments that neither the command line nor a recipe gives.
DEFAULTS: dict[str, Any] = {
    "count": 1, "seed": 0, "steps": 32, "method": "heun", "guidance_text": 1.0, "guidance_vision": 1.0,
    "rescale": 0.0, "weights": EMA,
}  # fmt: skip
BATCH = 16  # pictures computed at once at most


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to draw: what it is asked to be, its size (height, width) in pixels, and its noise."""

    prompt: str
    size: tuple[int, int]
    seed: int


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The arguments, completed from the recipe and by defaults.

    `read_recipe` is the recipe or None; `given` names what the command line gives itself.
    """
    parser = argparse.ArgumentParser(prog="python -m fluxdit_jax.sample", description=__doc__.splitlines()[0])
    _add_arguments(parser.add_argument)
    arguments = parser.parse_args(argv)
    if arguments.prompts:
        arguments.prompt = [*(arguments.prompt or ()), *read_prompts(arguments.prompts)]
    values = vars(arguments)
    arguments.given = frozenset(name for name, value in values.items() if value is not None)
    arguments.read_recipe = recipe.read(arguments.recipe) if arguments.recipe else None
    taken = arguments.read_recipe.arguments if arguments.read_recipe else {}
    for name, value in (DEFAULTS | taken).items():
        if values[name] is None:
            values[name] = value
    if arguments.workdir is None:
        parser.error("give --workdir, or --recipe of a picture that names it")
    arguments.workdir = Path(arguments.workdir)
    for name in ("text", "vision"):
        scales = list(dict.fromkeys(values[f"sweep_{name}"] or ()))
        values[f"sweep_{name}"] = scales if len(scales) > 1 else None
        if len(scales) == 1:  # no sweep but the scale
            values[f"guidance_{name}"] = scales[0]
    _check_arguments(parser, arguments)
    return arguments


def _add_arguments(add: Any) -> None:
    add("--workdir", type=given_path, help="run directory of fluxdit_jax.train")
    add("--recipe", type=given_path, metavar="FILE.png", help="a picture or sheet of this program: draws it again; "
        "other arguments change what they name")  # fmt: skip
    add("--prompt", action="append", help="what to draw; may be given several times")
    add("--prompts", type=given_path, help="text file with one prompt per line")
    add("--reference", type=given_path, help="picture whose light and mood (vision vector) to take")
    add("--guidance-text", type=float, help="1, the default: the model itself; above: closer to the prompt")
    add("--guidance-vision", type=float, help="the same for the reference")
    add("--rescale", type=float, help="0 to 1: undoes the over-saturation of strong guidance; default: 0")
    add("--sweep-text", type=_scales, metavar="A,B,...", help="a sheet over these text scales instead")
    add("--sweep-vision", type=_scales, metavar="A,B,...", help="a sheet over these vision scales instead")
    add("--steps", type=int, help="solver steps; default: 32")
    add("--method", choices=sampler.METHODS, help="solver; heun, the default, costs two evaluations a step")
    add("--seed", type=int, help="seed of the first picture; the next ones count up; default: 0")
    add("--count", type=int, help="pictures per prompt; default: 1")
    add("--size", metavar="WIDTHxHEIGHT", help="in pixels, one of the run's buckets; default: the squarest")
    add("--step", type=int, help="which EMA weights; default: the newest")
    add(
        "--weights",
        choices=(EMA, SHORT_EMA),
        help="ema, the default; short_ema: of a run with ema.short_decay",
    )
    add("--vae", type=expanded, help="directory of the VAE, if it is not where the data set says")
    add("--text-encoder", type=expanded, help="directory or id of the text encoder, if it is not there")
    add("--vision-encoder", type=expanded, help="directory or id of the vision encoder, if it is not there")
    add("--out", type=given_path, required=True, help="PNG file; with several pictures their sheet, each one beside "
        "it. What is there is replaced")  # fmt: skip


def _check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not arguments.prompt:
        parser.error("give --prompt or --prompts, or --recipe")
    for prompt in arguments.prompt:
        if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
            parser.error(f"--prompt {prompt!r} is not UTF-8")
    if min(arguments.steps, arguments.count) < 1 or arguments.seed < 0:
        parser.error("--steps and --count must be at least 1, --seed at least 0")
    if arguments.seed + arguments.count * len(arguments.prompt) >= 2**31:
        parser.error("--seed must stay below 2**31, counted up for every picture")
    scales = [arguments.guidance_text, arguments.guidance_vision]
    if not all(map(math.isfinite, [*scales, *(arguments.sweep_text or ()), *(arguments.sweep_vision or ())])):
        parser.error("guidance scales must be finite numbers")
    if not 0 <= arguments.rescale <= 1:
        parser.error("--rescale must be between 0 and 1")
    if arguments.method not in sampler.METHODS or arguments.weights not in (EMA, SHORT_EMA):
        parser.error(
            f"--recipe {arguments.recipe}: it has another --method or --weights than this version knows"
        )
    if arguments.out.suffix.lower() != ".png":
        parser.error("--out must end in .png")


def _scales(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them") from error


def choose_size(wanted: str | None, manifest: Manifest) -> tuple[int, int]:
    """(height, width) in pixels: the bucket asked for, or the squarest. A reference sets the light, not the size.

    Args:
      wanted: "WIDTHxHEIGHT".
    """
    if wanted is None:
        return min(manifest.buckets, key=lambda size: (abs(np.log(size[1] / size[0])), -size[0] * size[1]))
    try:
        width, height = (int(side) for side in wanted.lower().split("x"))
    except ValueError as error:
        raise SampleError(f"--size is {wanted!r}; it must be WIDTHxHEIGHT in pixels, as 768x512") from error
    if (height, width) not in manifest.buckets:
        turned = (
            f"; the width comes first: {height}x{width} is one" if (width, height) in manifest.buckets else ""
        )
        known = ", ".join(f"{w}x{h}" for h, w in manifest.buckets)
        raise SampleError(
            f"--size {width}x{height} (width x height) is not a size this run was trained on{turned}. "
            f"It was trained on {known}"
        )
    return height, width


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
        files.require_writable(paths[0].parent, longest=max((path.name for path in paths), key=len))
    except OSError as error:
        raise SampleError(f"--out {paths[0]} cannot be written: {command.explain(error)}") from error


def sample(arguments: argparse.Namespace) -> list[np.ndarray]:
    """Draws what the arguments ask for; returns the pictures, uint8 [H, W, 3]."""
    again: Recipe | None = arguments.read_recipe
    if again is not None and not arguments.workdir.is_dir():
        where = shown(str(arguments.workdir))
        raise SampleError(
            f"--recipe {arguments.recipe}: its run {where} is not here; say where with --workdir"
        )
    config, manifest = load_config(arguments.workdir), load_dataset(arguments.workdir)
    settings = resolve(config, manifest)
    size = choose_size(arguments.size, manifest)
    requests = [
        Request(prompt, size, arguments.seed + number)
        for number, prompt in enumerate(p for p in arguments.prompt for _ in range(arguments.count))
    ]
    sweeping = bool(arguments.sweep_text or arguments.sweep_vision)
    check_out([arguments.out, *_outputs(arguments, 1 if sweeping else len(requests))])
    reference = read_reference(arguments.reference, manifest) if arguments.reference else None

    step, ema = restore_ema(arguments.workdir, arguments.step, folder=arguments.weights)
    digest = tree_digest(ema)
    print(f"weights: {shown(str(arguments.workdir / arguments.weights / str(step)))} (EMA, step {step})")
    if again is not None:
        recipe.check_weights(again, digest, bool(arguments.given & {"step", "weights"}), arguments.recipe)
    vector, told = _vector(arguments, reference, manifest, again)
    _note_untrained(config, arguments, vector)
    spec = _text_encoder(arguments, manifest)
    texts = encode_prompts(arguments.prompt, manifest, spec, settings.text_limit)
    decoder = load_decoder(manifest.vae, arguments.vae)
    made = Recipe(
        arguments={name: getattr(arguments, name) for name in recipe.ARGUMENTS}
        | {"size": f"{size[1]}x{size[0]}", "step": step, "workdir": str(arguments.workdir.absolute())},
        digest=digest,
        batch_size=again.batch_size if again and again.batch_size else min(BATCH, len(requests)),
        vector=vector,
        reference=told,
        circumstances=recipe.circumstances(settings, manifest, arguments.vae),
    )
    if again is not None:
        recipe.note_circumstances(again, made)
    drawn = _draw(arguments, settings, manifest, ema, decoder, requests, texts, made)
    lock = RunLock(arguments.out.parent, f".{arguments.out.name}.lock", temporary=True, option="--out")
    try:
        (_write_sweep if sweeping else _write)(arguments, requests, drawn, made)
    finally:
        lock.release()
    return [image for images in drawn.values() for image in images]


def _draw(
    arguments: argparse.Namespace,
    settings: Settings,
    manifest: Manifest,
    ema: Any,
    decoder: pictures.Decoder,
    requests: list[Request],
    texts: list[np.ndarray],
    made: Recipe,
) -> dict[tuple[float, float], list[np.ndarray]]:
    """Pictures of all requests by (vision scale, text scale)."""
    patch_pixels = settings.model.patch * manifest.vae.options["factor"]
    height, width = requests[0].size
    wanted = conditions(
        [text for text in texts for _ in range(arguments.count)],
        [made.vector] * len(requests),
        [(height // patch_pixels, width // patch_pixels)] * len(requests),
        settings.model.vision_width,
    )
    generator = Generator(
        settings.model,
        tokens=settings.tokens,
        text_tokens=settings.text_tokens,
        shift=settings.flow.shift,
        statistics=patch_statistics(manifest.latent_mean, manifest.latent_std, settings.model.patch),
        steps=arguments.steps,
        method=arguments.method,
        batch_size=made.batch_size,
    )
    params, noise = generator.cast(ema), generator.noise([request.seed for request in requests])
    sweep_text = arguments.sweep_text or [arguments.guidance_text]
    sweep_vision = arguments.sweep_vision or [arguments.guidance_vision]
    drawn: dict[tuple[float, float], list[np.ndarray]] = {}
    count = len(requests) * len(sweep_text) * len(sweep_vision)
    with tqdm(total=count, unit="image", disable=not sys.stderr.isatty()) as bar:
        for vision, text in itertools.product(sweep_vision, sweep_text):
            guidance = sampler.Guidance(text, vision, arguments.rescale)
            latents = generator.latents(params, wanted, noise, bar.update, guidance)
            drawn[vision, text] = pictures.decode_all(decoder, latents)
    return drawn


def _vector(
    arguments: argparse.Namespace,
    reference: tuple[np.ndarray, str] | None,
    manifest: Manifest,
    again: Recipe | None,
) -> tuple[np.ndarray | None, dict[str, str] | None]:
    """The vision vector, of --reference or of the recipe, and what the new recipe tells of its file."""
    if reference is not None:
        pixels, sha256 = reference
        told = {"path": str(arguments.reference.absolute()), "sha256": sha256}
        return encode_reference(pixels, manifest, arguments.vision_encoder), told
    if again is None or again.reference is None and again.vector is None:
        return None, None
    if again.vector is None:
        raise SampleError(
            f"--recipe {arguments.recipe}: an older version wrote it, without the vision vector. Its reference was "
            f"{shown(str(again.reference.get('path')))}; give it with --reference"
        )
    if len(again.vector) != manifest.vision.width:
        raise SampleError(
            f"--recipe {arguments.recipe}: its vision vector has {len(again.vector)} numbers, this run's have "
            f"{manifest.vision.width}; give --reference"
        )
    return again.vector, again.reference


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


def _note_untrained(config: ConfigDict, arguments: argparse.Namespace, vector: np.ndarray | None) -> None:
    if vector is None and not config.flow.drop_vision + config.flow.drop_both:
        print("note: this run never trained without a vision vector; without --reference expect little")
    scales = [arguments.guidance_text, arguments.guidance_vision]
    scales += [*(arguments.sweep_text or ()), *(arguments.sweep_vision or ())]
    if any(scale != 1.0 for scale in scales) and not config.flow.drop_both:
        print(
            "note: this run never trained without conditions (flow.drop_both=0); guidance has nothing to lean on"
        )


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
    sheet = pictures.grid(rows, row_titles=titles, column_titles=columns, cell=256)
    pictures.save(sheet, arguments.out, made.notes())
    print(f"{arguments.out}  {len(requests)} pictures at {len(texts)} x {len(visions)} guidance scales")


def _write(
    arguments: argparse.Namespace,
    requests: list[Request],
    drawn: dict[tuple[float, float], list[np.ndarray]],
    made: Recipe,
) -> None:
    (images,) = drawn.values()
    paths = _outputs(arguments, len(images))
    for request, pixels, path in zip(requests, images, paths, strict=True):
        notes = made.of_one(request.prompt, request.seed).notes()
        pictures.save(Image.fromarray(pixels), path, notes)
        print(f"{path}  {pixels.shape[1]}x{pixels.shape[0]}  seed {request.seed}  {request.prompt!r}")
    if len(images) > 1:
        rows = [images[i : i + arguments.count] for i in range(0, len(images), arguments.count)]
        sheet = pictures.grid(rows, row_titles=arguments.prompt, cell=256)
        pictures.save(sheet, arguments.out, made.notes())
        print(f"{arguments.out}  the sheet of all {len(images)}")


def main() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    devices.use_compilation_cache()

    def work() -> None:
        sample(parse_arguments(sys.argv[1:]))

    command.run(work, USER_ERRORS)


if __name__ == "__main__":
    main()
