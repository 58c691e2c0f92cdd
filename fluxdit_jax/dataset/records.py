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
import math
from collections.abc import Iterable
from typing import Any

import ml_dtypes  # registers bfloat16 with numpy; must come before tensorflow_datasets
import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from fluxdit_jax.dataset import captions, tf_example
from fluxdit_jax.dataset.manifest import DatasetError, Manifest

WRITER_OPTIONS = "group_size:1,uncompressed"  # 3x faster random reads than zstd for 22 % more disk
BF16 = np.dtype(ml_dtypes.bfloat16)
_F32 = np.dtype(np.float32)
# In the order in which they are written. TFDS stores a tensor with more than one unknown dimension as value + shape.
_FEATURES = {
    b"caption": tf_example.BYTES,
    b"content_hash": tf_example.BYTES,
    b"encoded_size": tf_example.INTEGERS,
    b"key": tf_example.BYTES,
    b"latent/shape": tf_example.INTEGERS,
    b"latent/value": tf_example.BYTES,
    b"original_size": tf_example.INTEGERS,
    b"text": tf_example.BYTES,
    b"vision": tf_example.BYTES,
}
_SEVERAL = dict(sorted((_FEATURES | captions.FEATURES).items()))  # of a record with several captions


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
    others, most = record.other_texts, captions.MAX_CAPTIONS
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
        put_bytes("other_captions", captions.pack(record.other_captions))
        put_ints("other_lengths", map(len, record.other_texts))
        put_bytes("other_text", b"".join(np.ascontiguousarray(text).tobytes() for text in record.other_texts))
    return message.SerializeToString(deterministic=True)


def decode_record(data: bytes, text_width: int) -> Record:
    """The inverse of `encode_record`. The arrays are read-only views into `data`, and need not be aligned.

    Raises:
      DatasetError: the bytes are not such a record (the message names the field).
    """
    try:
        spans = tf_example.spans(data, _FEATURES) or tf_example.spans(data, _SEVERAL)
        if spans is None:  # not in the usual form: the library reads it, and writes it in that form
            data = _rewritten(data)
            spans = tf_example.spans(data, _FEATURES) or tf_example.spans(data, _SEVERAL)
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
    words, lengths, text = spans
    rows = _array(data, text, "other_text", BF16)
    return captions.unpack(data[slice(*words)], data[slice(*lengths)], rows, width)


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
        values = tf_example.integers(data[start:end])
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
    several = any(name.decode() in features for name in captions.FEATURES)
    kinds = {name.decode(): kind for name, kind in (_SEVERAL if several else _FEATURES).items()}
    for name, kind in kinds.items():
        given = features[name]  # an empty one if there is none
        if not (given.int64_list.value if kind == tf_example.INTEGERS else len(given.bytes_list.value) == 1):
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
