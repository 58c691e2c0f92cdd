"""What a build is asked to do: the command line's values, checked once, and kept with the dataset."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocess import PreprocessError, encoders
from preprocess.buckets import TOKEN_SIDE, Size, bucket_table, default_modulus

if TYPE_CHECKING:  # the command line's help needs the defaults above and not Pillow
    from preprocess.decoding.images import Limits

FITS = ("resize", "pad", "crop")
# The option that names each encoder, by the encoder's name in the manifest; "": the field is not made.
ENCODERS = {"vae": "vae", "text": "text_encoder", "vision": "vision_encoder"}
PATCHES = "patches"  # their encoder's name: `fields.PATCHES`, which the command line's help need not load


def option_of(encoder: str) -> str:
    """The option that names an encoder; the patches are those of the vision encoder."""
    return ENCODERS["vision" if encoder == PATCHES else encoder]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `build`; `python -m preprocess build --help` says what each means."""

    input: str
    output: str
    vae: str = encoders.DEFAULT_VAE
    text_encoder: str = encoders.DEFAULT_TEXT
    vision_encoder: str = encoders.DEFAULT_VISION
    vision_embeddings: str = ""
    vision_patches: int = 0  # cells of a square picture that its patches are pooled to; 0: none are stored
    condition: tuple[str, ...] = ()  # NAME=DIR each
    resolution: int = 1024
    resolutions: tuple[int, ...] = ()  # of several, `resolution` is the largest; (): one dataset
    vision_resolution: int = 0  # whose pixels the vision encoder sees; 0: the dataset's, of several the largest
    modulus: int = 0  # at `resolution`; 0: `buckets.default_modulus`
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
            ("max_tokens", 1, 4096),
            ("max_rejects", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise PreprocessError(f"--{name.replace('_', '-')} must be from {low} to {high}, got {value}")
        from fluxdit_jax.dataset.cells import COUNTS

        if self.vision_patches not in (0, *COUNTS):
            known = ", ".join(map(str, COUNTS))
            raise PreprocessError(f"--vision-patches must be 0 (none) or one of {known}, got {self.vision_patches}")
        if self.vision_patches and not self.vision_encoder:
            raise PreprocessError("--vision-patches needs a --vision-encoder: files have vectors only")
        for name in ("vae", "text_encoder"):
            if not getattr(self, name):
                raise PreprocessError(f"--{name.replace('_', '-')} is empty, and is needed")
        if not (self.vision_encoder or self.vision_embeddings):
            raise PreprocessError("--vision-encoder is empty: give one, or --vision-embeddings")
        if self.fit not in FITS:
            raise PreprocessError(f"--fit must be one of {', '.join(FITS)}, got {self.fit!r}")
        if Path(self.input).expanduser().resolve() == Path(self.output).expanduser().resolve():
            raise PreprocessError(
                f"--output {self.output} is the input itself: give another folder, for example "
                f"{Path(self.output).with_name(Path(self.output).name + '-dataset')}"
            )
        sides = self.resolutions
        if sides and (len(set(sides)) < 2 or sides != tuple(sorted(set(sides))) or self.resolution != sides[-1]):
            raise PreprocessError(f"--resolution {','.join(map(str, sides))}: several must differ and ascend")
        result = dataclasses.replace(
            self,
            vae=_local(self.vae),
            text_encoder=_local(self.text_encoder),
            vision_encoder=_local(self.vision_encoder),
            modulus=self.modulus or default_modulus(self.resolution),
            vision_resolution=self.vision_resolution or (self.resolution if sides else 0),
            workers=self.workers or _cores(),
        )
        for part in result.parts():
            part.buckets()
            part.seen_buckets()
        return result

    def parts(self) -> tuple[Options, ...]:
        """The options of each dataset of a build: of each resolution, ascending, in a folder of its own under output.

        Bucket sides are in proportion, so that a picture has the same bucket at all of them, scaled.

        Raises:
          PreprocessError: the modulus cannot be scaled to one of the resolutions.
        """
        if not self.resolutions:
            return (self,)
        return tuple(
            dataclasses.replace(
                self,
                output=str(Path(self.output) / str(side)),
                resolution=side,
                resolutions=(),
                vision_resolution=0 if side == self.vision_resolution else self.vision_resolution,
                modulus=self._modulus_at(side),
            )
            for side in self.resolutions
        )

    def _modulus_at(self, side: int) -> int:
        scaled, rest = divmod(self.modulus * side, self.resolution)
        if rest or scaled % TOKEN_SIDE:
            raise PreprocessError(
                f"--modulus {self.modulus} at {self.resolution} px is {self.modulus * side / self.resolution:g} at "
                f"{side} px, where it must be a multiple of {TOKEN_SIDE}, too: give another one, or other resolutions"
            )
        return scaled

    def specs(self) -> dict[str, str]:
        """The encoders to load, by their names in the manifest."""
        specs = {name: getattr(self, option) for name, option in ENCODERS.items()}
        if self.vision_embeddings:
            del specs["vision"]
        if self.vision_patches:
            specs[PATCHES] = self.vision_encoder
        return {name: spec for name, spec in specs.items() if spec}

    def buckets(self) -> tuple[Size, ...]:
        """The bucket table."""
        return bucket_table(self.resolution, self.modulus, self.max_aspect)

    def seen_buckets(self) -> tuple[Size, ...]:
        """The bucket table of the pictures that the vision encoder is shown."""
        side = self.vision_resolution or self.resolution
        return bucket_table(side, self._modulus_at(side), self.max_aspect)

    def limits(self) -> Limits:
        """What is too much or too little of a picture."""
        from preprocess.decoding.images import Limits

        return Limits(self.max_pixels, self.min_side, self.max_aspect)

    def to_dict(self) -> dict[str, Any]:
        """For `build.json`; paths are made absolute, so that the build can be repeated from anywhere."""
        raw = dataclasses.asdict(self)
        raw["resolutions"] = list(self.resolutions)
        for name in ("input", "output", "vision_embeddings"):
            raw[name] = str(Path(raw[name]).resolve()) if raw[name] else ""
        named = [(name, directory) for name, _, directory in (text.partition("=") for text in self.condition)]
        raw["condition"] = [f"{name}={Path(directory).resolve()}" for name, directory in sorted(named)]
        for name in ENCODERS.values():
            raw[name] = _local(raw[name])
        return raw

    @classmethod
    def from_dict(cls, raw: Any, source: str) -> Options:
        """The inverse of `to_dict`; raises `PreprocessError` naming `source`."""
        try:
            several = {name: tuple(raw.get(name, ())) for name in ("condition", "resolutions")}
            return cls(**(raw | several)).checked()
        except TypeError as error:
            raise PreprocessError(f"{source}: not the options of a build: {error}") from error


def _local(spec: str) -> str:
    """A directory by its absolute path: a relative one would be an id of the Hub elsewhere."""
    return str(Path(spec).resolve()) if spec and Path(spec).is_dir() else spec


def _cores() -> int:
    """That this process may use, where the system tells; all of them on macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
