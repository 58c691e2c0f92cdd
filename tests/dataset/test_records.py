"""The dataset contract: round trips, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_values import values
from wording import naming

from fluxdit_jax.dataset.manifest import (
    DatasetError,
    EncoderIdentity,
    Manifest,
    Shard,
    json_checksum,
    load_manifest,
    shard_name,
)
from fluxdit_jax.dataset.records import Record, check_fit, check_record, decode_record, encode_record

BF16 = ml_dtypes.bfloat16


def record(seed: int = 0, h: int = 4, w: int = 6, n: int = 3, key: str = "a/b.jpg", caption: str = "a dog") -> Record:
    rng = np.random.default_rng(seed)
    vision = rng.normal(size=8).astype(np.float32)
    return Record(
        key=key,
        caption=caption,
        latent=rng.normal(size=(2, h, w)).astype(BF16),
        conditions={"text": rng.normal(size=(n, 5)).astype(BF16), "vision": vision / np.linalg.norm(vision)},
        original_size=(h * 10, w * 10),
        encoded_size=(h * 8, w * 8),
        content_hash="ab" * 32,
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


SIDE = st.integers(1, 9)
PIXELS = st.integers(1, 2**62)


@given(st.integers(0, 2**20), SIDE, SIDE, SIDE, TEXT, TEXT, st.tuples(PIXELS, PIXELS), st.tuples(PIXELS, PIXELS))
@settings(deadline=None, max_examples=100)
def test_a_record_comes_back_bit_for_bit(
    seed: int, h: int, w: int, n: int, key: str, caption: str, original_size: tuple, encoded_size: tuple
) -> None:
    original = dataclasses.replace(
        record(seed, h, w, n, key, caption), original_size=original_size, encoded_size=encoded_size
    )
    again = decode_record(encode_record(original), {"text": 5, "vision": None})
    assert values(again) == values(original)
    assert encode_record(original) == encode_record(again)


def test_the_arrays_are_views_of_what_was_read() -> None:
    one = record()
    others = {"text": (one.text, one.text[:1])}
    for written in (one, dataclasses.replace(one, other_captions=("b", "c"), other_conditions=others)):
        data = encode_record(written)
        again = decode_record(data, {"text": 5, "vision": None})
        for array in (again.latent, again.vision, *again.texts):
            assert np.shares_memory(array, np.frombuffer(data, np.uint8)) and not array.flags.writeable


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=300)
def test_random_bytes_are_no_record(data: bytes) -> None:
    with pytest.raises(DatasetError):
        decode_record(data, {"text": 5, "vision": None})


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(deadline=None, max_examples=300)
def test_a_flipped_byte_gives_a_record_or_the_named_error(position: int, flip: int) -> None:
    data = bytearray(encode_record(record()))
    data[position % len(data)] ^= flip
    with contextlib.suppress(DatasetError):
        check_record(decode_record(bytes(data), {"text": 5, "vision": None}))


def doctored(text: np.ndarray | None = None, vision: np.ndarray | None = None, **changes: object) -> Record:
    conditions = {name: array for name, array in (("text", text), ("vision", vision)) if array is not None}
    return dataclasses.replace(record().having(**conditions), **changes)


def poison(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[1] = value
    return array


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (doctored(latent=poison(record().latent, np.nan)), "latent.*finite"),
        (doctored(text=poison(record().text, np.inf)), "text.*finite"),
        (doctored(latent=poison(record().latent, -np.inf)), "latent.*finite"),
        (doctored(text=poison(record().text, -np.nan)), "text.*finite"),
        (doctored(vision=poison(record().vision, -np.inf)), "vision.*finite"),
        (doctored(vision=record().vision * np.float32(2**0.5)), r"vision.*norm.*1\.414214"),
        (doctored(vision=record().vision * np.float32(1.00103)), r"vision.*norm.*1\.001030"),
        (doctored(vision=record().vision * np.float32(0.99897)), r"vision.*norm.*0\.998970"),
        (doctored(vision=np.zeros(8, np.float32)), r"vision.*norm.*0\.000000"),
        (doctored(vision=record().vision * 2), r"vision.*norm.*2\.000000"),
        (doctored(text=np.zeros((0, 5), BF16)), r"text.*bfloat16.*\[0, 5\]"),
        (doctored(latent=np.zeros((2, 0, 4), BF16)), r"latent.*bfloat16.*\[2, 0, 4\]"),
        (doctored(latent=np.zeros((2, 4, 4), np.float32)), "latent.*float32"),
        (doctored(vision=np.zeros(8, np.float64)), "vision.*float32.*float64"),
    ],
)
def test_a_poisonous_record_is_neither_written_nor_accepted(bad: Record, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        encode_record(bad)


@pytest.mark.parametrize("factor", [0.99905, 0.9995, 1, 1.0009, 1.00098])
def test_a_vector_of_nearly_unit_norm_is_accepted(factor: float) -> None:
    check_record(doctored(vision=record().vision * np.float32(factor)))


def test_the_largest_finite_numbers_are_accepted() -> None:
    most = float(ml_dtypes.finfo(BF16).max)
    check_record(doctored(latent=poison(poison(record().latent, most), -most), text=poison(record().text, most)))
    check_record(doctored(latent=poison(record().latent, -most), text=poison(record().text, -most)))


def test_another_text_width_is_noticed() -> None:
    with pytest.raises(DatasetError, match=naming("text", 15, 4)):
        decode_record(encode_record(record()), {"text": 4, "vision": None})


def manifest() -> Manifest:
    identity = EncoderIdentity("owner/model", "abc", "f" * 64, "bfloat16", 2, {"factor": 8, "mode": "mean"})
    shard = Shard(shard_name("photos", "train", 0, 1), "0" * 64, 1234, 3, {"64x64": 3})
    return Manifest(
        name="photos",
        resolution=64,
        modulus=16,
        fit="resize",
        encoders={
            "vae": identity,
            "text": dataclasses.replace(identity, width=5, options={}),
            "vision": dataclasses.replace(identity, width=8, options={}),
        },
        buckets=((64, 64), (48, 80), (32, 48)),
        latent_mean=(0.1, -1 / 3),
        latent_std=(1.0, 2.0),
        latent_count=99,
        lengths={"text": 7},
        shards={"train": (shard,)},
    )


def test_a_manifest_comes_back_exactly() -> None:
    original = manifest()
    again = Manifest.from_json(original.to_json())
    assert again == original and again.to_json() == original.to_json()
    assert (again.version, again.rejects) == (1, 0)
    assert again.records("train") == 3 and again.records("holdout") == 0
    assert again.latent_sizes() == ((8, 8), (6, 10), (4, 6))


def test_the_order_in_which_values_were_given_changes_no_byte() -> None:
    one = dataclasses.replace(manifest(), shards=manifest().shards | {"holdout": ()})
    shards, options = dict(reversed(one.shards.items())), dict(reversed(one.vae.options.items()))
    encoders = dict(reversed((one.encoders | {"vae": dataclasses.replace(one.vae, options=options)}).items()))
    other = dataclasses.replace(one, shards=shards, encoders=encoders)
    assert list(other.shards) != list(one.shards) and list(other.encoders) != list(one.encoders)
    assert other.to_json() == one.to_json()
    assert json_checksum({"a": 1, "b": [2]}) == json_checksum({"b": [2], "a": 1}) != json_checksum({"a": 1, "b": [3]})


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_record_as_its_manifest_promises_fits(tokens: int) -> None:
    check_fit(record(n=tokens), manifest())
    check_fit(record(h=6, w=10), manifest())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(h=6, w=4), "32x48 .width x height. is not in the bucket table"),
        (record(h=5, w=6), "48x40 .width x height. is not in the bucket table"),
        (doctored(encoded_size=(32, 40)), r"latent \[2, 4, 6\] does not fit an image of 40x32"),
        (doctored(encoded_size=(40, 48)), r"latent \[2, 4, 6\] does not fit an image of 48x40"),
        (doctored(latent=np.ones((3, 4, 6), BF16)), r"latent \[3, 4, 6\] does not fit"),
        (doctored(vision=np.ones(7, np.float32)), "vision of width 7, the manifest says 8"),
        (record(n=8), "8 text tokens, the manifest says at most 7"),
    ],
)
def test_a_record_that_its_manifest_does_not_promise_is_named(bad: Record, message: str) -> None:
    with pytest.raises(DatasetError, match=f"a/b.jpg.*({message})"):
        check_fit(bad, manifest())


def test_any_edit_of_a_manifest_is_noticed() -> None:
    text = manifest().to_json()
    for position, character in enumerate(text):
        if character.isspace():
            continue
        changed = text[:position] + ("0" if character != "0" else "1") + text[position + 1 :]
        with pytest.raises(DatasetError):
            Manifest.from_json(changed)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
        max_leaves=5,
    )
)
@settings(deadline=None, max_examples=50)
def test_other_json_is_no_manifest(raw: object) -> None:
    with pytest.raises(DatasetError):
        Manifest.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_std": (1.0, 0.0)}, "latent_std.*0"),
        ({"latent_mean": (float("nan"), 0.0)}, "latent_mean.*finite"),
        ({"latent_mean": (0.0,)}, r"latent_mean.*\b1\b.*VAE.*\b2\b"),
        ({"buckets": ()}, "bucket"),
        ({"shards": {"train": (Shard("../x", "", 1, 1, {}),)}}, r"shard.*'\.\./x'"),
        ({"shards": {"train": (Shard("x", "", 1, 0, {}),)}}, r"shard.*'x'.*\b0\b"),
        ({"version": 2}, r"version.*\b2\b.*\b1\b"),
    ],
)
def test_impossible_manifests_are_named(changes: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        Manifest.from_json(dataclasses.replace(manifest(), **changes).to_json())


def test_a_missing_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=naming(tmp_path / "manifest.json", "python -m preprocess build")):
        load_manifest(tmp_path)
    with pytest.raises(DatasetError, match=naming(tmp_path / "moved", "--config.data.path", "--data")):
        load_manifest(tmp_path / "moved")
