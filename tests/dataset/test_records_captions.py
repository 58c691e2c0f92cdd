"""The further captions of a picture: what is written of them, read in place, and refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_values import values
from tensorflow_datasets.proto import tf_example_pb2
from training_helpers import (
    LAYOUT,
    TEXT_WIDTH,
    make_record,
    write_dataset,
    write_shard,
)
from wording import naming

from fluxdit_jax.dataset import records, tf_example
from fluxdit_jax.dataset.captions import MAX_CAPTIONS
from fluxdit_jax.dataset.fields import BF16
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.dataset.records import (
    Record,
    check_fit,
    check_record,
    decode_record,
    encode_record,
    serialize_unchecked,
    tfds_features,
)
from fluxdit_jax.loader.reader import RecordSource

ONE, SEVERAL = (form.features for form in records._forms(tuple(LAYOUT.items())))


def assert_same(one: Record, two: Record) -> None:
    assert values(one) == values(two)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(st.lists(st.tuples(TEXT, st.integers(1, 9)), max_size=8), st.integers(0, 2**20))
@settings(deadline=None, max_examples=100)
def test_captions_come_back_bit_for_bit_without_the_library(others, seed):
    rng = np.random.default_rng(seed)
    texts = tuple(rng.normal(size=(n, TEXT_WIDTH)).astype(BF16) for _, n in others)
    original = dataclasses.replace(
        make_record(seed),
        other_captions=tuple(caption for caption, _ in others),
        other_conditions={"text": texts} if others else {},
    )
    data = encode_record(original)
    assert tf_example.spans(data, SEVERAL if others else ONE)
    again = decode_record(data, LAYOUT)
    check_record(again)
    assert_same(again, original)
    assert encode_record(again) == data


@pytest.mark.parametrize("length", range(8))
def test_texts_are_right_wherever_they_lie(length):
    record = dataclasses.replace(make_record(4, captions=3), key="k" * length)
    assert_same(decode_record(encode_record(record), LAYOUT), record)


def test_the_most_captions_there_may_be():
    assert_same(
        decode_record(encode_record(make_record(0, captions=MAX_CAPTIONS)), LAYOUT),
        make_record(0, captions=MAX_CAPTIONS),
    )
    with pytest.raises(DatasetError, match="image_000.png.*101 captions.*at most 100"):
        encode_record(make_record(0, captions=MAX_CAPTIONS + 1))
    with pytest.raises(DatasetError, match=naming("other_captions", 99)):
        decode_record(serialize_unchecked(make_record(0, captions=MAX_CAPTIONS + 1)), LAYOUT)


def test_another_order_of_fields_is_read_by_the_library():
    record = make_record(2, captions=4)
    message = tf_example_pb2.Example.FromString(encode_record(record))
    message.features.feature["score"].float_list.value.append(1.5)
    assert_same(decode_record(message.SerializeToString(), LAYOUT), record)


def test_tfds_reads_the_first_caption(tmp_path):
    record = make_record(5, (2, 6), captions=4)
    found = tfds_features(write_dataset(tmp_path)).deserialize_example_np(encode_record(record))
    assert found["caption"] == record.caption.encode() and not any(name.startswith("other") for name in found)
    assert found["text"].tobytes() == record.text.tobytes()


def changed(**features: list[int] | bytes | None) -> bytes:
    """A record of 3 captions, of 2, 3 and 4 tokens, with other values of these features; None: without it."""
    message = tf_example_pb2.Example.FromString(encode_record(make_record(1, captions=3)))
    for name, value in features.items():
        feature = message.features.feature[name]
        feature.Clear()
        if value is None:
            del message.features.feature[name]
        elif isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.extend(value)
    return message.SerializeToString(deterministic=True)


ROW = 2 * TEXT_WIDTH  # bytes of a token


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"other_captions": None}, "other_captions is missing"),
        ({"other_lengths": None}, "other_lengths is missing"),
        ({"other_text": None}, "other_text is missing"),
        ({"other_lengths": []}, "other_lengths is missing"),
        ({"other_captions": None, "other_text": None}, "other_captions is missing"),
        ({"other_captions": b'["a"]'}, "other_captions has 1 captions, other_lengths is .3, 4."),
        ({"other_captions": b'["a", "b", "c"]'}, "other_captions has 3 captions"),
        ({"other_captions": b"[]", "other_lengths": [7]}, "other_captions must be an array"),
        ({"other_captions": b'{"a": 1, "b": 2}'}, "other_captions must be an array"),
        ({"other_captions": b'"ab"'}, "other_captions must be an array"),
        ({"other_captions": b'["a", 2]'}, "other_captions is not a JSON array of texts"),
        ({"other_captions": b"3"}, "other_captions is not a JSON array of texts"),
        ({"other_captions": b'["a", "b"'}, "other_captions is not a JSON array of texts"),
        ({"other_captions": b'["a", "\xff"]'}, "other_captions is not a JSON array of texts"),
        ({"other_captions": b'["a", "\\ud800"]'}, "other_captions is not a JSON array of texts"),
        ({"other_captions": b"[" * 100_000}, "other_captions is not a JSON array of texts"),
        ({"other_lengths": [7, 0]}, "other_lengths is .7, 0."),
        ({"other_lengths": [8, -1]}, "other_lengths is .8, -1."),
        ({"other_lengths": [3, 5]}, "other_text has 56 values, not 8 rows"),
        ({"other_lengths": [2**62, 2**62]}, "other_text has 56 values"),
        ({"other_lengths": [1] * 1001}, "other_lengths has 1001 bytes"),
        ({"other_text": bytes(6 * ROW)}, "other_text has 48 values, not 7 rows"),
        ({"other_text": bytes(7 * ROW - 1)}, "other_text has 111 bytes"),
        ({"other_text": b""}, "other_text has 0 values"),
    ],
)
def test_damage_is_named_by_its_feature(features, words):
    with pytest.raises(DatasetError, match=words):
        decode_record(changed(**features), LAYOUT)


def test_lengths_that_are_cut_short_are_named():
    data = encode_record(make_record(1, captions=3))
    (_, end) = dict(zip(SEVERAL, tf_example.spans(data, SEVERAL), strict=True))[b"other_lengths"]
    with pytest.raises(DatasetError, match="other_lengths.*cut"):
        decode_record(data[: end - 1] + b"\x80" + data[end:], LAYOUT)


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(deadline=None, max_examples=300)
def test_a_flipped_byte_gives_a_record_or_the_named_error(position, flip):
    data = bytearray(encode_record(make_record(3, captions=4)))
    data[position % len(data)] ^= flip
    try:
        record = decode_record(bytes(data), LAYOUT)
        check_record(record)
    except DatasetError:
        return
    assert len(record.captions) == len(record.texts)


BAD_TEXTS = {
    "text of caption 3 has a value that is not finite": np.full((2, TEXT_WIDTH), np.nan, BF16),
    r"text of caption 3 must be bfloat16 \[n >= 1, width\], got bfloat16 \[0, 8\]": np.zeros((0, TEXT_WIDTH), BF16),
    "text of caption 3 has width 9, not 8": np.zeros((2, TEXT_WIDTH + 1), BF16),
    r"text of caption 3 must be bfloat16 .*got float32": np.zeros((2, TEXT_WIDTH), np.float32),
    r"text of caption 3 must be bfloat16 .*got bfloat16 \[8\]": np.zeros(TEXT_WIDTH, BF16),
    r"text of caption 3 must be bfloat16 .*got bfloat16 \[2, 8, 1\]": np.zeros((2, TEXT_WIDTH, 1), BF16),
}  # fmt: skip


@pytest.mark.parametrize("words", BAD_TEXTS)
def test_a_poisonous_text_is_neither_written_nor_accepted(words):
    record = make_record(0, captions=3)
    bad = dataclasses.replace(record, other_conditions={"text": (record.texts[1], BAD_TEXTS[words])})
    with pytest.raises(DatasetError, match=f"image_000.png.*{words}"):
        encode_record(bad)
    with pytest.raises(DatasetError, match="3 captions with 2 of text"):
        encode_record(dataclasses.replace(record, other_conditions={"text": record.texts[1:2]}))
    with pytest.raises(DatasetError, match="3 captions with 1 of text"):
        encode_record(dataclasses.replace(record, other_conditions={}))


def test_what_is_not_made_from_captions_is_refused_for_further_ones():
    record = make_record(0, captions=2)
    others = record.other_conditions | {"vision": (record.vision,)}
    with pytest.raises(DatasetError, match="image_000.png.*vision of further captions"):
        encode_record(dataclasses.replace(record, other_conditions=others))


@pytest.mark.parametrize("without", [{"other_captions": ()}, {"other_conditions": {}}], ids=["captions", "texts"])
def test_captions_without_texts_and_texts_without_captions_are_read_as_damage(without):
    record = dataclasses.replace(make_record(0, captions=3), **without)
    with pytest.raises(DatasetError, match="other_"):
        decode_record(serialize_unchecked(record), LAYOUT)


def test_a_further_caption_longer_than_the_manifest_says_is_damage(tmp_path):
    manifest = write_dataset(tmp_path, captions=(2,))
    record = make_record(0, captions=3)
    check_fit(record, manifest)
    texts = (record.texts[1], np.ones((6, TEXT_WIDTH), BF16))
    long = dataclasses.replace(record, other_conditions={"text": texts})
    with pytest.raises(DatasetError, match=naming("image_000.png", "tokens", 6, 5)):
        check_fit(long, manifest)
    path = tmp_path / manifest.shards["train"][0].file
    write_shard(path, [serialize_unchecked(long), *(encode_record(make_record(i)) for i in range(1, 12))])
    shard = dataclasses.replace(manifest.shards["train"][0], bytes=path.stat().st_size)
    manifest = dataclasses.replace(manifest, shards={"train": (shard, manifest.shards["train"][1])})
    with pytest.raises(DatasetError, match=r"row 0 \(record 0\).*6 text tokens"):
        RecordSource(tmp_path, manifest, "train")[0]
