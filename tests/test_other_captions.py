"""Several captions of one picture: stored, read in place, and drawn by (seed, sample number)."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2
from training_helpers import (
    CHANNELS,
    TEXT_WIDTH,
    UNEVEN_SIZES,
    VISION_WIDTH,
    joined,
    make_record,
    read_batches,
    tree_equal,
    write_config,
    write_dataset,
    write_shard,
)
from training_helpers import tiny_config as make_config
from wording import naming

from fluxdit_jax import example, records, run_directory
from fluxdit_jax.data import RecordSource, batches
from fluxdit_jax.other_captions import MAX_CAPTIONS, draw
from fluxdit_jax.records import (
    BF16,
    DatasetError,
    Record,
    check_fit,
    check_record,
    decode_record,
    encode_record,
    load_manifest,
    serialize_unchecked,
    tfds_features,
)

pytest_plugins = ("training_fixtures",)

COUNTS = (1, 3, 2, 5)  # captions of record i, counted round


def assert_same(one: Record, two: Record) -> None:
    assert one.captions == two.captions and len(one.texts) == len(two.texts)
    for a, b in zip([*one.texts, one.latent, one.vision], [*two.texts, two.latent, two.vision], strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    assert (one.key, one.content_hash) == (two.key, two.content_hash)
    assert (one.original_size, one.encoded_size) == (two.original_size, two.encoded_size)


# ------------------------------------------------------------------------------------------------ records


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(st.lists(st.tuples(TEXT, st.integers(1, 9)), max_size=8), st.integers(0, 2**20))
@settings(deadline=None, max_examples=100)
def test_captions_come_back_bit_for_bit_without_the_library(others, seed):
    rng = np.random.default_rng(seed)
    original = dataclasses.replace(
        make_record(seed),
        other_captions=tuple(caption for caption, _ in others),
        other_texts=tuple(rng.normal(size=(n, TEXT_WIDTH)).astype(BF16) for _, n in others),
    )
    data = encode_record(original)
    assert example.spans(data, records._SEVERAL if others else records._FEATURES)
    again = decode_record(data, TEXT_WIDTH)
    check_record(again)
    assert_same(again, original)
    assert encode_record(again) == data


@pytest.mark.parametrize("length", range(8))
def test_texts_are_right_wherever_they_lie(length):
    record = dataclasses.replace(make_record(4, captions=3), key="k" * length)
    assert_same(decode_record(encode_record(record), TEXT_WIDTH), record)


def test_the_most_captions_there_may_be():
    assert_same(
        decode_record(encode_record(make_record(0, captions=MAX_CAPTIONS)), TEXT_WIDTH),
        make_record(0, captions=MAX_CAPTIONS),
    )
    with pytest.raises(DatasetError, match=naming("image_000.png", 101, 100)):
        encode_record(make_record(0, captions=MAX_CAPTIONS + 1))
    with pytest.raises(DatasetError, match=naming("other_captions", 1, 99)):
        decode_record(serialize_unchecked(make_record(0, captions=MAX_CAPTIONS + 1)), TEXT_WIDTH)


def test_another_order_of_fields_is_read_by_the_library():
    record = make_record(2, captions=4)
    message = tf_example_pb2.Example.FromString(encode_record(record))
    message.features.feature["score"].float_list.value.append(1.5)
    assert_same(decode_record(message.SerializeToString(), TEXT_WIDTH), record)


def test_tfds_reads_the_first_caption():
    record = make_record(5, (2, 6), captions=4)
    found = tfds_features(CHANNELS, TEXT_WIDTH, VISION_WIDTH).deserialize_example_np(encode_record(record))
    assert found["caption"] == record.caption.encode() and not any(name.startswith("other") for name in found)
    assert found["text"].tobytes() == record.text.tobytes()


def changed(**values: list[int] | bytes | None) -> bytes:
    """A record of 3 captions, of 2, 3 and 4 tokens, with other values of these features; None: without it."""
    message = tf_example_pb2.Example.FromString(encode_record(make_record(1, captions=3)))
    for name, value in values.items():
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
    ("values", "named"),
    [
        ({"other_captions": None}, ["other_captions"]),
        ({"other_lengths": None}, ["other_lengths"]),
        ({"other_text": None}, ["other_text"]),
        ({"other_lengths": []}, ["other_lengths"]),
        ({"other_captions": None, "other_text": None}, ["other_captions"]),
        ({"other_captions": b'["a"]'}, ["other_captions", 1, "other_lengths", "[3, 4]"]),
        ({"other_captions": b'["a", "b", "c"]'}, ["other_captions", 3, "other_lengths"]),
        ({"other_captions": b"[]", "other_lengths": [7]}, ["other_captions", 1, 99]),
        ({"other_captions": b'{"a": 1, "b": 2}'}, ["other_captions", 1, 99]),
        ({"other_captions": b'"ab"'}, ["other_captions", 1, 99]),
        ({"other_captions": b'["a", 2]'}, ["other_captions", "JSON"]),
        ({"other_captions": b"3"}, ["other_captions", "JSON"]),
        ({"other_captions": b'["a", "b"'}, ["other_captions", "JSON"]),
        ({"other_captions": b'["a", "\xff"]'}, ["other_captions", "JSON"]),
        ({"other_captions": b'["a", "\\ud800"]'}, ["other_captions", "JSON"]),
        ({"other_captions": b"[" * 100_000}, ["other_captions", "JSON"]),
        ({"other_lengths": [7, 0]}, ["other_lengths", "[7, 0]"]),
        ({"other_lengths": [8, -1]}, ["other_lengths", "[8, -1]"]),
        ({"other_lengths": [3, 5]}, ["other_text", 56, 8]),
        ({"other_lengths": [2**62, 2**62]}, ["other_text", 56]),
        ({"other_lengths": [1] * 1001}, ["other_lengths", 1001, 100]),
        ({"other_text": bytes(6 * ROW)}, ["other_text", 48, 7]),
        ({"other_text": bytes(7 * ROW - 1)}, ["other_text", 111]),
        ({"other_text": b""}, ["other_text", 0]),
    ],
)
def test_damage_is_named_by_its_feature(values, named):
    with pytest.raises(DatasetError, match=naming(*named)):
        decode_record(changed(**values), TEXT_WIDTH)


def test_lengths_that_are_cut_short_are_named():
    data = encode_record(make_record(1, captions=3))
    (_, end) = dict(zip(records._SEVERAL, example.spans(data, records._SEVERAL), strict=True))[b"other_lengths"]
    with pytest.raises(DatasetError, match="other_lengths"):
        decode_record(data[: end - 1] + b"\x80" + data[end:], TEXT_WIDTH)


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(deadline=None, max_examples=300)
def test_a_flipped_byte_gives_a_record_or_the_named_error(position, flip):
    data = bytearray(encode_record(make_record(3, captions=4)))
    data[position % len(data)] ^= flip
    try:
        record = decode_record(bytes(data), TEXT_WIDTH)
        check_record(record)
    except DatasetError:
        return
    assert len(record.captions) == len(record.texts)


BAD_TEXTS = {
    "text.* 3 .*finite": np.full((2, TEXT_WIDTH), np.nan, BF16),
    r"text.* 3 .*bfloat16 \[0, 8\]": np.zeros((0, TEXT_WIDTH), BF16),
    r"text.* 3 .*bfloat16 \[2, 9\]": np.zeros((2, TEXT_WIDTH + 1), BF16),
    r"text.* 3 .*float32": np.zeros((2, TEXT_WIDTH), np.float32),
}  # fmt: skip


@pytest.mark.parametrize("words", BAD_TEXTS)
def test_a_poisonous_text_is_neither_written_nor_accepted(words):
    record = make_record(0, captions=3)
    bad = dataclasses.replace(record, other_texts=(record.other_texts[0], BAD_TEXTS[words]))
    with pytest.raises(DatasetError, match=f"image_000.png.*{words}"):
        encode_record(bad)
    with pytest.raises(DatasetError, match=naming("image_000.png", 3, 2)):
        encode_record(dataclasses.replace(record, other_texts=record.other_texts[:1]))


def test_a_further_caption_longer_than_the_manifest_says_is_damage(tmp_path):
    manifest = write_dataset(tmp_path, captions=(2,))
    record = make_record(0, captions=3)
    check_fit(record, manifest)
    long = dataclasses.replace(record, other_texts=(record.other_texts[0], np.ones((6, TEXT_WIDTH), BF16)))
    with pytest.raises(DatasetError, match=naming("image_000.png", "tokens", 6, 5)):
        check_fit(long, manifest)
    path = tmp_path / manifest.shards["train"][0].file
    write_shard(path, [serialize_unchecked(long), *(encode_record(make_record(i)) for i in range(1, 12))])
    shard = dataclasses.replace(manifest.shards["train"][0], bytes=path.stat().st_size)
    manifest = dataclasses.replace(manifest, shards={"train": (shard, manifest.shards["train"][1])})
    with pytest.raises(DatasetError, match=r"row 0 \(record 0\).*\b6\b.*tokens"):
        RecordSource(tmp_path, manifest, "train")[0]


# ------------------------------------------------------------------------------------------------ the draw


def shares(weights, count):
    """What `draw` is to give, in closed form."""
    known = [*weights[:count]] or [1.0]
    known += known[-1:] * (count - len(known))
    return np.array(known) / sum(known)


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
@pytest.mark.parametrize(
    ("weights", "count"),
    [
        ((), 1), ((), 5), ((3.0,), 4), ((1.0, 0.5), 2), ((1.0, 0.5), 4), ((0.0, 1.0), 3), ((1, 0), 4),
        ((2.0, 0.0, 1.0), 3), ((5e-324, 5e-324), 2), ((1e6, 1e-6), 2), ((1.0,) * 100, 100), ((9.0, 1.0, 1.0, 7.0), 2),
    ],
)  # fmt: skip
def test_captions_are_drawn_as_often_as_their_weights_say(seed, weights, count):
    total = 20_000
    found = collections.Counter(draw(seed, number, count, weights) for number in range(total))
    expected = shares(weights, count)
    assert set(found) <= set(np.flatnonzero(expected))
    for caption, share in enumerate(expected):
        deviation = math.sqrt(total * share * (1 - share))
        assert abs(found[caption] - total * share) <= 5 * deviation, caption
    met = expected > 0
    chi = sum((found[int(k)] - total * expected[k]) ** 2 / (total * expected[k]) for k in np.flatnonzero(met))
    freedom = int(met.sum()) - 1
    assert chi <= freedom + 6 * math.sqrt(2 * freedom) + 6


def test_draws_of_neighbours_of_seeds_and_of_numbers_are_independent():
    table = np.array([[draw(seed, number, 2) for number in range(4000)] for seed in range(4)])
    for one, two in [*itertools.combinations(table, 2), *((row[1:], row[:-1]) for row in table)]:
        assert abs((one == two).mean() - 0.5) < 5 * 0.5 / math.sqrt(len(one))


@pytest.mark.parametrize("weights", [(0.0,), (0.0, 0.0, 1.0)])
def test_where_all_weights_are_zero_it_is_the_first(weights):
    assert {draw(0, number, 2, weights) for number in range(100)} == {0}


def test_the_draw_is_pinned():
    """Another draw would make a resumed run meet other captions than before: a change must be made on purpose."""
    assert [draw(3, number, 4, (1.0, 0.5)) for number in range(12)] == [0, 1, 1, 3, 2, 3, 2, 3, 3, 1, 3, 1]


# ------------------------------------------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """24 training and 6 holdout records of 1, 3, 2 and 5 captions."""
    directory = tmp_path_factory.mktemp("captions") / "mixed"
    write_dataset(directory, captions=COUNTS)
    return directory


@pytest.fixture(scope="module")
def source(mixed):
    return RecordSource(mixed, load_manifest(mixed), "train")


def read(source, count, **changes):
    """The first `count` micro-batches from a position, joined."""
    return joined(read_batches(source, count, **changes))


def met(batch):
    """(record, caption, both from 0) of each row, by the vision vector and the tokens."""
    known = [make_record(i, UNEVEN_SIZES[i % 3], captions=COUNTS[i % 4]) for i in range(24)]
    by_vision = {record.vision.tobytes(): number for number, record in enumerate(known)}
    found = []
    for vision, text, length in zip(batch["vision"], batch["text"], batch["text_length"]):
        number = by_vision[vision.tobytes()]
        texts = [tokens.tobytes() for tokens in known[number].texts]
        found.append((number, texts.index(text[:length].tobytes())))
        assert not text[length:].any()
    return found


def test_a_sample_meets_the_caption_of_its_seed_and_number(source):
    weights = (2.0, 1.0)
    batch = read(source, 60, caption_weights=weights)
    found = met(batch)
    for index, (record, caption) in zip(batch["index"].tolist(), found, strict=True):
        assert caption == draw(3, index, COUNTS[record % 4], weights)
    assert {caption for record, caption in found if record % 4 == 3} == set(range(5))
    assert [c for _, c in met(read(source, 60, seed=4))] != [c for _, c in met(read(source, 60))]


def test_all_captions_are_met_over_the_epochs_as_often_as_the_weights_say(source):
    epochs = 60
    found = collections.Counter(met(read(source, 6 * epochs, caption_weights=(3.0, 1.0))))
    for record in range(24):
        expected = shares((3.0, 1.0), COUNTS[record % 4])
        assert sum(found[record, caption] for caption in range(len(expected))) == epochs
        for caption, share in enumerate(expected):
            assert abs(found[record, caption] - epochs * share) <= 5 * math.sqrt(epochs * share), caption


@pytest.mark.parametrize("weights", [(), (1.0, 0.25)])
def test_captions_do_not_depend_on_split_threads_processes_or_where_one_starts(source, weights):
    expected = read(source, 5, batch_size=24, caption_weights=weights)
    for size in (1, 3, 12):
        assert tree_equal(read(source, 120 // size, batch_size=size, caption_weights=weights), expected)
    assert tree_equal(read(source, 5, batch_size=24, threads=4, prefetch=8, caption_weights=weights), expected)
    parts = [
        batches(
            source, seed=3, start=0, batch_size=24, patch=2, tokens=4, text_tokens=5, threads=1, prefetch=1,
            caption_weights=weights, process=process, processes=3,
        )
        for process in range(3)
    ]  # fmt: skip
    together = [next(part) for _ in range(5) for part in parts]
    assert tree_equal({name: np.concatenate([p[name] for p in together]) for name in expected}, expected)
    for start in (1, 7, 23, 24, 100):
        resumed = read(source, 4, start=start, batch_size=5, caption_weights=weights)
        for name, array in resumed.items():
            assert array.tobytes() == expected[name][start : start + 20].tobytes(), name


def test_with_one_caption_every_batch_is_the_same_whatever_the_weights(tiny_dataset):
    source = RecordSource(tiny_dataset, load_manifest(tiny_dataset), "train")
    expected = read(source, 12)
    for weights in ((0.0, 1.0), (1.0,), (0.3, 0.0, 7.0)):
        assert tree_equal(read(source, 12, caption_weights=weights), expected)


def test_what_stands_in_for_damage_meets_the_caption_of_the_sample(tmp_path):
    manifest = write_dataset(tmp_path, captions=COUNTS)
    shard = tmp_path / manifest.shards["train"][0].file
    data = shard.read_bytes()
    at = data.index(make_record(5, UNEVEN_SIZES[2], captions=3).vision.tobytes())
    shard.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    batch = read(RecordSource(tmp_path, manifest, "train", "skip"), 30)
    assert batch["replaced"].sum() == 5
    for index, (record, caption) in zip(batch["index"].tolist(), met(batch), strict=True):
        assert caption == draw(3, index, COUNTS[record % 4])


# ------------------------------------------------------------------------------------------------ the command


def losses(workdir: Path) -> dict[int, float]:
    from fluxdit_jax.metrics import read_metrics

    return {e["step"]: e["loss"] for e in read_metrics(workdir / "metrics.jsonl") if "loss" in e}


def test_weights_on_the_command_line_decide_and_are_kept(mixed, tmp_path, train_command):
    config = write_config(tmp_path / "config.py", make_config(mixed, tmp_path / "a"))

    def run(workdir: str, *flags: str):
        return train_command.run(f"--config.workdir={tmp_path / workdir}", *flags, config=config)

    for workdir, flags in (
        ("a", ["--config.train.steps=4"]),
        ("b", ["--config.data.caption_weights=(1.0, 0.5)", "--config.train.steps=4"]),
        ("c", ["--config.data.caption_weights=(1.0, 0.5)"]),
    ):
        done = run(workdir, *flags)
        assert done.returncode == 0, done.stderr
    refused = run("b")
    assert refused.returncode == 1 and "data.caption_weights: (1.0, 0.5) -> ()" in refused.stderr
    resumed = run("b", "--config.data.caption_weights=(1, 0.5)", "--config.data.batch_size=8")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "a")[4] != losses(tmp_path / "c")[4]
    one, two = losses(tmp_path / "b"), losses(tmp_path / "c")
    assert one.keys() == two.keys() and len(one) == 8
    assert all(one[step] == pytest.approx(two[step], rel=1e-5) for step in two)
    assert run_directory.load_config(tmp_path / "c").data.caption_weights == (1.0, 0.5)
    refused = run("d", "--config.data.caption_weights=(nan, 1.0)")
    assert refused.returncode == 1 and "config.data.caption_weights is" in refused.stderr
    assert not (tmp_path / "d").exists()
