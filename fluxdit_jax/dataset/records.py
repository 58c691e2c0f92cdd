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
import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from fluxdit_jax.dataset import captions, tf_example
from fluxdit_jax.dataset.cells import grid_of
from fluxdit_jax.dataset.fields import (
    BF16,
    CAPTION,
    LATENT,
    PATCHES,
    SEQUENCE,
    USUAL,
    Layout,
    field_named,
    of_captions,
    ordered,
)
from fluxdit_jax.dataset.manifest import DatasetError, Manifest

WRITER_OPTIONS = "group_size:1,uncompressed"  # 3x faster random reads than zstd for 22 % more disk
# Besides the conditions. TFDS stores a tensor with more than one unknown dimension as value + shape.
_FEATURES = {
    "caption": tf_example.BYTES,
    "content_hash": tf_example.BYTES,
    "encoded_size": tf_example.INTEGERS,
    "key": tf_example.BYTES,
    "latent/shape": tf_example.INTEGERS,
    "latent/value": tf_example.BYTES,
    "original_size": tf_example.INTEGERS,
}


@dataclasses.dataclass(frozen=True)
class Record:
    """One image, encoded.

    Attributes:
      key: unique within the dataset: the path below the input folder, with its extension.
      caption: the caption as it was encoded.
      latent: bfloat16 [C, h, w], after the VAE's own shift and scale, not dataset-normalised.
      conditions: by name, see `fields`: sequences bfloat16 [n, width] of the n valid tokens only (padding is never
        stored), vectors float32 [width] of unit L2 norm. "text" and "vision" are always among them. Beside them stand
        the cells, if there are any.
      original_size: (height, width) of the source image after EXIF orientation, pixels.
      encoded_size: (height, width) that the VAE saw: the bucket, pixels.
      content_hash: sha256 of the source image file, hex.
      other_captions: the further captions of the image, in order; see `captions`.
      other_conditions: by name of a condition that is made from the caption, that of each further caption.
    """

    key: str
    caption: str
    latent: np.ndarray
    conditions: dict[str, np.ndarray]
    original_size: tuple[int, int]
    encoded_size: tuple[int, int]
    content_hash: str
    other_captions: tuple[str, ...] = ()
    other_conditions: dict[str, tuple[np.ndarray, ...]] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> np.ndarray:
        """The tokens of the first caption."""
        return self.conditions["text"]

    @property
    def vision(self) -> np.ndarray:
        """The vision vector."""
        return self.conditions["vision"]

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions, at least one."""
        return self.caption, *self.other_captions

    def of_all_captions(self, name: str) -> tuple[np.ndarray, ...]:
        """A condition that is made from the caption, of each of them."""
        return self.conditions[name], *self.other_conditions.get(name, ())

    @property
    def texts(self) -> tuple[np.ndarray, ...]:
        """The tokens of all captions."""
        return self.of_all_captions("text")

    def having(self, **conditions: np.ndarray) -> Record:
        """The record with these conditions instead of its own of the same names."""
        return dataclasses.replace(self, conditions=self.conditions | conditions)

    def layout(self) -> Layout:
        """Of its conditions."""
        return {name: array.shape[-1] if field_named(name).in_rows else None for name, array in self.conditions.items()}


def check_record(record: Record) -> None:
    """Raises `DatasetError`, naming the key, if shapes, dtypes, finiteness or a vector's norm are wrong."""

    def fail(what: str) -> None:
        raise DatasetError(f"record {record.key!r}: {what}")

    if fault := LATENT.fault(record.latent):
        fail(f"latent {fault}")
    count, most = len(record.other_captions), captions.MAX_CAPTIONS
    if count >= most:
        fail(f"{count + 1} captions; at most {most}")
    if missing := set(USUAL) - record.conditions.keys():
        fail(f"has no {' and no '.join(sorted(missing))}")
    for name, array in record.conditions.items():
        field = field_named(name)
        if fault := field.fault(array):
            fail(f"{name} {fault}")
        others = record.other_conditions.get(name, ())
        if field.made_from == CAPTION and len(others) != count:
            fail(f"{count + 1} captions with {len(others) + 1} of {name}; one each")
        for number, other in enumerate(others, 2):
            if fault := field.fault(other):
                fail(f"{name} of caption {number} {fault}")
            if other.shape[-1] != array.shape[-1]:
                fail(f"{name} of caption {number} has width {other.shape[-1]}, not {array.shape[-1]}")
    made = {name for name in record.conditions if field_named(name).made_from == CAPTION}
    if loose := record.other_conditions.keys() - made:
        fail(f"{', '.join(sorted(loose))} of further captions, which is not made from captions")


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
    if record.conditions.keys() != manifest.layout.keys():
        fail(f"conditions {sorted(record.conditions)}, the manifest says {sorted(manifest.layout)}")
    for name, array in record.conditions.items():
        if array.shape[-1] != (width := manifest.encoders[name].width):
            fail(f"{name} of width {array.shape[-1]}, the manifest says {width}")
        most = manifest.lengths.get(name)
        if most is not None and (longest := max(map(len, record.of_all_captions(name)))) > most:
            fail(f"{longest} {name} tokens, the manifest says at most {most}")
        if name == PATCHES.name:
            grid = grid_of(record.encoded_size, manifest.resolution, manifest.encoders[name].options["cells"])
            if len(array) != math.prod(grid):
                fail(f"{len(array)} cells of patches, the manifest says {grid[0]} rows of {grid[1]}")


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
    put_ints("original_size", record.original_size)
    put_ints("encoded_size", record.encoded_size)
    for name, array in record.conditions.items():
        put_bytes(name, np.ascontiguousarray(array).tobytes())
    if record.other_captions or any(record.other_conditions.values()):
        put_bytes("other_captions", captions.pack(record.other_captions))
        for name, others in record.other_conditions.items():
            put_bytes(captions.feature(name), b"".join(np.ascontiguousarray(other).tobytes() for other in others))
            if field_named(name).kind == SEQUENCE:
                put_ints(captions.lengths_feature(name), map(len, others))
    return message.SerializeToString(deterministic=True)


def decode_record(data: bytes, layout: Layout) -> Record:
    """The inverse of `encode_record`. The arrays are read-only views into `data`, and need not be aligned.

    Args:
      layout: of the conditions; `Manifest.layout`.

    Raises:
      DatasetError: the bytes are not such a record (the message names the field).
    """
    one, several = _forms(tuple(layout.items()))
    try:
        form, spans = one, tf_example.spans(data, one.features)
        if spans is None:
            form, spans = several, tf_example.spans(data, several.features)
        if spans is None:  # not in the usual form: the library reads it, and writes it in that form
            data, form = _rewritten(data, one, several)
            spans = tf_example.spans(data, form.features)
        if spans is None:
            raise ValueError("it has fields that are not those of a tf.train.Example")
        caption, content_hash, encoded, key, latent_shape, latent, original = form.fixed(spans)
        shape = _integers(data, latent_shape, "latent/shape", 3)
        encoded_height, encoded_width = _integers(data, encoded, "encoded_size", 2)
        height, width = _integers(data, original, "original_size", 2)
        values = _array(data, latent, "latent/value", BF16)
        if min(shape) < 1 or math.prod(shape) != values.size:
            raise DatasetError(f"latent has {values.size} values, which do not fit its shape {list(shape)}")
        conditions = {}
        for name, place, dtype, row_width in form.conditions:
            array = _array(data, spans[place], name, dtype)
            if row_width is not None:
                if array.size == 0 or array.size % row_width:
                    raise DatasetError(f"{name} has {array.size} values, which are not rows of width {row_width}")
                array = array.reshape(-1, row_width)
            conditions[name] = array
        other_captions, other_conditions = _others(data, form, spans, layout) if form is several else ((), {})
        return Record(
            key=data[slice(*key)].decode(),
            caption=data[slice(*caption)].decode(),
            latent=values.reshape(shape),
            conditions=conditions,
            original_size=(height, width),
            encoded_size=(encoded_height, encoded_width),
            content_hash=data[slice(*content_hash)].decode(),
            other_captions=other_captions,
            other_conditions=other_conditions,
        )
    except DatasetError:
        raise
    except Exception as error:  # noqa: BLE001  protobuf raises its own DecodeError, plus Value/ZeroDivision/Unicode
        raise DatasetError(f"not a fluxdit record: {type(error).__name__}: {error}") from error


class _Form(NamedTuple):
    """Where everything stands in a record of one layout.

    Attributes:
      features: (name, kind) in the order in which they are written.
      fixed: takes the spans of `_FEATURES` out of those of all features.
      conditions: (name, place among the features, dtype, width of a sequence's row or None).
    """

    features: dict[bytes, int]
    fixed: Callable[[list[tuple[int, int]]], tuple[tuple[int, int], ...]]
    conditions: tuple[tuple[str, int, np.dtype, int | None], ...]

    def span(self, spans: list[tuple[int, int]], name: str) -> tuple[int, int]:
        """Of a feature."""
        return spans[list(self.features).index(name.encode())]


@functools.lru_cache(64)
def _forms(layout: tuple[tuple[str, int | None], ...]) -> tuple[_Form, _Form]:
    """Of a record with one caption, and of one with several."""
    one = _FEATURES | dict.fromkeys((name for name, _ in layout), tf_example.BYTES)
    several = one | {"other_captions": tf_example.BYTES}
    for field in of_captions(dict(layout)):
        several[captions.feature(field.name)] = tf_example.BYTES
        if field.kind == SEQUENCE:
            several[captions.lengths_feature(field.name)] = tf_example.INTEGERS

    def form(features: dict[str, int]) -> _Form:
        ordered_features = dict(sorted((name.encode(), kind) for name, kind in features.items()))
        place = {name.decode(): number for number, name in enumerate(ordered_features)}
        fixed = operator.itemgetter(*(place[name] for name in _FEATURES))
        conditions = tuple((name, place[name], field_named(name).dtype, width) for name, width in layout)
        return _Form(ordered_features, fixed, conditions)

    return form(one), form(several)


def _others(
    data: bytes, form: _Form, spans: list[tuple[int, int]], layout: Layout
) -> tuple[tuple[str, ...], dict[str, tuple[np.ndarray, ...]]]:
    """The further captions, and what is made from them."""
    words = captions.unpack(data[slice(*form.span(spans, "other_captions"))])
    found = {}
    for field in of_captions(layout):
        feature = captions.feature(field.name)
        values = _array(data, form.span(spans, feature), feature, field.dtype)
        lengths = None
        if field.kind == SEQUENCE:
            lengths = data[slice(*form.span(spans, captions.lengths_feature(field.name)))]
        found[field.name] = captions.split(field.name, values, len(words), lengths, layout[field.name])
    return words, found


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


def _rewritten(data: bytes, one: _Form, several: _Form) -> tuple[bytes, _Form]:
    """The fields of a record as the protobuf library reads them, in the form that `encode_record` writes.

    Raises:
      ValueError: a field is missing, or is not one value of its type.
    """
    message = tf_example_pb2.Example.FromString(data)
    features = message.features.feature
    has_others = any(name.decode() in features for name in several.features.keys() - one.features.keys())
    form = several if has_others else one
    kinds = {name.decode(): kind for name, kind in form.features.items()}
    for name, kind in kinds.items():
        given = features[name]  # an empty one if there is none
        if not (given.int64_list.value if kind == tf_example.INTEGERS else len(given.bytes_list.value) == 1):
            raise ValueError(f"{name} is missing or not one value of its type")
    for name in features.keys() - kinds.keys():
        del features[name]
    return message.SerializeToString(deterministic=True), form


def tfds_features(manifest: Manifest) -> Any:
    """The TFDS `FeaturesDict` of the records of a dataset, for `tfds.folder_dataset.write_metadata`.

    The same with several captions a picture: a feature that is not declared is passed over.
    """
    import tensorflow_datasets as tfds

    features = tfds.features

    def tensor(shape: tuple[int | None, ...], dtype: np.dtype) -> Any:
        return features.Tensor(shape=shape, dtype=dtype.type, encoding="bytes")

    declared = {
        "key": features.Text(),
        "caption": features.Text(),
        "content_hash": features.Text(),
        "latent": tensor((manifest.vae.width, None, None), BF16),
        "original_size": features.Tensor(shape=(2,), dtype=np.int64),
        "encoded_size": features.Tensor(shape=(2,), dtype=np.int64),
    }
    for name in ordered(manifest.layout):
        field, width = field_named(name), manifest.encoders[name].width
        declared[name] = tensor((None, width) if field.in_rows else (width,), field.dtype)
    return features.FeaturesDict(declared)
