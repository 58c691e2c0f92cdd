"""The dataset contract against TFDS, and every way in which records and manifests can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import CHANNELS, TEXT_WIDTH, VISION_WIDTH, make_record

from fluxdit_jax.records import (
    BF16,
    DatasetError,
    EncoderIdentity,
    Manifest,
    Record,
    Shard,
    check_record,
    decode_record,
    encode_record,
    load_manifest,
    sha256_file,
    shard_name,
    tfds_features,
)

# ------------------------------------------------------------------------------------------------ records


def assert_same_record(a: Record, b: Record) -> None:
    for field in dataclasses.fields(Record):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), field.name
        else:
            assert x == y, field.name


def test_bytes_do_not_depend_on_memory_layout():
    record = make_record(1)
    shuffled = dataclasses.replace(record, latent=np.asfortranarray(record.latent), text=record.text[::-1][::-1])
    assert not shuffled.latent.flags.c_contiguous
    assert encode_record(shuffled) == encode_record(record)


def test_bytes_are_pinned():
    """A change of the format must be made on purpose, with FORMAT_VERSION."""
    record = Record(
        key="k",
        caption="c",
        latent=np.arange(4).reshape(1, 2, 2).astype(BF16),
        text=np.ones((1, 2), BF16),
        vision=np.array([0.6, 0.8], np.float32),
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
    record = dataclasses.replace(make_record(7), **change)
    for refuse in (check_record, encode_record):
        with pytest.raises(DatasetError) as refusal:
            refuse(record)
        for word in ["folder/image_007.png", *words]:
            assert word in str(refusal.value)


def test_nearly_unit_vision_vectors_pass():
    record = make_record(0)
    check_record(dataclasses.replace(record, vision=record.vision * np.float32(1.0009)))


@pytest.mark.parametrize(
    ("replacement", "words"),
    [
        ({"latent/shape": [4, 4, 5]}, ["latent", "[4, 4, 5]"]),
        ({"latent/shape": [4, 16]}, ["latent", "[4, 16]"]),
        ({"latent/shape": [-4, -4, 4]}, ["latent", "-4"]),
        ({"latent/value": b"odd"}, ["latent/value", "3 bytes"]),
        ({"latent/value": None}, ["latent/value"]),
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
        decode_record(example.SerializeToString(), TEXT_WIDTH)
    for word in words:
        assert word in str(refusal.value)


@settings(max_examples=400, deadline=None)
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
        record = decode_record(bytes(data), TEXT_WIDTH)
    except DatasetError:
        return
    assert record.latent.ndim == 3 and record.text.shape[1] == TEXT_WIDTH


def test_a_field_that_an_example_has_not_is_refused_in_words():
    with pytest.raises(DatasetError, match=r"tf\.train\.Example"):
        decode_record(encode_record(make_record(0)) + b"\x12\x00", TEXT_WIDTH)  # field 2, empty


def test_decoding_with_a_width_of_zero_is_a_dataset_error():
    with pytest.raises(DatasetError):
        decode_record(encode_record(make_record(0)), 0)


def test_tfds_reads_and_writes_the_same_bytes():
    record = make_record(5, (2, 6))
    features = tfds_features(CHANNELS, TEXT_WIDTH, VISION_WIDTH)
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
    assert_same_record(decode_record(written, TEXT_WIDTH), record)


# ------------------------------------------------------------------------------------------------ manifest


def a_manifest(**changes) -> Manifest:
    values: dict[str, object] = dict(  # noqa: C408
        name="faces",
        resolution=256,
        modulus=64,
        fit="crop",
        vae=EncoderIdentity("vae/id", "abc", "12", "bfloat16", 2, {"factor": 8, "mode": "mean"}),
        text=EncoderIdentity("t5", "", "34", "bfloat16", 8),
        vision=EncoderIdentity("dino", "", "56", "bfloat16", 6),
        buckets=((256, 256), (192, 320)),
        latent_mean=(0.1, -0.2),
        latent_std=(1 / 3, 2.0),
        latent_count=1234567890123,
        text_tokens=77,
        shards={
            "train": (
                Shard("faces-train-0", "aa", 10, 3, {"256x256": 3}),
                Shard("b", "bb", 9, 2, {"1x1": 2}),
            ),
            "holdout": (Shard("c", "cc", 8, 1, {"256x256": 1}),),
        },
        rejects=4,
    )
    return Manifest(**(values | changes))


def checked(raw: dict) -> str:
    """The JSON of a manifest with the checksum of its content, as a faulty writer would make it."""
    raw = {name: value for name, value in raw.items() if name != "checksum"}
    checksum = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    return json.dumps(raw | {"checksum": checksum})


def test_the_helper_makes_the_checksum_of_the_module():
    text = a_manifest().to_json()
    assert json.loads(checked(json.loads(text))) == json.loads(text)


REMOVE = object()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("version",), 2, ["version", "2"]),
        (("version",), REMOVE, ["version", "None"]),
        (("latent_mean",), [0.0], ["latent_mean", "2 channels"]),
        (("latent_mean",), [0.0, None], ["latent_mean"]),
        (("latent_mean",), "ab", ["latent_mean"]),
        (("latent_std",), [1.0, 1.0, 1.0], ["latent_std", "2 channels"]),
        (("latent_std",), [1.0, 0.0], ["latent_std", "above 0"]),
        (("latent_std",), [1.0, -1.0], ["latent_std", "above 0"]),
        (("latent_std",), [1.0, float("nan")], ["latent_std", "finite"]),
        (("latent_mean",), [float("inf"), 0.0], ["latent_mean", "finite"]),
        (("latent_mean",), [10**400, 0.0], ["latent_mean"]),
        (("vae", "options"), {}, ["vae.options", "factor"]),
        (("vae", "options"), [], ["vae.options"]),
        (("vae", "options", "factor"), 0, ["factor"]),
        (("vae", "options", "factor"), "8", ["factor"]),
        (("vae", "width"), "2", ["vae.width"]),
        (("vae", "width"), 0, ["VAE has 0 channels"]),
        (("vae", "id"), 5, ["vae.id"]),
        (("vae", "surprise"), 1, ["surprise"]),
        (("vae",), None, [" vae ", "None"]),
        (("text",), [], [" text ", "[]"]),
        (("text", "width"), 1.5, ["text.width"]),
        (("vision", "sha256"), REMOVE, ["sha256"]),
        (("vision", "width"), -1, ["vision.width"]),
        (("buckets",), [], ["bucket"]),
        (("buckets",), [[0, 64]], ["bucket"]),
        (("buckets",), [[64]], ["buckets"]),
        (("buckets",), [[64, float("inf")]], ["buckets"]),
        (("buckets",), [["x", 64]], ["buckets"]),
        (("buckets",), 5, ["buckets"]),
        (("shards",), [], ["shards"]),
        (("shards", "train"), None, ["shards"]),
        (("shards", "train"), [{}], ["shards", "file"]),
        (("shards", "train", 0, "file"), "../x", ["shard", "../x"]),
        (("shards", "train", 0, "file"), "/etc/passwd", ["shard", "/etc/passwd"]),
        (("shards", "train", 0, "file"), "", ["shard"]),
        (("shards", "train", 0, "file"), 5, ["file"]),
        (("shards", "train", 0, "records"), 0, ["records"]),
        (("shards", "train", 0, "records"), "3", ["records"]),
        (("shards", "train", 0, "bytes"), None, ["bytes"]),
        (("text_tokens",), 0, ["text_tokens"]),
        (("text_tokens",), "many", ["text_tokens"]),
        (("resolution",), "256", ["resolution"]),
        (("name",), REMOVE, ["missing", " name"]),
    ],
)
def test_manifest_refusals_name_file_and_field(path, value, words):
    raw = json.loads(a_manifest().to_json())
    place = raw
    for key in path[:-1]:
        place = place[key]
    if value is REMOVE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(DatasetError) as refusal:
        Manifest.from_json(checked(raw), "some/manifest.json")
    for word in ["some/manifest.json", *words]:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', pytest.param("[" * 100_000, id="deep"), '{"version": 1}']
)
def test_text_that_is_no_manifest_is_refused(text):
    with pytest.raises(DatasetError, match=r"some/manifest\.json"):
        Manifest.from_json(text, "some/manifest.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_mutilated_manifest_gives_a_manifest_or_dataset_error(draw):
    raw = json.loads(a_manifest().to_json())
    for _ in range(draw.draw(st.integers(1, 2))):
        place = raw
        while True:
            keys = range(len(place)) if isinstance(place, list) else list(place)
            if not keys:
                break
            key = draw.draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw.draw(st.booleans()):
                place = place[key]
                continue
            if isinstance(place, dict) and draw.draw(st.booleans()):
                del place[key]
            else:
                place[key] = draw.draw(json_values)
            break
    try:
        manifest = Manifest.from_json(checked(raw))
    except DatasetError:
        return
    # what is accepted can be used
    assert manifest.latent_sizes() and manifest.records("train") >= 0
    assert all(isinstance(w, int) and w > 0 for w in (manifest.vae.width, manifest.text.width))


def test_load_manifest_names_the_path_and_what_to_do(tmp_path):
    with pytest.raises(DatasetError) as refusal:
        load_manifest(tmp_path)
    assert str(tmp_path / "manifest.json") in str(refusal.value)
    assert "python -m preprocess build" in str(refusal.value)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="manifest.json .*decode"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(a_manifest().to_json())
    assert load_manifest(str(tmp_path)) == a_manifest()


def test_a_directory_in_place_of_the_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DatasetError, match="manifest.json.*directory"):
        load_manifest(tmp_path)


def test_shard_names_are_those_of_tfds(tmp_path):
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=tmp_path,
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name="faces",
        split="train",
        filetype_suffix="array_record",
    )
    expected = template.sharded_filepath(shard_index=3, num_shards=42)
    assert shard_name("faces", "train", 3, 42) == expected.name


def test_sha256_of_a_file_longer_than_a_buffer(tmp_path):
    data = np.random.default_rng(0).bytes(3 * 2**20 + 17)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
