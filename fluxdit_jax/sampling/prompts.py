"""What a picture is asked to be, encoded: prompts and reference pictures, by the encoders of the training set.

The encoders are those of `preprocess/`, imported where they are needed.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np

from fluxdit_jax.dataset.fields import CAPTION, TEXT, Field, field_named, of_captions
from fluxdit_jax.dataset.manifest import EncoderIdentity, Manifest
from fluxdit_jax.sampling.kept import Kept

_MAX_PROMPTS = 10_000_000  # bytes of a file of prompts


class SampleError(Exception):
    """The request cannot be drawn; the message names the argument."""


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty; raises `SampleError` if it is no UTF-8 text or too large."""
    try:
        if path.stat().st_size > _MAX_PROMPTS:
            raise SampleError(f"--prompts {path}: more than {_MAX_PROMPTS:,} bytes; split the file")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(f"--prompts {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    if not (lines := [line.strip() for line in text.split("\n") if line.strip()]):
        raise SampleError(f"--prompts {path}: it has no line that is not empty")
    return lines


def check_encoder(found: EncoderIdentity, trained: EncoderIdentity, option: str) -> None:
    """Refuses an encoder other than the one the training set was made with.

    A data set of precomputed vectors does not know what made them; then the width must do, and a note is printed.
    """
    if not trained.sha256 and found.width == trained.width:
        print(f"note: the data set took its vectors as given; whether {found.id!r} made them cannot be checked")
        return
    if (found.sha256, found.width) != (trained.sha256, trained.width):
        raise SampleError(
            f"the run was trained with {trained.id!r} (width {trained.width}, sha256 {trained.sha256[:12]}), but "
            f"{option} is {found.id!r} (width {found.width}, sha256 {found.sha256[:12]}): its vectors mean other things"
        )


def encode_prompts(
    prompts: list[str], manifest: Manifest, spec: str | None, limit: int | None = None, kept: Kept | None = None
) -> list[dict[str, np.ndarray]]:
    """What is made from each prompt, by name of the condition, by the encoders of the training captions.

    Prints a note for each prompt that is cut, and for each that is longer than every caption of the training.

    Args:
      spec: of the encoder of "text"; None: as the data set names it.
      limit: `Settings.text_limit`: what training cuts the tokens of "text" to.
      kept: where the encoders stay loaded; None: they do not.
    """
    kept = Kept() if kept is None else kept
    made = {
        field.name: _encode(prompts, manifest, field, kept, *((spec, limit) if field == TEXT else (None, None)))
        for field in of_captions(manifest.layout)
    }
    return [dict(zip(made, parts, strict=True)) for parts in zip(*made.values(), strict=True)]


def _encode(
    prompts: list[str], manifest: Manifest, field: Field, kept: Kept, spec: str | None, limit: int | None
) -> list[np.ndarray]:
    from preprocess.encoders import load_text_encoder

    trained, longest = manifest.encoders[field.encoder], manifest.lengths[field.name]
    most = trained.options.get("max_tokens", 512)
    name, dtype = spec or trained.spec, trained.dtype
    encoder = kept.get(field.name, (name, dtype, most), lambda: load_text_encoder(name, dtype=dtype, max_tokens=most))
    check_encoder(encoder.identity, trained, "--text-encoder" if field == TEXT else f"the {field.maker}")
    texts = encoder.encode(prompts)
    for number, tokens in enumerate(encoder.count(prompts)):
        used, why = len(texts[number]), f"what the data set's {field.maker} takes (max_tokens={most})"
        if limit is not None and used > limit:
            used, why = limit, f"what this run cuts its captions to (config.data.text_tokens={limit})"
        which = f"note: prompt {number + 1} has {tokens} tokens"
        if used < tokens:
            print(f"{which}, of which {used} are kept, {why}: {_short(prompts[number])}")
        elif tokens > longest:
            print(
                f"{which}, more than any caption of the training (at most {longest}); all are used: "
                f"{_short(prompts[number])}"
            )
    return [text[:limit] for text in texts]


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else f"{prompt[:28]} ... {prompt[-28:]}")


def read_reference(path: Path, manifest: Manifest) -> tuple[np.ndarray, str]:
    """A picture as the vision encoder was given those of the training set, uint8 [H, W, 3], and the file's sha256.

    Raises:
      SampleError: it cannot be read or is no picture that can be used.
    """
    from preprocess.buckets import nearest
    from preprocess.decoding import images

    try:
        content = path.read_bytes()
        header = images.read_header(content, images.Limits(min_side=1, max_aspect=math.inf))  # the build had its own
        bucket = nearest(manifest.buckets, header.height, header.width)
        if manifest.vision_resolution:
            height, width = (side * manifest.vision_resolution // manifest.resolution for side in bucket)
            bucket = height, width
        sha256 = hashlib.sha256(content).hexdigest()
        pixels = images.decode(content, header, bucket, manifest.fit, noise_key=sha256).pixels
    except (OSError, images.Rejected) as error:
        raise SampleError(f"--reference {path}: {error}") from error
    return pixels, sha256


def read_condition(name: str, path: Path, manifest: Manifest) -> np.ndarray:
    """A condition that is not made from the caption, from a `.npy` file as `build` reads it; raises `SampleError`."""
    from preprocess.decoding.images import Rejected
    from preprocess.input.precomputed import MAX_BYTES, parse

    besides = [each for each in manifest.conditions if field_named(each).made_from != CAPTION]
    if name not in besides:
        known = ", ".join(besides)
        raise SampleError(f"--condition {name}={path}: the dataset's conditions besides the caption are: {known}")
    try:
        with path.open("rb") as file:
            return parse(file.read(MAX_BYTES + 1), field_named(name), manifest.encoders[name].width)
    except (OSError, Rejected) as error:
        raise SampleError(f"--condition {name}={path}: {error}") from error


def encode_reference(pixels: np.ndarray, manifest: Manifest, spec: str | None, kept: Kept | None = None) -> np.ndarray:
    """Vision vector f32 [V] of a picture of `read_reference`, by the encoder of the training pictures.

    Args:
      spec: of the encoder; None: as the data set names it.
      kept: where it stays loaded; None: it does not.
    """
    from preprocess.encoders import load_vision_encoder

    name, dtype = spec or manifest.vision.spec, manifest.vision.dtype
    kept = Kept() if kept is None else kept
    encoder = kept.get("vision", (name, dtype), lambda: load_vision_encoder(name, dtype=dtype))
    check_encoder(encoder.identity, manifest.vision, "--vision-encoder")
    return encoder.encode(pixels[None])[0]
