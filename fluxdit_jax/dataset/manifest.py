"""`manifest.json` of a dataset directory: its encoders, buckets, latent statistics, shards and checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from fluxdit_jax.shared.sanitize import plain_name

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.parquet"
REJECTS = "rejects.jsonl"
SPLITS = ("train", "holdout")
# Sides, widths and tokens that a manifest may claim: programs and buffers are made to measure.
_LARGEST = 2**16


class DatasetError(Exception):
    """A dataset, shard or record is damaged or is not what the reader was told to expect."""


@dataclasses.dataclass(frozen=True)
class EncoderIdentity:
    """Which encoder made a field, precisely enough to refuse another one.

    Attributes:
      id: Hugging Face id, directory as given, or `builtin:...`.
      revision: commit hash of a hub model, else "".
      sha256: over the weights files (built-in encoders: over their definition), hex.
      dtype: dtype the encoder ran in.
      width: latent channels (VAE) or vector width (text, vision).
      options: what else decides the output (latent mode, factor, max_tokens, input side, ...).
    """

    id: str
    revision: str
    sha256: str
    dtype: str
    width: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file. `buckets` maps "HEIGHTxWIDTH" in pixels to the records of that size."""

    file: str
    sha256: str
    bytes: int
    records: int
    buckets: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`manifest.json`.

    Attributes:
      name: TFDS dataset name: the first part of every shard's file name.
      resolution: side of the square with the token budget's area, pixels.
      modulus: bucket sides are multiples of this, pixels.
      fit: how images were brought to their bucket: "resize", "pad" or "crop".
      vae, text, vision: the encoders. vae.options["factor"] is pixels per latent side.
      buckets: (height, width) of the whole bucket table, pixels.
      latent_mean, latent_std: per channel, float64, over every latent value of the train split.
      latent_count: latent values per channel behind the statistics.
      text_tokens: longest text sequence stored.
      shards: split name to its shards, in order.
    """

    name: str
    resolution: int
    modulus: int
    fit: str
    vae: EncoderIdentity
    text: EncoderIdentity
    vision: EncoderIdentity
    buckets: tuple[tuple[int, int], ...]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    latent_count: int
    text_tokens: int
    shards: dict[str, tuple[Shard, ...]]
    rejects: int = 0
    version: int = FORMAT_VERSION

    def records(self, split: str) -> int:
        """Number of records in a split."""
        return sum(shard.records for shard in self.shards.get(split, ()))

    def latent_sizes(self) -> tuple[tuple[int, int], ...]:
        """The bucket table in latent units, (h, w)."""
        factor = self.vae.options["factor"]
        return tuple((height // factor, width // factor) for height, width in self.buckets)

    def to_json(self) -> str:
        """Deterministic JSON with a `checksum` of everything else, so that a flipped bit is noticed."""
        raw = dataclasses.asdict(self)
        raw["checksum"] = json_checksum(raw)
        return json.dumps(raw, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = MANIFEST) -> Manifest:
        """Parses and checks a manifest; raises `DatasetError` naming `source` and the field at fault."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{source}: not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise DatasetError(f"{source}: expected a JSON object, got {type(raw).__name__}")
        if raw.get("version") != FORMAT_VERSION:
            raise DatasetError(
                f"{source}: format version is {raw.get('version')!r}, this code reads {FORMAT_VERSION}; "
                "rebuild the dataset with `python -m preprocess build`"
            )
        checksum = raw.pop("checksum", "missing")
        if checksum != json_checksum(raw):
            raise DatasetError(
                f"{source}: its checksum is not that of its content: it is damaged, or was edited by hand; "
                "give the `python -m preprocess build` command of the dataset again to write it anew"
            )
        _check_types(raw, cls, source, "")
        try:
            fields = dict(raw)
            for name in ("vae", "text", "vision"):
                _check_types(raw[name], EncoderIdentity, source, f"{name}.")
                fields[name] = EncoderIdentity(**raw[name])
            for split, shards in raw["shards"].items():
                for number, shard in enumerate(shards):
                    _check_types(shard, Shard, source, f"shards.{split}[{number}].")
            fields["shards"] = {
                split: tuple(Shard(**shard) for shard in shards) for split, shards in raw["shards"].items()
            }
            fields["buckets"] = tuple((int(h), int(w)) for h, w in raw["buckets"])
            fields["latent_mean"] = tuple(float(v) for v in raw["latent_mean"])
            fields["latent_std"] = tuple(float(v) for v in raw["latent_std"])
        except (TypeError, ValueError, OverflowError) as error:
            raise DatasetError(f"{source}: shards, buckets, latent_mean or latent_std is malformed: {error}") from error
        manifest = cls(**fields)
        manifest._check(source)
        return manifest

    def _check(self, source: str) -> None:
        channels = self.vae.width
        if len(self.latent_mean) != channels or len(self.latent_std) != channels:
            raise DatasetError(
                f"{source}: latent_mean and latent_std have {len(self.latent_mean)} and "
                f"{len(self.latent_std)} values, the VAE has {channels} channels"
            )
        if not all(math.isfinite(v) for v in self.latent_mean + self.latent_std) or min(self.latent_std) <= 0:
            raise DatasetError(f"{source}: latent_mean and latent_std must be finite, and every std above 0")
        factor = self.vae.options.get("factor")
        if type(factor) is not int or factor < 1:
            raise DatasetError(f"{source}: vae.options has the 'factor' {factor!r}; it must be pixels per latent side")
        if not self.buckets:
            raise DatasetError(f"{source}: the bucket table is empty")
        for size in self.buckets:
            if min(size) < factor or max(size) > _LARGEST or any(side % factor for side in size):
                raise DatasetError(
                    f"{source}: a bucket of {size[1]}x{size[0]} pixels (width x height); sides must be multiples of "
                    f"vae.options' factor {factor}, at most {_LARGEST}"
                )
        # Names become parts of paths and lines of logs.
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", self.name):
            raise DatasetError(f"{source}: name is {self.name!r}; it must be letters, digits and _")
        for encoder in (self.vae, self.text, self.vision):
            if not encoder.id.isprintable():
                raise DatasetError(f"{source}: the encoder {encoder.id!r} has control characters in its id")
        for shards in self.shards.values():
            for shard in shards:
                if not plain_name(shard.file) or shard.records < 1:
                    raise DatasetError(f"{source}: bad shard entry {shard.file!r} ({shard.records} records)")
        for field, value in (
            ("vae.width", self.vae.width),
            ("text.width", self.text.width),
            ("vision.width", self.vision.width),
            ("text_tokens", self.text_tokens),
        ):
            if not 1 <= value <= _LARGEST:
                raise DatasetError(f"{source}: {field} is {value}; it must be from 1 to {_LARGEST}")


def _check_types(raw: Any, cls: type, source: str, prefix: str) -> None:
    """Raises `DatasetError`, naming the field, unless `raw` has exactly the fields of the dataclass, by type."""
    if not isinstance(raw, dict):
        raise DatasetError(f"{source}: {prefix.rstrip('.')} is {raw!r}, not an object with fields")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    if fields.keys() != raw.keys():
        names = ", ".join(prefix + name for name in sorted(fields.keys() ^ raw.keys()))
        raise DatasetError(f"{source}: missing or unknown: {names}")
    for name, annotation in fields.items():
        value = raw[name]
        wanted = {"str": str, "int": int, "tuple": list}.get(annotation.split("[")[0], dict)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise DatasetError(f"{source}: {prefix}{name} is {value!r}, which is no {wanted.__name__}")


def json_checksum(raw: Any) -> str:
    """Hex sha256 of a value of JSON, whatever the order of its keys: a flipped bit in a file of ours is noticed."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def load_manifest(directory: str | Path) -> Manifest:
    """Reads `manifest.json` of a dataset directory; raises `DatasetError` if it is missing or wrong."""
    path = Path(directory) / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if not Path(directory).is_dir():
            raise DatasetError(
                f"{directory}: there is no such folder. If the dataset was moved, give its new place: "
                "--config.data.path of train, --data of validate. `python -m preprocess build --input DIR --output "
                "DATASET` makes one"
            ) from error
        raise DatasetError(
            f"{path} does not exist: {directory} is not a finished dataset "
            "(make one with `python -m preprocess build --input DIR --output DATASET`)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    return Manifest.from_json(text, str(path))


def shard_name(name: str, split: str, index: int, count: int) -> str:
    """File name of shard `index` of `count`, as TFDS expects it."""
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file, read in 1 MiB pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
