"""Draws pictures: `python -m fluxdit_jax.sample --workdir=RUN --prompt "..." --out picture.png`.

The weights are the run's EMA. The prompt goes through the text encoder that encoded the training captions,
and a reference picture through the same vision encoder; both are those of `preprocess/`.
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
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from fluxdit_jax import command, devices, pictures, sampler
from fluxdit_jax.checkpoint import EMA, SHORT_EMA, CheckpointError, restore_ema
from fluxdit_jax.config import ConfigError, resolve
from fluxdit_jax.generation import Generator, conditions
from fluxdit_jax.paths import expanded, given_path
from fluxdit_jax.records import DatasetError, EncoderIdentity, Manifest
from fluxdit_jax.run_directory import RunError, RunLock, load_config, load_dataset
from fluxdit_jax.train_step import patch_statistics
from fluxdit_jax.vae import DecoderError, load_decoder
from preprocess import PreprocessError

_MAX_PROMPTS = 10_000_000  # bytes of a file of prompts


class SampleError(Exception):
    """The request cannot be drawn; the message names the argument."""


USER_ERRORS = (
    SampleError, RunError, CheckpointError, ConfigError, DatasetError, DecoderError, PreprocessError, OSError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to draw: what it is asked to be, its size (height, width) in pixels, and its noise."""

    prompt: str
    size: tuple[int, int]
    seed: int


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fluxdit_jax.sample", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workdir", type=given_path, required=True, help="run directory of fluxdit_jax.train")
    add("--prompt", action="append", default=[], help="what to draw; may be given several times")
    add("--prompts", type=given_path, help="text file with one prompt per line")
    add("--reference", type=given_path, help="picture whose light and mood (vision vector) to take")
    add("--guidance-text", type=float, default=1.0, help="1: the model itself; above: closer to the prompt")
    add("--guidance-vision", type=float, default=1.0, help="the same for the reference")
    add("--rescale", type=float, default=0.0, help="0 to 1: undoes the over-saturation of strong guidance")
    add("--sweep-text", type=_scales, metavar="A,B,...", help="a sheet over these text scales instead")
    add("--sweep-vision", type=_scales, metavar="A,B,...", help="a sheet over these vision scales instead")
    add("--steps", type=int, default=32, help="solver steps")
    add("--method", choices=sampler.METHODS, default="heun", help="solver; heun costs two evaluations a step")
    add("--seed", type=int, default=0, help="seed of the first picture; the next ones count up")
    add("--count", type=int, default=1, help="pictures per prompt")
    add(
        "--size",
        help="HEIGHTxWIDTH in pixels, one of the run's buckets; default: the squarest",
    )
    add("--step", type=int, help="which EMA weights; default: the newest")
    add("--weights", choices=(EMA, SHORT_EMA), default=EMA, help="short_ema: of a run with ema.short_decay")
    add("--vae", type=expanded, help="directory of the VAE, if it is not where the data set says")
    add("--text-encoder", type=expanded, help="directory or id of the text encoder, likewise")
    add("--vision-encoder", type=expanded, help="directory or id of the vision encoder, likewise")
    add(
        "--out",
        type=given_path,
        required=True,
        help="PNG file; with several pictures their sheet, each one beside it",
    )
    arguments = parser.parse_args(argv)
    if arguments.prompts:
        arguments.prompt += read_prompts(arguments.prompts)
    if not arguments.prompt:
        parser.error("give --prompt or --prompts")
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
    if arguments.out.suffix.lower() != ".png":
        parser.error("--out must end in .png")
    return arguments


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty; raises `SampleError` if it is no UTF-8 text or too large."""
    try:
        if path.stat().st_size > _MAX_PROMPTS:
            raise SampleError(f"--prompts {path}: more than {_MAX_PROMPTS:,} bytes; split the file")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(
            f"--prompts {path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def _scales(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them") from error


def choose_size(wanted: str | None, manifest: Manifest) -> tuple[int, int]:
    """(height, width) in pixels: the bucket asked for, or the squarest. A reference sets the light, not the size."""
    if wanted is None:
        return min(manifest.buckets, key=lambda size: (abs(np.log(size[1] / size[0])), -size[0] * size[1]))
    try:
        height, width = (int(side) for side in wanted.lower().split("x"))
    except ValueError as error:
        raise SampleError(f"--size is {wanted!r}; it must be HEIGHTxWIDTH in pixels, as 512x768") from error
    if (height, width) not in manifest.buckets:
        known = ", ".join(f"{h}x{w}" for h, w in manifest.buckets)
        raise SampleError(f"--size {height}x{width} is not a size this run was trained on: {known}")
    return height, width


def check_encoder(found: EncoderIdentity, trained: EncoderIdentity, option: str) -> None:
    """Refuses an encoder other than the one the training set was made with.

    A data set of precomputed vectors does not know what made them; then the width must do, and a note is printed.
    """
    if not trained.sha256 and found.width == trained.width:
        print(
            f"note: the data set took its vectors as given; whether {found.id!r} made them cannot be checked"
        )
        return
    if (found.sha256, found.width) != (trained.sha256, trained.width):
        raise SampleError(
            f"the run was trained with {trained.id!r} (width {trained.width}, sha256 {trained.sha256[:12]}), but "
            f"{option} is {found.id!r} (width {found.width}, sha256 {found.sha256[:12]}): its vectors mean other things"
        )


def encode_prompts(prompts: list[str], manifest: Manifest, spec: str | None) -> list[np.ndarray]:
    """Text tokens bf16 [n, E] of each prompt, by the encoder of the training captions."""
    from preprocess.encoders import load_text_encoder

    encoder = load_text_encoder(
        spec or manifest.text.id,
        dtype=manifest.text.dtype,
        max_tokens=manifest.text.options.get("max_tokens", 512),
    )
    check_encoder(encoder.identity, manifest.text, "--text-encoder")
    return encoder.encode(prompts)


def encode_reference(path: Path, manifest: Manifest, spec: str | None) -> np.ndarray:
    """Vision vector f32 [V] of a picture, brought to its bucket and encoded as the training pictures were."""
    from preprocess import images
    from preprocess.buckets import nearest
    from preprocess.encoders import load_vision_encoder

    try:
        content = path.read_bytes()
        header = images.read_header(content, images.Limits())
        bucket = nearest(manifest.buckets, header.height, header.width)
        pixels = images.decode(content, header, bucket, manifest.fit).pixels
    except (OSError, images.Rejected) as error:
        raise SampleError(f"--reference {path}: {error}") from error
    encoder = load_vision_encoder(spec or manifest.vision.id, dtype=manifest.vision.dtype)
    check_encoder(encoder.identity, manifest.vision, "--vision-encoder")
    return encoder.encode(pixels[None])[0]


def sample(arguments: argparse.Namespace) -> list[np.ndarray]:
    """Draws what the arguments ask for; returns the pictures, uint8 [H, W, 3]."""
    config = load_config(arguments.workdir)
    manifest = load_dataset(arguments.workdir)
    settings = resolve(config, manifest)
    step, ema = restore_ema(arguments.workdir, arguments.step, folder=arguments.weights)
    print(f"weights: {arguments.workdir / arguments.weights / str(step)} (EMA, step {step})")

    vector = None
    if arguments.reference:
        vector = encode_reference(arguments.reference, manifest, arguments.vision_encoder)
    elif not config.flow.drop_vision + config.flow.drop_both:
        print("note: this run never trained without a vision vector; without --reference expect little")
    guided = any(
        scale != 1.0
        for scale in (
            arguments.guidance_text,
            arguments.guidance_vision,
            *(arguments.sweep_text or ()),
            *(arguments.sweep_vision or ()),
        )
    )
    if guided and not config.flow.drop_both:
        print(
            "note: this run never trained without conditions (flow.drop_both=0); guidance has nothing to lean on"
        )
    size = choose_size(arguments.size, manifest)
    texts = encode_prompts(arguments.prompt, manifest, arguments.text_encoder)

    requests = [
        Request(prompt, size, arguments.seed + number)
        for number, prompt in enumerate(p for p in arguments.prompt for _ in range(arguments.count))
    ]
    patch_pixels = settings.model.patch * manifest.vae.options["factor"]
    wanted = conditions(
        [text for text in texts for _ in range(arguments.count)],
        [vector] * len(requests),
        [(size[0] // patch_pixels, size[1] // patch_pixels)] * len(requests),
        settings.text_tokens,
        settings.model.vision_width,
    )
    decoder = load_decoder(manifest.vae, arguments.vae)
    generator = Generator(
        settings.model,
        tokens=settings.tokens,
        shift=settings.flow.shift,
        statistics=patch_statistics(manifest.latent_mean, manifest.latent_std, settings.model.patch),
        steps=arguments.steps,
        method=arguments.method,
        batch_size=min(16, len(requests)),
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
    lock = RunLock(arguments.out.parent, f".{arguments.out.name}.lock", temporary=True, option="--out")
    try:
        if len(drawn) > 1:
            _write_sweep(arguments, requests, drawn, sweep_text, sweep_vision)
            return [image for images in drawn.values() for image in images]
        (images,) = drawn.values()
        _write(arguments, requests, images, step)
        return images
    finally:
        lock.release()


def _write_sweep(
    arguments: argparse.Namespace,
    requests: list[Request],
    drawn: dict[tuple[float, float], list[np.ndarray]],
    sweep_text: list[float],
    sweep_vision: list[float],
) -> None:
    """A row for each request and vision scale, a column for each text scale."""
    rows, titles = [], []
    for number, request in enumerate(requests):
        for vision in sweep_vision:
            rows.append([drawn[vision, text][number] for text in sweep_text])
            titles.append(f"vision {vision:g}, seed {request.seed}: {request.prompt}")
    columns = [f"text {text:g}" for text in sweep_text]
    pictures.save(pictures.grid(rows, row_titles=titles, column_titles=columns, cell=256), arguments.out)
    print(
        f"{arguments.out}  {len(requests)} pictures at {len(sweep_text)} x {len(sweep_vision)} guidance scales"
    )


def _write(
    arguments: argparse.Namespace, requests: list[Request], images: list[np.ndarray], step: int
) -> None:
    single = len(images) == 1
    for number, (request, pixels) in enumerate(zip(requests, images, strict=True)):
        path = arguments.out if single else arguments.out.with_stem(f"{arguments.out.stem}-{number:03d}")
        pictures.save(Image.fromarray(pixels), path, _recipe(arguments, request, step))
        print(f"{path}  {pixels.shape[1]}x{pixels.shape[0]}  seed {request.seed}  {request.prompt!r}")
    if not single:
        rows = [images[i : i + arguments.count] for i in range(0, len(images), arguments.count)]
        pictures.save(pictures.grid(rows, row_titles=arguments.prompt, cell=256), arguments.out)
        print(f"{arguments.out}  the sheet of all {len(images)}")


def _recipe(arguments: argparse.Namespace, request: Request, step: int) -> PngImagePlugin.PngInfo:
    """How the picture was made, as PNG text."""
    recipe: dict[str, Any] = {
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": arguments.steps,
        "method": arguments.method,
        "guidance_text": arguments.guidance_text,
        "guidance_vision": arguments.guidance_vision,
        "weights": f"{arguments.workdir}/{arguments.weights}/{step}",
        "reference": arguments.reference or "",
    }
    info = PngImagePlugin.PngInfo()
    for name, value in recipe.items():
        info.add_itxt(name, str(value))
    return info


def main() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    devices.use_compilation_cache()

    def work() -> None:
        sample(parse_arguments(sys.argv[1:]))

    command.run(work, USER_ERRORS)


if __name__ == "__main__":
    main()
