"""Captions: whatever the bytes, the result is a usable text or a named rejection; and which of them a picture gets."""

from __future__ import annotations

import collections
import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fluxdit_jax.dataset.captions import MAX_CAPTIONS
from preprocess.decoding.images import Rejected
from preprocess.input import captions
from preprocess.input.byte_source import ByteSource
from preprocess.input.captions import Source
from preprocess.input.tables import path_in, read_table

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
        ('{"caption": "a dog"}'.encode("utf-16"), "a dog"),
        ('{"caption": "a dog"}'.encode("utf-32"), "a dog"),
        (b'{"caption": "!"}', "!"),
        (b'{"caption": "a dog", "text": 3}', "a dog"),
        (b'{"caption": "  ", "text": "a dog"}', "a dog"),
        (b'{"caption": [], "text": "a dog"}', "a dog"),
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
        (b'{"caption": "\\u200b"}', "empty caption"),  # no width, a control, a mark, a blank letter
        (b'{"caption": "\\u0007"}', "empty caption"),
        ('{"caption": "\u0301"}'.encode(), "empty caption"),
        ('{"caption": "\u3164"}'.encode(), "empty caption"),
        (b'{"caption": "\\u0000a"}', "NUL in the caption"),
        ('{"caption": "a"}'.encode("utf-16-le"), "NUL in the caption"),
        (b"\xff\xfe\x00\xd8", "invalid UTF-16"),
        (b'{"caption": "\\u001b$Bdog"}', "invalid UTF-8"),
        (b'{"caption": "", "text": 3}', "empty caption"),  # the first field that is there
        (b'{"caption": []}', "caption is not a string"),
        (b'{"title": "a"}', "no caption"),
        (b'"a dog"', "no caption"),
        (b"[]", "no caption"),
    ],
)
def test_bad_json(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        captions.from_json(data, NAMES)
    assert caught.value.reason == reason


def test_the_longest_caption_and_the_largest_file() -> None:
    assert captions.clean("a" * 20_000 + " ") == "a" * 20_000
    with pytest.raises(Rejected, match="caption too long.*20,001"):
        captions.clean("a" * 20_001)
    assert captions.from_text(b"a dog".ljust(4_000_000)) == "a dog"
    with pytest.raises(Rejected, match="caption too long.*4,000,001"):
        captions.from_text(b"a dog".ljust(4_000_001))


def test_unusable_texts_of_a_field_are_counted_and_a_reject_names_it() -> None:
    passed_over = collections.Counter(["x"])
    mapping = {"mine": [3], "caption": ["one", "", "two", 4]}
    assert captions.from_mapping(mapping, NAMES, passed_over) == ("one", "two") == captions.from_mapping(mapping, NAMES)
    assert passed_over == {"x": 1, "caption is not a string": 2, "empty caption": 1}
    with pytest.raises(Rejected, match="mine, caption, text.*'title', 'size'"):
        captions.from_mapping({"title": "a dog", "size": 3}, NAMES)
    with pytest.raises(Rejected, match="'caption' \\(null\\)"):
        captions.from_mapping({"caption": None}, NAMES)


def row(group: int, *texts: str) -> Source:
    return Source("metadata.csv:7", group, texts=texts)


def no_row(group: int, reason: str) -> Source:
    return Source("metadata.csv:8", group, texts=Rejected(reason))


@pytest.mark.parametrize(
    ("sources", "expected", "passed_over"),
    [
        ([row(0, "a", "b")], "ab", {}),
        ([row(0, "a"), row(0, "b", "a"), row(0, "c")], "abc", {"the same caption again": 1}),
        ([row(0, "a"), row(1, "b"), row(1, "c")], "a", {"a row for a picture that has a caption": 2}),
        ([no_row(0, "why"), row(0, "a"), row(1, "b")], "a", {"why": 1, "a row for a picture that has a caption": 1}),
        ([no_row(0, "why"), no_row(1, "why"), row(2, "a"), no_row(2, "other")], "a", {"why": 2, "other": 1}),
    ],
)
def test_all_captions_of_the_first_group_that_has_any(sources: list, expected: str, passed_over: dict) -> None:
    assert captions.choose(tuple(sources), NAMES) == (tuple(expected), passed_over)


def test_captions_beyond_what_a_record_holds_are_counted() -> None:
    texts = [str(number) for number in range(MAX_CAPTIONS + 2)]
    found, passed_over = captions.choose((row(0, *texts[:60]), row(0, *texts[60:], "7")), NAMES)
    assert found == tuple(texts[:MAX_CAPTIONS])
    assert passed_over == {f"more than {MAX_CAPTIONS} captions": 2, "the same caption again": 1}


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Source]:
    def write(name: str, group: int, content: str | None, only: bool = False) -> Source:
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        return Source(name, group, ByteSource(str(path)), path.suffix, only=only)

    return write


def test_files_are_read_by_their_type_and_hide_none_behind_them(file: Callable[..., Source]) -> None:
    sources = (
        file("a.json", 0, '{"title": "IMG"}'),
        file("a.txt", 1, '{"caption": "a text and no JSON"}'),
        file("a.1.txt", 1, "another"),
        file("a.png.json", 2, '{"caption": "behind"}'),
        row(3, "a row"),
    )
    found, passed_over = captions.choose(sources, NAMES)
    assert found == ('{"caption": "a text and no JSON"}', "another")
    assert passed_over == {"no caption": 1, "a row for a picture that has a caption": 1}
    found, passed_over = captions.choose((file("b.json", 0, '{"mine": ["one", 3, "two"]}'),), NAMES)
    assert found == ("one", "two") and passed_over == {"caption is not a string": 1}


def test_a_list_of_texts_counts_where_there_is_no_other_caption(file: Callable[..., Source]) -> None:
    """It may as well be tags."""
    tags = file("a.json", 0, '["a dog", "a cat"]')
    assert captions.choose((tags,), NAMES) == (("a dog", "a cat"), {})
    assert captions.choose((tags, file("a.txt", 1, " ")), NAMES)[0] == ("a dog", "a cat")
    assert captions.choose((tags, file("a.txt", 1, "a sentence")), NAMES) == (("a sentence",), {"no caption": 1})
    with pytest.raises(Rejected, match="got list"):
        captions.choose((file("b.json", 0, '["a dog", 3]'),), NAMES)


def test_the_reject_of_a_picture_without_a_caption_names_every_source(file: Callable[..., Source]) -> None:
    def refused(*sources: Source) -> Rejected:
        with pytest.raises(Rejected) as caught:
            captions.choose(sources, NAMES)
        assert not caught.value.transient
        return caught.value

    other, empty, broken = file("a.json", 0, "{}"), file("a.txt", 1, " "), file("a.png.json", 2, "{")
    assert refused().reason == refused(other).reason == "no caption"
    both = refused(other, empty, broken)
    assert both.reason == "empty caption"  # an object of other fields was not meant as one
    for name in ("a.json: none of the fields", "a.txt: empty caption", "a.png.json: Expecting"):
        assert name in both.detail
    assert refused(broken, empty).reason == "broken JSON"


def test_a_file_that_could_not_be_read_is_not_replaced_by_another(file: Callable[..., Source]) -> None:
    with pytest.raises(Rejected) as caught:
        captions.choose((file("a.json", 0, None), row(0, "b"), row(1, "c")), NAMES)
    assert caught.value.reason == "missing file" and caught.value.transient


def test_at_most_one_file_of_a_sample_may_have_a_caption(file: Callable[..., Source]) -> None:
    own, same = file("s.a.json", 0, '{"caption": "a"}', only=True), file("s.a.txt", 0, "not read", only=True)
    empty, other = file("s.b.txt", 0, "", only=True), file("s.c.txt", 0, "c", only=True)
    assert captions.choose((own, same), NAMES) == (("a",), {})
    assert captions.choose((empty, own, same), NAMES) == (("a",), {"empty caption": 1})
    for sources in ((own, other), (own, same, other), (own, same, empty, other)):
        with pytest.raises(Rejected, match=r"several captions of one name.*s\.a.*s\.c"):
            captions.choose(sources, NAMES)


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
        found = captions.from_json(json.dumps(raw).encode(), NAMES, lists=True)
    except Rejected:
        return
    values = [raw] if isinstance(raw, list) else [raw.get(name) for name in ("caption", "text")]
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
