"""`manifest.json` of a dataset directory: its encoders, buckets, latent statistics, shards and checksums."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from fluxdit_jax.dataset.cells import COUNTS
from fluxdit_jax.dataset.fields import (
    LATENT,
    PATCHES,
    USUAL,
    VECTOR,
    Layout,
    conditions,
    field_named,
    name_fault,
    ordered,
)
from fluxdit_jax.shared.sanitize import plain_name

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.parquet"
REJECTS = "rejects.jsonl"
SHARD_FILES = "*.array_record-*-of-*"  # all that `shard_name` gives
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

    @property
    def spec(self) -> str:
        """What names the very same weights: a hub model with its revision, which is found in the cache offline."""
        if not self.revision or self.id.startswith("builtin:") or Path(self.id).is_dir():
            return self.id
        return f"{self.id.partition('@')[0]}@{self.revision}"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file. `buckets` maps "HEIGHTxWIDTH" in pixels to the records of that size."""

    file: str
    sha256: str
    bytes: int
    records: int
    buckets: dict[str, int]


# Of the fields that every dataset has, by their encoders' names. Further conditions stand under "conditions".
_ENCODERS, _LENGTHS = (LATENT.encoder, *USUAL), {"text": "text_tokens"}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`manifest.json`.

    Attributes:
      name: TFDS dataset name: the first part of every shard's file name.
      resolution: side of the square with the token budget's area, pixels.
      modulus: bucket sides are multiples of this, pixels.
      fit: how images were brought to their bucket: "resize", "pad" or "crop".
      encoders: by name (`fields.Field.encoder`). That of "vae" has options["factor"]: pixels per latent side.
      buckets: (height, width) of the whole bucket table, pixels.
      latent_mean, latent_std: per channel, float64, over every latent value of the train split.
      latent_count: latent values per channel behind the statistics.
      lengths: by name of a sequence, the tokens of the longest that is stored.
      shards: split name to its shards, in order.
      vision_resolution: that of the pictures which the vision encoder was given, of the same aspect; 0: `resolution`.
    """

    name: str
    resolution: int
    modulus: int
    fit: str
    encoders: dict[str, EncoderIdentity]
    buckets: tuple[tuple[int, int], ...]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    latent_count: int
    lengths: dict[str, int]
    shards: dict[str, tuple[Shard, ...]]
    rejects: int = 0
    vision_resolution: int = 0
    version: int = FORMAT_VERSION

    @property
    def vae(self) -> EncoderIdentity:
        return self.encoders["vae"]

    @property
    def text(self) -> EncoderIdentity:
        return self.encoders["text"]

    @property
    def vision(self) -> EncoderIdentity:
        return self.encoders["vision"]

    @property
    def text_tokens(self) -> int:
        """Tokens of the longest caption."""
        return self.lengths["text"]

    @functools.cached_property
    def layout(self) -> Layout:
        """Of the fields of every record but the latent."""
        names = ordered(self.encoders.keys() - {"vae"})
        return {name: self.encoders[name].width if name in self.lengths else None for name in names}

    @property
    def conditions(self) -> tuple[str, ...]:
        """What the network can be given."""
        return conditions(self.layout)

    def further(self) -> list[str]:
        """The conditions besides the caption and the vision vector."""
        return [name for name in self.conditions if name not in USUAL]

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
        encoders, lengths = raw.pop("encoders"), raw.pop("lengths")
        raw |= {name: encoders.pop(name) for name in _ENCODERS}
        raw |= {key: lengths.pop(name) for name, key in _LENGTHS.items()}
        if not self.vision_resolution:
            del raw["vision_resolution"]
        if encoders:
            raw["conditions"] = {
                name: {"encoder": encoder} | ({"length": lengths[name]} if name in lengths else {})
                for name, encoder in encoders.items()
            }
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
        further = raw.pop("conditions", {})
        raw.setdefault("vision_resolution", 0)
        own = {field.name: field.type for field in dataclasses.fields(cls) if field.name not in ("encoders", "lengths")}
        _check_types(raw, own | dict.fromkeys(_ENCODERS, "dict") | dict.fromkeys(_LENGTHS.values(), "int"), source, "")
        encoders = {name: _encoder(raw.pop(name), source, f"{name}.") for name in _ENCODERS}
        lengths = {name: raw.pop(key) for name, key in _LENGTHS.items()}
        _read_further(further, encoders, lengths, source)
        try:
            for split, shards in raw["shards"].items():
                for number, shard in enumerate(shards):
                    _check_types(shard, _types(Shard), source, f"shards.{split}[{number}].")
            fields = raw | {"encoders": encoders, "lengths": lengths}
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
        patches = self.encoders.get(PATCHES.encoder)
        if patches is not None and patches.options.get("cells") not in COUNTS:
            count, known = patches.options.get("cells"), ", ".join(map(str, COUNTS))
            raise DatasetError(f"{source}: patches.options has {count!r} cells, not one of {known}")
        side, own = self.vision_resolution, max(1, self.resolution)
        if side < 0 or any(n * side % own for size in self.buckets for n in size):
            raise DatasetError(
                f"{source}: vision_resolution is {side}, at which buckets of {own} px have no whole sides"
            )
        for size in self.buckets:
            if min(size) < factor or max(size) > _LARGEST or any(side % factor for side in size):
                raise DatasetError(
                    f"{source}: a bucket of {size[1]}x{size[0]} pixels (width x height); sides must be multiples of "
                    f"vae.options' factor {factor}, at most {_LARGEST}"
                )
        # Names become parts of paths and lines of logs.
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", self.name):
            raise DatasetError(f"{source}: name is {self.name!r}; it must be letters, digits and _")
        for encoder in self.encoders.values():
            if not encoder.id.isprintable():
                raise DatasetError(f"{source}: the encoder {encoder.id!r} has control characters in its id")
        for shards in self.shards.values():
            for shard in shards:
                if not plain_name(shard.file) or shard.records < 1:
                    raise DatasetError(f"{source}: bad shard entry {shard.file!r} ({shard.records} records)")
        counts = {f"{name}.width": encoder.width for name, encoder in self.encoders.items()}
        for field, value in (counts | {f"{name}_tokens": n for name, n in self.lengths.items()}).items():
            if not 1 <= value <= _LARGEST:
                raise DatasetError(f"{source}: {field} is {value}; it must be from 1 to {_LARGEST}")


def _read_further(raw: Any, encoders: dict[str, EncoderIdentity], lengths: dict[str, int], source: str) -> None:
    """Adds what a manifest says under "conditions" to its encoders and lengths."""
    if not isinstance(raw, dict):
        raise DatasetError(f"{source}: conditions is {raw!r}, not an object with fields")
    for name, about in raw.items():
        prefix = f"conditions.{name}."
        if name in _ENCODERS or name_fault(name):
            raise DatasetError(f"{source}: conditions has the name {name!r}: {name_fault(name) or 'it is a field'}")
        in_rows, field = isinstance(about, dict) and "length" in about, field_named(name)
        if field.in_rows != in_rows:
            kind = "of rows (a sequence or cells)" if in_rows else f"a {VECTOR}"
            raise DatasetError(f"{source}: {prefix[:-1]} is {kind}, and this version has the kind {field.kind}")
        _check_types(about, {"encoder": "dict"} | ({"length": "int"} if in_rows else {}), source, prefix)
        encoders[name] = _encoder(about["encoder"], source, f"{prefix}encoder.")
        if in_rows:
            lengths[name] = about["length"]


def _encoder(raw: Any, source: str, prefix: str) -> EncoderIdentity:
    _check_types(raw, _types(EncoderIdentity), source, prefix)
    return EncoderIdentity(**raw)


def _types(cls: type) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(cls)}


def _check_types(raw: Any, fields: dict[str, Any], source: str, prefix: str) -> None:
    """Raises `DatasetError`, naming the field, unless `raw` has exactly these fields, by type."""
    if not isinstance(raw, dict):
        raise DatasetError(f"{source}: {prefix.rstrip('.')} is {raw!r}, not an object with fields")
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
                "--config.data.path of train, --data of the other commands. `python -m preprocess build --input DIR "
                "--output DATASET` makes one"
            ) from error
        if several := parts_of(directory):
            sides = ", ".join(map(str, several))
            raise DatasetError(
                f"{directory} holds datasets of several resolutions ({sides} px): name one of them, as "
                f"{several[max(several)]}"
            ) from error
        raise DatasetError(
            f"{path} does not exist: {directory} is not a finished dataset "
            "(make one with `python -m preprocess build --input DIR --output DATASET`)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    return Manifest.from_json(text, str(path))


def parts_of(directory: str | Path) -> dict[int, Path]:
    """The datasets of a folder of several resolutions, by resolution, ascending; none of any other folder."""
    found = {int(path.parent.name): path.parent for path in Path(directory).glob(f"*/{MANIFEST}") if _is_side(path)}
    return dict(sorted(found.items()))


def _is_side(manifest: Path) -> bool:
    name = manifest.parent.name
    return name.isascii() and name.isdecimal() and len(name) < 6


def shard_name(name: str, split: str, index: int, count: int) -> str:
    """File name of shard `index` of `count`, as TFDS expects it."""
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file, read in 1 MiB pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
