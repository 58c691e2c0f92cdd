"""Rows of metadata tables: a bad one costs one row, never a foreign caption, and is told by its line."""

from __future__ import annotations

import csv
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.decoding.images import Rejected
from preprocess.input import captions
from preprocess.input.tables import path_in, read_table

NAMES = captions.fields("mine")


def rows(data: bytes | str, suffix: str = ".csv") -> list[tuple[int, object]]:
    """(line, caption or reason) of each row of a table with the columns file_name and text."""
    data = data.encode() if isinstance(data, str) else data
    found = read_table(io.BytesIO(data), suffix, NAMES, lambda name: name.startswith("IMG_"))
    return [(number, row.reason if isinstance(row, Rejected) else row.get("text")) for number, row in found]


BROKEN = "broken CSV"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('a.png,"not closed\nb.png,b\nc.png,"c"\n', [(2, BROKEN), (3, "b"), (4, "c")]),
        ('a.png,"not closed\nb.png,b\nc.png,c\n', [(2, BROKEN), (3, "b"), (4, "c")]),
        ('a.png,"not closed\nb.png,"not closed\nc.png,c\n', [(2, BROKEN), (3, BROKEN), (4, "c")]),
        ('a.png,"not closed\nb.png,5" tall\nc.png,c\n', [(2, BROKEN), (3, '5" tall'), (4, "c")]),
        ('a.png,a\nb.png,"not closed', [(2, "a"), (3, BROKEN)]),
        ('a.png,"Hello" said the man\nb.png,b\n', [(2, "Hello said the man"), (3, "b")]),
        ('a.png,"a, b" c, d\nb.png,b\n', [(2, BROKEN), (3, "b")]),
        ('"a.png,a\nb.png,"b"\n', [(2, BROKEN), (3, "b")]),
        ("a.png,a dog, a cat\nb.png,b\n", [(2, BROKEN), (3, "b")]),
        ("a.png,a dog,,\nb.png,b\n", [(2, "a dog"), (3, "b")]),
        ("a.png\nb.png,b\n\n\nc.png,c\n", [(2, None), (3, "b"), (6, "c")]),
        ('a.png,"two\nlines"\nb.png,b\n', [(2, "two\nlines"), (4, "b")]),
        ('a.png,"two\n\nlines, and a comma"\nb.png,b\n', [(2, "two\n\nlines, and a comma"), (5, "b")]),
        ('a.png,"he said ""hi"""\nb.png,b\n', [(2, 'he said "hi"'), (3, "b")]),
        ('a.png,5" tall\nb.png,b\n', [(2, '5" tall'), (3, "b")]),
    ],
)
def test_quotes_of_a_csv(body: str, expected: list) -> None:
    assert rows("file_name,text\n" + body) == expected
    assert rows(("file_name,text\n" + body).replace("\n", "\r\n")) == [
        (number, text.replace("\n", "\r\n") if text else text) for number, text in expected
    ]


def test_a_swallowed_row_that_would_fit_the_columns() -> None:
    """The quote of one caption ends at that of another's, three columns each: only the paths within tell it."""
    table = 'file_name,text,size\na.png,"not closed,1\nb.png,b,2\nc.png,5",3\nd.png,d,4\n'
    assert rows(table) == [(2, BROKEN), (3, "b"), (4, '5"'), (5, "d")]


@pytest.mark.parametrize(
    "body",
    [
        'IMG_1,"a dog\nIMG_2,a cat\nIMG_3,a board of 6"\nIMG_4,fine,web\n',
        'IMG_1,"a dog\nIMG_2,a big, red cat\nIMG_3,a long, 6"\nIMG_4,fine,web\n',
        'IMG_1.gif,"a dog,web\nIMG_2.heic,a cat,web\nIMG_3,6",web\nIMG_4,fine,web\n',
    ],
)
def test_swallowed_rows_that_are_short_or_whose_paths_look_like_none(body: str) -> None:
    found = dict(rows("file_name,text,source\n" + body))
    assert found[2] == BROKEN and found[5] == "fine"
    assert not [text for text in found.values() if text and "\n" in text]


def test_lines_within_quotes_that_only_look_like_rows() -> None:
    caption = "first, second\nred, blue\nIMG is a word"
    assert rows(f'file_name,text,source\na.png,"{caption}",web\n') == [(2, caption)]


def test_excels_own_first_line() -> None:
    assert rows("sep=;\nfile_name;text\na.png;a\n") == [(3, "a")]


@pytest.mark.parametrize("column", ["text", "unused"])
def test_bytes_of_another_encoding_cost_one_row(column: str) -> None:
    text, unused = (b"caf\xe9", b"x") if column == "text" else (b"x", b"caf\xe9")
    table = b"file_name,text,unused\na.png," + text + b"," + unused + b"\nb.png,b,y\n"
    assert rows(table) == [(2, "invalid UTF-8"), (3, "b")]
    with_long = b"file_name,text,unused\na.png,a," + b"x" * 140_000 + b"\nb.png,b,y\n"
    assert rows(with_long) == [(2, "a"), (3, "b")]
    line = b'{"file_name": "a.png", "text": "%s", "unused": "%s"}\n{"file_name": "b.png", "text": "b"}\n'
    assert rows(line % (text, unused), ".jsonl") == [(1, "invalid UTF-8"), (2, "b")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_byte_order_marks(encoding: str, suffix: str) -> None:
    csv_text = "file_name,text\na.png,hündchen 犬\nb.png,b\n"
    json_text = '{"file_name": "a.png", "text": "hündchen 犬"}\n{"file_name": "b.png", "text": "b"}\n'
    data = (csv_text if suffix == ".csv" else json_text).encode(encoding)
    data = b"\xfe\xff" + data if encoding == "utf-16-be" else data
    assert [text for _, text in rows(data, suffix)] == ["hündchen 犬", "b"]


def test_utf16_without_a_mark_is_named() -> None:
    with pytest.raises(Rejected) as caught:
        rows("file_name,text\na.png,a\n".encode("utf-16-le"))
    assert "UTF-16" in caught.value.detail
    assert {reason for _, reason in rows('{"file_name": "a"}\n'.encode("utf-16-le"), ".jsonl")} == {"NUL in the table"}


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
def test_delimiters(delimiter: str) -> None:
    lines = [["file_name", "text"], ["a.png", "a; b, c\t|"], ["b.png", "b"]]
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(lines)
    for suffix in (".csv", ".tsv"):
        assert rows(out.getvalue(), suffix) == [(2, "a; b, c\t|"), (3, "b")]


@pytest.mark.parametrize(
    ("header", "reason"),
    [("bild;beschreibung", "no column of image paths"), ("file_name;beschreibung", "no column of captions")],
)
def test_a_table_without_the_columns_names_those_it_has(header: str, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        rows(f"{header}\na.png;a\n")
    assert caught.value.reason == reason and "'beschreibung'" in caught.value.detail
    assert rows("file_name;mine\na.png;a\n") == [(2, None)]


def parquet(columns: dict, **more: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **more)
    return out.getvalue()


def test_parquet() -> None:
    data = parquet(
        {
            "image": [{"bytes": b"x", "path": "no"}] * 3000,
            "file_name": [f"{n}.png" for n in range(3000)],
            "mine": [f"caption {n}" if n != 7 else None for n in range(3000)],
            "captions": [["one", "two"]] * 3000,
        },
        row_group_size=1000,
    )
    found = list(read_table(io.BytesIO(data), ".parquet", NAMES))
    assert [number for number, _ in found] == list(range(1, 3001))
    assert [path_in(row) for _, row in found[:2]] == ["0.png", "1.png"]
    texts = [captions.from_mapping(row, NAMES) for _, row in found]
    assert texts[6:9] == [("caption 6",), ("one", "two"), ("caption 8",)]


@pytest.mark.parametrize("cut", [0, 4, 100, -200, -1])
def test_a_parquet_that_is_damaged(cut: int) -> None:
    data = parquet({"file_name": ["a.png"] * 100, "text": ["a"] * 100})
    with pytest.raises(Rejected) as caught:
        list(read_table(io.BytesIO(data[:cut]), ".parquet", NAMES))
    assert caught.value.reason == "broken parquet"
    with pytest.raises(Rejected) as caught:
        list(read_table(io.BytesIO(parquet({"url": ["x"], "alt": ["y"]})), ".parquet", NAMES))
    assert "'url'" in caught.value.detail


def test_one_bad_value_of_a_parquet_costs_one_row() -> None:
    texts = pa.array([b"one", b"\xff\xfe\xe9", b"three"], pa.binary()).view(pa.string())
    data = parquet({"file_name": ["a.png", "b.png", "c.png"], "text": texts})
    assert rows(data, ".parquet") == [(1, "one"), (2, "invalid UTF-8"), (3, "three")]


def test_a_parquet_that_repeats_a_large_value_is_read_in_bounded_memory() -> None:
    """A dictionary stores 2 MB once for 1,024 rows; all of them at once would be gigabytes."""
    text = pa.array(["x" * 2_000_000]).dictionary_encode()
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1024, pa.int32()), text.dictionary)
    table = pa.table({"file_name": [f"{n}.png" for n in range(1024)], "text": column})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", store_schema=False)
    assert out.tell() < 100_000
    pa.default_memory_pool().release_unused()
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_table(io.BytesIO(out.getvalue()), ".parquet", NAMES):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 300_000_000


CELL = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=12)


@given(st.lists(CELL, min_size=1, max_size=8), st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=300, deadline=None)
def test_what_a_csv_writer_writes_is_read(texts: list[str], end: str) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end)
    writer.writerow(["file_name", "text"])
    writer.writerows([f"{number}.png", text] for number, text in enumerate(texts))
    assert [text for _, text in rows(out.getvalue())] == texts


@given(st.lists(st.tuples(CELL, st.booleans()), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_an_open_quote_never_gives_a_foreign_row(cells: list[tuple[str, bool]]) -> None:
    """Some rows have an opening quote that is not closed. No caption then has another row's path in it."""
    lines = ["file_name,text"]
    for number, (text, broken) in enumerate(cells):
        flat = " ".join(text.replace('"', "").replace(",", " ").split())
        lines.append(f'{number}.png,"{flat}' if broken else f"{number}.png,{flat}")
    for _, text in rows("\n".join(lines) + "\n"):
        assert text is None or ".png," not in text
