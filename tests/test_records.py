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
from wording import naming

from fluxdit_jax.records import (
    DatasetError,
    EncoderIdentity,
    Manifest,
    Record,
    Shard,
    check_record,
    decode_record,
    encode_record,
    load_manifest,
    shard_name,
)

BF16 = ml_dtypes.bfloat16


def record(seed: int = 0, h: int = 4, w: int = 6, n: int = 3, key: str = "a/b.jpg", caption: str = "a dog") -> Record:
    rng = np.random.default_rng(seed)
    vision = rng.normal(size=8).astype(np.float32)
    return Record(
        key=key,
        caption=caption,
        latent=rng.normal(size=(2, h, w)).astype(BF16),
        text=rng.normal(size=(n, 5)).astype(BF16),
        vision=vision / np.linalg.norm(vision),
        original_size=(h * 10, w * 10),
        encoded_size=(h * 8, w * 8),
        content_hash="ab" * 32,
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(st.integers(0, 2**20), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), TEXT, TEXT)
@settings(deadline=None, max_examples=100)
def test_a_record_comes_back_bit_for_bit(seed: int, h: int, w: int, n: int, key: str, caption: str) -> None:
    original = record(seed, h, w, n, key, caption)
    again = decode_record(encode_record(original), text_width=5)
    for field in dataclasses.fields(Record):
        one, two = getattr(original, field.name), getattr(again, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
        else:
            assert one == two
    assert encode_record(original) == encode_record(again)


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=300)
def test_random_bytes_are_no_record(data: bytes) -> None:
    with pytest.raises(DatasetError):
        decode_record(data, text_width=5)


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(deadline=None, max_examples=300)
def test_a_flipped_byte_gives_a_record_or_the_named_error(position: int, flip: int) -> None:
    data = bytearray(encode_record(record()))
    data[position % len(data)] ^= flip
    with contextlib.suppress(DatasetError):
        check_record(decode_record(bytes(data), text_width=5))


def doctored(**changes: object) -> Record:
    return dataclasses.replace(record(), **changes)


def poison(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.flat[1] = value
    return array


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (doctored(latent=poison(record().latent, np.nan)), "latent.*finite"),
        (doctored(text=poison(record().text, np.inf)), "text.*finite"),
        (doctored(vision=poison(record().vision, -np.inf)), "vision.*finite"),
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


def test_another_text_width_is_noticed() -> None:
    with pytest.raises(DatasetError, match=naming("text", 15, 4)):
        decode_record(encode_record(record()), text_width=4)


def manifest() -> Manifest:
    identity = EncoderIdentity("owner/model", "abc", "f" * 64, "bfloat16", 2, {"factor": 8})
    shard = Shard(shard_name("photos", "train", 0, 1), "0" * 64, 1234, 3, {"64x64": 3})
    return Manifest(
        name="photos",
        resolution=64,
        modulus=16,
        fit="resize",
        vae=identity,
        text=identity,
        vision=identity,
        buckets=((64, 64), (48, 80)),
        latent_mean=(0.1, -1 / 3),
        latent_std=(1.0, 2.0),
        latent_count=99,
        text_tokens=7,
        shards={"train": (shard,)},
        rejects=2,
    )


def test_a_manifest_comes_back_exactly() -> None:
    original = manifest()
    again = Manifest.from_json(original.to_json())
    assert again == original and again.to_json() == original.to_json()
    assert again.records("train") == 3 and again.records("holdout") == 0
    assert again.latent_sizes() == ((8, 8), (6, 10))


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
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
@settings(deadline=None)
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
