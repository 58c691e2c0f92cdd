"""A serialised record read in place: what the protobuf library reads, or nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_values import values
from tensorflow_datasets.proto import tf_example_pb2
from training_helpers import LAYOUT, TEXT_WIDTH, batch_layout, make_record

from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.dataset.records import check_record, decode_record, encode_record
from fluxdit_jax.dataset.tf_example import BYTES, INTEGERS, integers, spans
from fluxdit_jax.loader.reader import collate


def by_the_library(data):
    """Of every feature: its byte strings, or its integers."""
    feature = tf_example_pb2.Example.FromString(data).features.feature
    return {
        name.encode(): list(value.bytes_list.value) or list(value.int64_list.value) for name, value in feature.items()
    }


def in_place(data, features):
    found = zip(features.items(), spans(data, features), strict=True)
    return {
        name: [data[start:end]] if kind == BYTES else list(integers(data[start:end]))
        for (name, kind), (start, end) in found
    }


INT64 = st.integers(-(2**63), 2**63 - 1)
FEATURES = st.dictionaries(
    # of one length: the library puts a name that another begins with behind that one
    st.text("abc/_", min_size=6, max_size=6),
    st.one_of(
        st.binary(max_size=300),
        st.integers(0, 2**18).map(bytes),  # lengths of one, two and three bytes
        st.lists(INT64, min_size=1),
    ),
    min_size=1,
)


def serialized(features):
    """An `Example` of these, and of each its kind, by name."""
    message, kinds = tf_example_pb2.Example(), {}
    for name, value in sorted(features.items()):
        kinds[name.encode()] = BYTES if isinstance(value, bytes) else INTEGERS
        if isinstance(value, bytes):
            message.features.feature[name].bytes_list.value.append(value)
        else:
            message.features.feature[name].int64_list.value.extend(value)
    return message.SerializeToString(deterministic=True), kinds


@given(FEATURES)
@settings(max_examples=100, deadline=None)
def test_what_is_found_is_what_the_library_reads(features):
    data, kinds = serialized(features)
    assert in_place(data, kinds) == by_the_library(data)


@pytest.mark.parametrize("power", range(1, 19))
def test_sizes_at_which_a_length_takes_another_byte(power):
    for size in range(max(0, 2**power - 40), 2**power + 2):
        data, kinds = serialized({"name": bytes(size), "other": [size]})
        assert in_place(data, kinds) == {b"name": [bytes(size)], b"other": [size]}


@given(FEATURES, st.data())
@settings(max_examples=100, deadline=None)
def test_other_features_than_expected_are_not_found(features, data):
    written, kinds = serialized(features)
    changed = dict(kinds)
    name = data.draw(st.sampled_from(sorted(kinds)))
    match data.draw(st.sampled_from(["another", "missing", "more", "of another kind"])):
        case "another":
            changed = {key + b"x" if key == name else key: kind for key, kind in kinds.items()}
        case "missing":
            del changed[name]
        case "more":
            changed[b"more"] = BYTES
        case _:
            changed[name] = BYTES + INTEGERS - kinds[name]
    assert spans(written, changed) is None


RECORD = encode_record(make_record(3))
KINDS = {
    name: INTEGERS if name in (b"latent/shape", b"original_size", b"encoded_size") else BYTES
    for name in sorted(by_the_library(RECORD))
}


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_changed_bytes_are_read_as_the_library_does_or_not_at_all(data):
    written = bytearray(RECORD)
    heads = [at for at in range(len(written)) if at < 40 or written[at] in (0x0A, 0x12, 0x1A)]
    for _ in range(data.draw(st.integers(1, 3))):
        written[data.draw(st.sampled_from(heads))] = data.draw(st.integers(0, 255))
    written = bytes(written)
    if (found := spans(written, KINDS)) is None:
        return
    try:
        library = by_the_library(written)
    except Exception:  # noqa: BLE001  a packed list cut short, which `integers` refuses too
        with pytest.raises(ValueError, match="cut short"):
            for kind, (start, end) in zip(KINDS.values(), found, strict=True):
                if kind == INTEGERS:
                    integers(written[start:end])
        return
    assert in_place(written, KINDS) == library


@pytest.mark.parametrize("size", range(0, len(RECORD), 97))
def test_a_record_cut_short_is_not_found(size):
    assert spans(RECORD, KINDS) is not None and spans(RECORD[:size], KINDS) is None


def test_another_order_of_fields_and_more_features_are_read_by_the_library():
    record = make_record(2)
    message = tf_example_pb2.Example.FromString(encode_record(record))
    message.features.feature["score"].float_list.value.append(1.5)
    message.features.feature["tags"].bytes_list.value.extend([b"a", b"b"])
    message.features.feature["größe"].int64_list.value.append(1)
    data = message.SerializeToString()
    assert spans(data, KINDS) is None
    assert values(decode_record(data, LAYOUT)) == values(record)


@pytest.mark.parametrize("length", range(8))
def test_arrays_are_right_wherever_they_lie(length):
    record = dataclasses.replace(make_record(4), caption="c" * length)
    again = decode_record(encode_record(record), LAYOUT)
    for name in ("latent", "text", "vision"):
        assert getattr(again, name).tobytes() == getattr(record, name).tobytes()
    check_record(again)
    made, expected = (collate([one], [0], batch_layout(64, 8)) for one in (again, record))
    for name, array in expected.items():
        assert np.array_equal(made[name], array), name


def test_bytes_where_integers_belong_are_refused():
    message = tf_example_pb2.Example.FromString(encode_record(make_record(1)))
    message.features.feature["text"].int64_list.value.extend([1] * 2 * TEXT_WIDTH)
    with pytest.raises(DatasetError, match=r"\btext\b"):
        decode_record(message.SerializeToString(deterministic=True), LAYOUT)


def test_integers_that_are_cut_short_are_refused_by_the_name_of_their_field():
    data = encode_record(make_record(1))
    (_, end) = dict(zip(KINDS, spans(data, KINDS), strict=True))[b"original_size"]
    with pytest.raises(DatasetError, match="original_size"):
        decode_record(data[: end - 1] + b"\x80" + data[end:], LAYOUT)
