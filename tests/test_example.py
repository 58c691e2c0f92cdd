"""A serialised record read in place: what the protobuf library reads, or nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2
from training_helpers import TEXT_WIDTH, make_record

from fluxdit_jax.example import BYTES, INTEGERS, integers, spans
from fluxdit_jax.records import DatasetError, decode_record, encode_record


def by_the_library(data):
    """Of every feature: its byte strings, or its integers."""
    feature = tf_example_pb2.Example.FromString(data).features.feature
    return {
        name.encode(): list(value.bytes_list.value) or list(value.int64_list.value)
        for name, value in feature.items()
    }


def in_place(data):
    return {
        name: [data[start:end]] if kind == BYTES else list(integers(data, start, end))
        for name, (kind, start, end) in spans(data).items()
    }


INT64 = st.integers(-(2**63), 2**63 - 1)


@given(
    st.dictionaries(
        st.text("abc/_", max_size=20),
        st.one_of(st.binary(max_size=300), st.lists(INT64, min_size=1)),
        min_size=1,
    )
)
@settings(max_examples=100, deadline=None)
def test_what_is_found_is_what_the_library_reads(features):
    message = tf_example_pb2.Example()
    for name, value in features.items():
        if isinstance(value, bytes):
            message.features.feature[name].bytes_list.value.append(value)
        else:
            message.features.feature[name].int64_list.value.extend(value)
    data = message.SerializeToString(deterministic=True)
    assert in_place(data) == by_the_library(data)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_changed_bytes_are_read_as_the_library_does_or_not_at_all(data):
    written = bytearray(encode_record(make_record(3)))
    heads = [at for at in range(len(written)) if at < 40 or written[at] in (0x0A, 0x12, 0x1A)]
    for _ in range(data.draw(st.integers(1, 3))):
        written[data.draw(st.sampled_from(heads))] = data.draw(st.integers(0, 255))
    if (found := spans(bytes(written))) is None:
        return
    try:
        library = by_the_library(bytes(written))
    except Exception:  # noqa: BLE001  a packed list cut short, which `integers` refuses too
        with pytest.raises(ValueError, match="cut short"):
            for kind, start, end in found.values():
                if kind == INTEGERS:
                    integers(bytes(written), start, end)
        return
    assert in_place(bytes(written)) == library


def test_another_order_of_fields_and_more_features_are_read_by_the_library():
    record = make_record(2)
    message = tf_example_pb2.Example.FromString(encode_record(record))
    message.features.feature["score"].float_list.value.append(1.5)
    message.features.feature["tags"].bytes_list.value.extend([b"a", b"b"])
    message.features.feature["größe"].int64_list.value.append(1)
    data = message.SerializeToString()
    assert spans(data) is None
    again = decode_record(data, TEXT_WIDTH)
    for field in dataclasses.fields(record):
        written, read = getattr(record, field.name), getattr(again, field.name)
        assert np.array_equal(written, read), field.name


@pytest.mark.parametrize("length", range(8))
def test_arrays_are_aligned_wherever_they_lie(length):
    record = dataclasses.replace(make_record(4), caption="c" * length)
    again = decode_record(encode_record(record), TEXT_WIDTH)
    for name in ("latent", "text", "vision"):
        array = getattr(again, name)
        assert array.flags.aligned and array.tobytes() == getattr(record, name).tobytes()


def test_bytes_where_integers_belong_are_refused():
    message = tf_example_pb2.Example.FromString(encode_record(make_record(1)))
    message.features.feature["text"].int64_list.value.extend([1] * 2 * TEXT_WIDTH)
    with pytest.raises(DatasetError, match="text is missing or not one value of its type"):
        decode_record(message.SerializeToString(deterministic=True), TEXT_WIDTH)
