"""The dataset contract: what a record, a shard and a manifest are.

The one module that both sides import. `preprocess` (PyTorch) writes through it, training (JAX) reads
through it, so it imports neither: numpy, ml_dtypes and the protobuf of `tf.train.Example` only.

A dataset directory is a valid TFDS dataset in ArrayRecord format:

    dataset_info.json, features.json        what `tfds.builder_from_directory` needs
    NAME-SPLIT.array_record-00000-of-00042  shards of about 1,000 records, group_size:1
    manifest.json                           encoders, buckets, latent statistics, checksums (`Manifest`)
    index.parquet                           one row a record
    rejects.jsonl                           every input that did not become a record, and why
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes  # registers bfloat16 with numpy; must come before tensorflow_datasets
import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from fluxdit_jax import example, other_captions
from fluxdit_jax.untrusted import plain_name

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.parquet"
REJECTS = "rejects.jsonl"
SPLITS = ("train", "holdout")
WRITER_OPTIONS = "group_size:1,uncompressed"  # 3x faster random reads than zstd for 22 % more disk
BF16 = np.dtype(ml_dtypes.bfloat16)
_F32 = np.dtype(np.float32)
# In the order in which they are written. TFDS stores a tensor with more than one unknown dimension as value + shape.
_FEATURES = {
    b"caption": example.BYTES,
    b"content_hash": example.BYTES,
    b"encoded_size": example.INTEGERS,
    b"key": example.BYTES,
    b"latent/shape": example.INTEGERS,
    b"latent/value": example.BYTES,
    b"original_size": example.INTEGERS,
    b"text": example.BYTES,
    b"vision": example.BYTES,
}
_SEVERAL = dict(sorted((_FEATURES | other_captions.FEATURES).items()))  # of a record with several captions
# Sides, widths and tokens that a manifest may claim: programs and buffers are made to measure.
_LARGEST = 2**16


class DatasetError(Exception):
    """A dataset, shard or record is damaged or is not what the reader was told to expect."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One image, encoded.

    Attributes:
      key: unique within the dataset: the path below the input folder, with its extension.
      caption: the caption as it was encoded.
      latent: bfloat16 [C, h, w], after the VAE's own shift and scale, not dataset-normalised.
      text: bfloat16 [n, text_width], the n valid tokens only; padding is never stored.
      vision: float32 [vision_width], unit L2 norm.
      original_size: (height, width) of the source image after EXIF orientation, pixels.
      encoded_size: (height, width) that the VAE saw: the bucket, pixels.
      content_hash: sha256 of the source image file, hex.
      other_captions: the further captions of the image, in order; see `other_captions`.
      other_texts: bfloat16 [n, text_width] of each of them.
    """

    key: str
    caption: str
    latent: np.ndarray
    text: np.ndarray
    vision: np.ndarray
    original_size: tuple[int, int]
    encoded_size: tuple[int, int]
    content_hash: str
    other_captions: tuple[str, ...] = ()
    other_texts: tuple[np.ndarray, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions, at least one."""
        return self.caption, *self.other_captions

    @property
    def texts(self) -> tuple[np.ndarray, ...]:
        """The tokens of all captions."""
        return self.text, *self.other_texts


def check_record(record: Record) -> None:
    """Raises `DatasetError`, naming the key, if shapes, dtypes, finiteness or the vector's norm are wrong."""

    def fail(what: str) -> None:
        raise DatasetError(f"record {record.key!r}: {what}")

    latent, text, vision = record.latent, record.text, record.vision
    if latent.ndim != 3 or latent.dtype != BF16 or 0 in latent.shape:
        fail(f"latent must be bfloat16 [C, h, w], got {latent.dtype} {list(latent.shape)}")
    if text.ndim != 2 or text.dtype != BF16 or 0 in text.shape:
        fail(f"text must be bfloat16 [n >= 1, width], got {text.dtype} {list(text.shape)}")
    others, most = record.other_texts, other_captions.MAX_CAPTIONS
    if len(others) != len(record.other_captions) or len(others) >= most:
        fail(f"{len(record.captions)} captions with {len(record.texts)} texts; at most {most}, one text each")
    for number, other in enumerate(others, 2):
        if other.ndim != 2 or other.dtype != BF16 or 0 in other.shape or other.shape[1] != text.shape[1]:
            fail(
                f"text of caption {number} must be bfloat16 [n >= 1, {text.shape[1]}], got {other.dtype} "
                f"{list(other.shape)}"
            )
        if not _all_finite(other):
            fail(f"text of caption {number} has a value that is not finite")
    if vision.ndim != 1 or vision.dtype != np.float32 or 0 in vision.shape:
        fail(f"vision must be float32 [width], got {vision.dtype} {list(vision.shape)}")
    if not _all_finite(latent):
        fail("latent has a value that is not finite")
    if not _all_finite(text):
        fail("text has a value that is not finite")
    with np.errstate(all="ignore"):
        right = abs(float(np.dot(vision, vision)) - 1.0) < 1.9e-3
    if not right:  # or nearly: with care
        if not np.isfinite(vision).all():
            fail("vision has a value that is not finite")
        norm = float(np.linalg.norm(vision.astype(np.float64)))
        if abs(norm - 1.0) > 1e-3:
            fail(f"vision must have unit L2 norm, got {norm:.6f}")


def _all_finite(array_bf16: np.ndarray) -> bool:
    """Whether no exponent is all ones; on the bits, because bfloat16 has no fast `isfinite` in numpy.

    Infinity and NaN are the largest of the negative numbers taken as uint16, and of the positive as int16.
    """
    return array_bf16.view(np.uint16).max() < 0xFF80 and array_bf16.view(np.int16).max() < 0x7F80


def check_fit(record: Record, manifest: Manifest) -> None:
    """Raises `DatasetError`, naming the key, unless the record has the sizes that its manifest promises."""

    def fail(what: str) -> None:
        raise DatasetError(f"record {record.key!r}: {what}")

    factor = manifest.vae.options["factor"]
    height, width = record.encoded_size
    if record.latent.shape != (manifest.vae.width, height // factor, width // factor):
        fail(f"latent {list(record.latent.shape)} does not fit an image of {width}x{height} pixels (width x height)")
    if (height, width) not in manifest.buckets:
        fail(f"size {width}x{height} (width x height) is not in the bucket table")
    if record.vision.size != manifest.vision.width:
        fail(f"vision vector of {record.vision.size}, the manifest says {manifest.vision.width}")
    if (longest := max(map(len, record.texts))) > manifest.text_tokens:
        fail(f"{longest} text tokens, the manifest says at most {manifest.text_tokens}")


def encode_record(record: Record) -> bytes:
    """Serialises a record as a deterministic `tf.train.Example`; raises `DatasetError` if it is invalid."""
    check_record(record)
    return serialize_unchecked(record)


def serialize_unchecked(record: Record) -> bytes:
    """`encode_record` without its check: what another program might write. For the tests of readers."""
    message = tf_example_pb2.Example()
    feature = message.features.feature

    def put_bytes(name: str, value: bytes) -> None:
        feature[name].bytes_list.value.append(value)

    def put_ints(name: str, values: Iterable[int]) -> None:
        feature[name].int64_list.value.extend(int(v) for v in values)

    put_bytes("key", record.key.encode())
    put_bytes("caption", record.caption.encode())
    put_bytes("content_hash", record.content_hash.encode())
    put_bytes("latent/value", np.ascontiguousarray(record.latent).tobytes())
    put_ints("latent/shape", record.latent.shape)
    put_bytes("text", np.ascontiguousarray(record.text).tobytes())
    put_bytes("vision", np.ascontiguousarray(record.vision).tobytes())
    put_ints("original_size", record.original_size)
    put_ints("encoded_size", record.encoded_size)
    if record.other_captions or record.other_texts:
        put_bytes("other_captions", other_captions.pack(record.other_captions))
        put_ints("other_lengths", map(len, record.other_texts))
        put_bytes("other_text", b"".join(np.ascontiguousarray(text).tobytes() for text in record.other_texts))
    return message.SerializeToString(deterministic=True)


def decode_record(data: bytes, text_width: int) -> Record:
    """The inverse of `encode_record`. The arrays are read-only views into `data`, and need not be aligned.

    Raises:
      DatasetError: the bytes are not such a record (the message names the field).
    """
    try:
        spans = example.spans(data, _FEATURES) or example.spans(data, _SEVERAL)
        if spans is None:  # not in the usual form: the library reads it, and writes it in that form
            data = _rewritten(data)
            spans = example.spans(data, _FEATURES) or example.spans(data, _SEVERAL)
        if spans is None:
            raise ValueError("it has fields that are not those of a tf.train.Example")
        caption, content_hash, encoded, key, latent_shape, latent, original, *others, text, vision = spans
        shape = _integers(data, latent_shape, "latent/shape", 3)
        encoded_height, encoded_width = _integers(data, encoded, "encoded_size", 2)
        height, width = _integers(data, original, "original_size", 2)
        values, tokens = _array(data, latent, "latent/value", BF16), _array(data, text, "text", BF16)
        if min(shape) < 1 or math.prod(shape) != values.size:
            raise DatasetError(f"latent has {values.size} values, which do not fit its shape {list(shape)}")
        if tokens.size == 0 or tokens.size % text_width:
            raise DatasetError(f"text has {tokens.size} values, which are not rows of width {text_width}")
        captions, texts = _others(data, others, text_width) if others else ((), ())
        return Record(
            key=data[slice(*key)].decode(),
            caption=data[slice(*caption)].decode(),
            latent=values.reshape(shape),
            text=tokens.reshape(-1, text_width),
            vision=_array(data, vision, "vision", _F32),
            original_size=(height, width),
            encoded_size=(encoded_height, encoded_width),
            content_hash=data[slice(*content_hash)].decode(),
            other_captions=captions,
            other_texts=texts,
        )
    except DatasetError:
        raise
    except Exception as error:  # noqa: BLE001  protobuf raises its own DecodeError, plus Value/ZeroDivision/Unicode
        raise DatasetError(f"not a fluxdit record: {type(error).__name__}: {error}") from error


def _others(data: bytes, spans: list[tuple[int, int]], width: int) -> tuple[tuple[str, ...], tuple[np.ndarray, ...]]:
    captions, lengths, text = spans
    rows = _array(data, text, "other_text", BF16)
    return other_captions.unpack(data[slice(*captions)], data[slice(*lengths)], rows, width)


def _array(data: bytes, span: tuple[int, int], name: str, dtype: np.dtype) -> np.ndarray:
    start, end = span
    count, rest = divmod(end - start, dtype.itemsize)
    if rest:
        raise ValueError(f"{name} has {end - start} bytes, which are not values of {dtype}")
    return np.frombuffer(data, dtype, count, start)


def _integers(data: bytes, span: tuple[int, int], name: str, count: int) -> tuple[int, ...]:
    start, end = span
    if end - start > 10 * count:  # the most that they can take; only what is short is worth remembering
        raise DatasetError(f"{name} has {end - start} bytes, which are more than {count} integers")
    try:
        values = example.integers(data[start:end])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if len(values) != count:
        raise DatasetError(f"{name} must be {count} integers, got {list(values)}")
    return values


def _rewritten(data: bytes) -> bytes:
    """The fields of a record as the protobuf library reads them, in the form that `encode_record` writes.

    Raises:
      ValueError: a field is missing, or is not one value of its type.
    """
    message = tf_example_pb2.Example.FromString(data)
    features = message.features.feature
    several = any(name.decode() in features for name in other_captions.FEATURES)
    kinds = {name.decode(): kind for name, kind in (_SEVERAL if several else _FEATURES).items()}
    for name, kind in kinds.items():
        given = features[name]  # an empty one if there is none
        if not (given.int64_list.value if kind == example.INTEGERS else len(given.bytes_list.value) == 1):
            raise ValueError(f"{name} is missing or not one value of its type")
    for name in features.keys() - kinds.keys():
        del features[name]
    return message.SerializeToString(deterministic=True)


def tfds_features(channels: int, text_width: int, vision_width: int) -> Any:
    """The TFDS `FeaturesDict` of these records, for `tfds.folder_dataset.write_metadata`.

    The same with several captions a picture: a feature that is not declared is passed over.
    """
    import tensorflow_datasets as tfds

    features = tfds.features
    return features.FeaturesDict(
        {
            "key": features.Text(),
            "caption": features.Text(),
            "content_hash": features.Text(),
            "latent": features.Tensor(shape=(channels, None, None), dtype=BF16.type, encoding="bytes"),
            "text": features.Tensor(shape=(None, text_width), dtype=BF16.type, encoding="bytes"),
            "vision": features.Tensor(shape=(vision_width,), dtype=np.float32, encoding="bytes"),
            "original_size": features.Tensor(shape=(2,), dtype=np.int64),
            "encoded_size": features.Tensor(shape=(2,), dtype=np.int64),
        }
    )


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
