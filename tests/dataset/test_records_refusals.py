"""Records against TFDS, and every way in which they can be wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_values import values
from training_helpers import LAYOUT, TEXT_WIDTH, make_record, write_dataset

from fluxdit_jax.dataset.fields import BF16
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.dataset.records import Record, check_record, decode_record, encode_record, tfds_features


def test_bytes_do_not_depend_on_memory_layout():
    record = make_record(1)
    shuffled = dataclasses.replace(record, latent=np.asfortranarray(record.latent))
    shuffled = shuffled.having(text=np.asfortranarray(record.text))
    assert not shuffled.latent.flags.c_contiguous and not shuffled.text.flags.c_contiguous
    assert encode_record(shuffled) == encode_record(record)


def test_bytes_are_pinned():
    """A change of the format must be made on purpose, with FORMAT_VERSION."""
    record = Record(
        key="k",
        caption="c",
        latent=np.arange(4).reshape(1, 2, 2).astype(BF16),
        conditions={"text": np.ones((1, 2), BF16), "vision": np.array([0.6, 0.8], np.float32)},
        original_size=(3, 5),
        encoded_size=(2, 2),
        content_hash="h",
    )
    data = encode_record(record)
    for stored in (b"latent/value", b"latent/shape", b"\x00\x00\x80\x3f\x00\x40\x40\x40", b"original_size"):
        assert stored in data
    # features in the order of their names: protobuf maps have no order of their own
    names = [b"caption", b"content_hash", b"encoded_size", b"key", b"latent/shape", b"latent/value"]
    places = [data.index(b"\n" + bytes([len(name)]) + name) for name in names]
    assert places == sorted(places)
    assert len(data) == 204


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent": np.zeros((4, 4), BF16)}, ["latent", "[4, 4]"]),
        ({"latent": np.zeros((4, 0, 4), BF16)}, ["latent", "[4, 0, 4]"]),
        ({"latent": np.zeros((4, 4, 4), np.float32)}, ["latent", "float32"]),
        ({"latent": np.full((4, 4, 4), np.inf, BF16)}, ["latent", "not finite"]),
        ({"text": np.zeros((0, 8), BF16)}, ["text", "[0, 8]"]),
        ({"text": np.zeros((8,), BF16)}, ["text", "[8]"]),
        ({"text": np.zeros((2, 8), np.float16)}, ["text", "float16"]),
        ({"text": np.full((2, 8), np.nan, BF16)}, ["text", "not finite"]),
        ({"vision": np.zeros((2, 3), np.float32)}, ["vision", "[2, 3]"]),
        ({"vision": np.zeros((0,), np.float32)}, ["vision", "[0]"]),
        ({"vision": np.array([0.6, 0.8])}, ["vision", "float64"]),
        ({"vision": np.array([0.6, np.nan], np.float32)}, ["vision", "not finite"]),
        ({"vision": np.array([0.6, 0.7], np.float32)}, ["vision", "unit L2 norm", "0.92"]),
        ({"vision": np.zeros(6, np.float32)}, ["vision", "unit L2 norm", "0.0"]),
    ],
)
def test_invalid_records_are_refused_with_key_and_field(change, words):
    record = make_record(7)
    record = dataclasses.replace(record, **change) if "latent" in change else record.having(**change)
    for refuse in (check_record, encode_record):
        with pytest.raises(DatasetError) as refusal:
            refuse(record)
        for word in ["folder/image_007.png", *words]:
            assert word in str(refusal.value)


def test_nearly_unit_vision_vectors_pass():
    record = make_record(0)
    check_record(record.having(vision=record.vision * np.float32(1.0009)))


@pytest.mark.parametrize(
    ("replacement", "words"),
    [
        ({"latent/shape": [4, 4, 5]}, ["latent", "[4, 4, 5]"]),
        ({"latent/shape": [4, 16]}, ["latent", "[4, 16]"]),
        ({"latent/shape": [-4, -4, 4]}, ["latent", "-4"]),
        ({"latent/shape": [-4, -4, -4]}, ["latent", "[-4, -4, -4]"]),
        ({"latent/shape": [0, 4, 4]}, ["latent", "[0, 4, 4]"]),
        ({"latent/shape": [1] * 30}, ["latent/shape", "3 integers"]),
        ({"latent/shape": [1] * 31}, ["latent/shape", "31 bytes"]),
        ({"latent/value": b"odd"}, ["latent/value", "3 bytes"]),
        ({"latent/value": None}, ["not a fluxdit record"]),
        ({"text": b""}, ["text", "0 values"]),
        ({"text": b"\0" * 2 * (TEXT_WIDTH + 1)}, ["text", f"width {TEXT_WIDTH}"]),
        ({"original_size": [1]}, ["original_size"]),
        ({"encoded_size": [1, 2, 3]}, ["encoded_size"]),
        ({"key": b"\xff"}, ["Unicode"]),
        ({"caption": None}, ["caption"]),
        ({"vision": b"123"}, ["vision", "3 bytes"]),
        ({"content_hash": None}, ["content_hash"]),
    ],
)
def test_damaged_fields_are_refused_when_decoding(replacement, words):
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example.FromString(encode_record(make_record(0)))
    for name, value in replacement.items():
        feature = example.features.feature[name]
        feature.Clear()
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif value is not None:
            feature.int64_list.value.extend(value)
    with pytest.raises(DatasetError) as refusal:
        decode_record(example.SerializeToString(), LAYOUT)
    for word in words:
        assert word in str(refusal.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_decoding_a_damaged_record_gives_a_record_or_dataset_error(draw):
    data = bytearray(encode_record(make_record(3, (2, 2))))
    for _ in range(draw.draw(st.integers(1, 3))):
        how = draw.draw(st.sampled_from(["flip", "cut", "double"]))
        at = draw.draw(st.integers(0, len(data) - 1))
        if how == "flip":
            data[at] ^= 1 << draw.draw(st.integers(0, 7))
        elif how == "cut":
            del data[at : at + draw.draw(st.integers(1, 20))]
        else:
            data[at:at] = data[at : at + 5]
        if not data:
            break
    try:
        record = decode_record(bytes(data), LAYOUT)
    except DatasetError:
        return
    assert record.latent.ndim == 3 and record.text.shape[1] == TEXT_WIDTH


def test_a_field_that_an_example_has_not_is_refused_in_words():
    with pytest.raises(DatasetError, match=r"tf\.train\.Example"):
        decode_record(encode_record(make_record(0)) + b"\x12\x00", LAYOUT)  # field 2, empty


def test_integers_that_are_cut_short_are_named():
    data = encode_record(make_record(1))
    end = data.index(b"\n\x04text") - 2  # behind the list of the two sides of the image, before the next entry
    with pytest.raises(DatasetError, match="original_size.*cut"):
        decode_record(data[: end - 1] + b"\x80" + data[end:], LAYOUT)


def test_decoding_with_a_width_of_zero_is_a_dataset_error():
    with pytest.raises(DatasetError):
        decode_record(encode_record(make_record(0)), {"text": 0, "vision": None})


def test_tfds_reads_and_writes_the_same_bytes(tmp_path):
    record = make_record(5, (2, 6))
    features = tfds_features(write_dataset(tmp_path))
    example = features.deserialize_example_np(encode_record(record))
    assert example["key"] == record.key.encode()
    assert example["caption"] == record.caption.encode()
    assert example["content_hash"] == record.content_hash.encode()
    assert tuple(example["original_size"]) == record.original_size
    assert tuple(example["encoded_size"]) == record.encoded_size
    assert example["original_size"].dtype == example["encoded_size"].dtype == np.int64
    for name in ("latent", "text", "vision"):
        stored = getattr(record, name)
        assert example[name].dtype == stored.dtype
        assert example[name].shape == stored.shape
        assert example[name].tobytes() == stored.tobytes()
    written = features.serialize_example({field: getattr(record, field) for field in example})
    assert values(decode_record(written, LAYOUT)) == values(record)
