"""Captions: whatever the bytes, the result is a usable text or a named rejection."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preprocess import captions
from preprocess.images import Rejected
from preprocess.tables import path_in, read_table

NAMES = captions.fields("mine")


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        (b'{"caption": "  a dog\\n"}', "a dog"),
        (b'{"text": "a dog"}', "a dog"),
        (b'{"text": "no", "caption": "yes"}', "yes"),
        (b'{"caption": "no", "mine": "yes"}', "yes"),
        (b'{"caption": null, "text": "yes"}', "yes"),
        ('\ufeff{"caption": "with a mark"}'.encode(), "with a mark"),
        ('{"caption": "chien \\ud83d\\udc15 犬"}'.encode(), "chien 🐕 犬"),
    ],
)
def test_json(data: bytes, caption: str) -> None:
    assert captions.from_json(data, NAMES) == (caption,)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "broken JSON"),
        (b'{"caption": "a', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"caption": "\xff"}', "invalid UTF-8"),
        (b'{"caption": "\\ud800"}', "invalid UTF-8"),
        (b'{"caption": 3}', "caption is not a string"),
        (b'{"caption": " \\n\\t"}', "empty caption"),
        (b'{"title": "a"}', "no caption"),
        (b'"a dog"', "no caption"),
        (b"[]", "no caption"),
        (json.dumps({"caption": "a" * 20_001}).encode(), "caption too long"),
        (b" " * 4_000_001, "caption too long"),
    ],
)
def test_bad_json(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        captions.from_json(data, NAMES)
    assert caught.value.reason == reason


@given(st.binary(max_size=200))
@example(b'{"caption": "\xed\xa0\x80"}')
@settings(deadline=None, max_examples=300)
def test_any_bytes(data: bytes) -> None:
    for parse in (lambda d: captions.from_json(d, NAMES), lambda d: [captions.from_text(d)]):
        try:
            found = parse(data)
        except Rejected:
            continue
        assert found
        for caption in found:
            assert caption.strip() == caption != "" and caption.encode("utf-8") and "\0" not in caption


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["caption", "text", "x"]), inner),
    max_leaves=5,
)


@given(JSON)
@settings(deadline=None, max_examples=200)
def test_any_json(raw: object) -> None:
    try:
        found = captions.from_json(json.dumps(raw).encode(), NAMES)
    except Rejected:
        return
    values = [raw.get(name) for name in ("caption", "text")]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    assert set(found) <= {text.strip() for text in texts if isinstance(text, str)}


@given(st.binary(max_size=300), st.sampled_from([".jsonl", ".csv"]))
@settings(deadline=None, max_examples=300)
def test_any_table(data: bytes, suffix: str) -> None:
    with contextlib.suppress(Rejected):  # a table without a column of paths
        for number, row in read_table(io.BytesIO(data), suffix, NAMES):
            assert number >= 1
            if not isinstance(row, Rejected):
                with contextlib.suppress(Rejected):
                    assert path_in(row)
                    assert captions.from_mapping(row, NAMES)


def test_an_endless_line_is_read_in_bounded_pieces() -> None:
    table = io.BytesIO(b"[" * 9_000_000 + b'\n{"file_name": "a", "text": "b"}\n')
    rows = list(read_table(table, ".jsonl", NAMES))
    assert [(number, row.reason) for number, row in rows[:-1]] == [(1, "row too long")]
    assert rows[-1] == (2, {"file_name": "a", "text": "b"})


def test_an_endless_line_of_a_csv_costs_one_row() -> None:
    table = io.BytesIO(b"file_name,text\na.png,a\n" + b"x" * 9_000_000 + b"\nb.png,b\n")
    rows = list(read_table(table, ".csv", NAMES))
    assert [(number, row if isinstance(row, dict) else row.reason) for number, row in rows] == [
        (2, {"file_name": "a.png", "text": "a"}),
        (3, "row too long"),
        (4, {"file_name": "b.png", "text": "b"}),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_csv_with_any_line_ends_and_quoted_ones(end: str) -> None:
    content = end.join(["file_name,text", 'a.png,"two', 'lines"', "b.png,b", ""])
    rows = [row for _, row in read_table(io.BytesIO(content.encode("utf-8-sig")), ".csv", NAMES)]
    assert rows == [
        {"file_name": "a.png", "text": f"two{end}lines"},
        {"file_name": "b.png", "text": "b"},
    ]
