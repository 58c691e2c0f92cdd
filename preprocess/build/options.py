"""What a build is asked to do: the command line's values, checked once, and kept with the dataset."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocess import PreprocessError, encoders
from preprocess.buckets import Size, bucket_table, default_modulus

if TYPE_CHECKING:  # the command line's help needs the defaults above and not Pillow
    from preprocess.decoding.images import Limits

FITS = ("resize", "pad", "crop")
# The option that names each encoder, by the encoder's name in the manifest; "": the field is not made.
ENCODERS = {"vae": "vae", "text": "text_encoder", "vision": "vision_encoder"}


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `build`; `python -m preprocess build --help` says what each means."""

    input: str
    output: str
    vae: str = encoders.DEFAULT_VAE
    text_encoder: str = encoders.DEFAULT_TEXT
    vision_encoder: str = encoders.DEFAULT_VISION
    vision_embeddings: str = ""
    condition: tuple[str, ...] = ()  # NAME=DIR each
    resolution: int = 1024
    modulus: int = 0  # 0: `buckets.default_modulus`
    fit: str = "resize"
    max_aspect: float = 4.0
    min_side: int = 64
    max_pixels: int = 150_000_000
    max_upscale: float = 1.5
    caption_field: str = ""
    allow_outside: bool = False
    holdout: float = 0.02
    shard_size: int = 1000
    limit: int = 0
    latent: str = "mean"
    max_tokens: int = encoders.MAX_TOKENS
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 8
    workers: int = 0  # 0: one a core
    max_rejects: float = 0.05

    def checked(self) -> Options:
        """These options with defaults filled in.

        Raises:
          PreprocessError: a value is impossible; the message names its option.
        """
        for name, low, high in (
            ("holdout", 0.0, 0.999),
            ("shard_size", 1, 1_000_000),
            ("limit", 0, math.inf),
            ("min_side", 1, 16384),
            ("max_pixels", 1, 2_000_000_000),
            ("max_upscale", 1.0, math.inf),
            ("batch_size", 1, 4096),
            ("workers", 0, 1024),
            ("max_rejects", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise PreprocessError(f"--{name.replace('_', '-')} must be from {low} to {high}, got {value}")
        if self.fit not in FITS:
            raise PreprocessError(f"--fit must be one of {', '.join(FITS)}, got {self.fit!r}")
        if Path(self.input).expanduser().resolve() == Path(self.output).expanduser().resolve():
            raise PreprocessError(
                f"--output {self.output} is the input itself: give another folder, for example "
                f"{Path(self.output).with_name(Path(self.output).name + '-dataset')}"
            )
        result = dataclasses.replace(
            self,
            modulus=self.modulus or default_modulus(self.resolution),
            workers=self.workers or _cores(),
        )
        result.buckets()
        return result

    def specs(self) -> dict[str, str]:
        """The encoders to load, by their names in the manifest."""
        specs = {name: getattr(self, option) for name, option in ENCODERS.items()}
        return {
            name: spec for name, spec in specs.items() if spec and not (name == "vision" and self.vision_embeddings)
        }

    def buckets(self) -> tuple[Size, ...]:
        """The bucket table."""
        return bucket_table(self.resolution, self.modulus, self.max_aspect)

    def limits(self) -> Limits:
        """What is too much or too little of a picture."""
        from preprocess.decoding.images import Limits

        return Limits(self.max_pixels, self.min_side, self.max_aspect)

    def to_dict(self) -> dict[str, Any]:
        """For `build.json`; paths are made absolute, so that the build can be repeated from anywhere."""
        raw = dataclasses.asdict(self)
        for name in ("input", "output", "vision_embeddings"):
            raw[name] = str(Path(raw[name]).resolve()) if raw[name] else ""
        named = [(name, directory) for name, _, directory in (text.partition("=") for text in self.condition)]
        raw["condition"] = [f"{name}={Path(directory).resolve()}" for name, directory in sorted(named)]
        for name in ENCODERS.values():
            if raw[name] and Path(raw[name]).is_dir():
                raw[name] = str(Path(raw[name]).resolve())
        return raw

    @classmethod
    def from_dict(cls, raw: Any, source: str) -> Options:
        """The inverse of `to_dict`; raises `PreprocessError` naming `source`."""
        try:
            return cls(**(raw | {"condition": tuple(raw.get("condition", ()))})).checked()
        except TypeError as error:
            raise PreprocessError(f"{source}: not the options of a build: {error}") from error


def _cores() -> int:
    """That this process may use, where the system tells; all of them on macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
