"""Rows of metadata tables (`.jsonl`, `.csv`, `.tsv`, `.parquet`), one at a time, good or rejected by their number."""

from __future__ import annotations

import collections
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from preprocess.decoding.formats import EXTENSIONS, OTHER_IMAGES
from preprocess.decoding.images import Rejected
from preprocess.input.captions import MAX_BYTES, NUL_HINT, UTF8_HINT, encoding_of

TYPES = (".jsonl", ".csv", ".tsv", ".parquet")
PATH_FIELDS = ("file_name", "image_path", "filename", "image", "path", "file")
_DELIMITERS = ",;\t|"
_MAX_LINES = 10_000  # of one row of a .csv
_BATCH = 16  # rows of a .parquet
_MAX_GROUP = 2**31  # bytes of the wanted columns in a row group of a .parquet

Row = tuple[int, dict[str, Any] | Rejected]


def read_table(
    file: BinaryIO,
    suffix: str,
    names: tuple[str, ...],
    is_picture: Callable[[str], bool] = lambda name: False,
) -> Iterator[Row]:
    """Rows of a table with the number of their first line (of a `.parquet`, of the row), from 1.

    Args:
      file: seekable. UTF-8, or UTF-16 or UTF-32 with a byte order mark.
      suffix: one of `TYPES`.
      names: fields that hold captions.
      is_picture: whether a path is one of a picture that is there; tells rows of a .csv that a quote would swallow.

    Raises:
      Rejected: the table as a whole cannot be used; the detail names the columns that it has.
    """
    if suffix == ".jsonl":
        yield from _read_jsonl(file)
    elif suffix == ".parquet":
        yield from _read_parquet(file, names)
    else:
        yield from _read_csv(file, names, is_picture)


def path_in(row: dict[str, Any]) -> str:
    """The image's path in a row of a table; raises `Rejected`."""
    for name in PATH_FIELDS:
        value = row.get(name)
        if isinstance(value, str) and value:
            return value
    there = ", ".join(repr(name)[:40] for name in list(row)[:8]) or "no field at all"
    raise Rejected("no image path", f"none of the fields {', '.join(PATH_FIELDS)} is a text; the row has {there}")


def _lines(file: BinaryIO, newline: str) -> Iterator[tuple[int, str | Rejected]]:
    """Lines with their numbers, in bounded memory; one with a byte that cannot be decoded is rejected."""
    head = file.read(4)
    file.seek(0)
    encoding = encoding_of(head)
    marked = encoding not in ("utf-8", "utf-8-sig")
    text = io.TextIOWrapper(file, encoding, "replace" if marked else "surrogateescape", newline=newline)
    try:
        number = 0
        while line := text.readline(MAX_BYTES + 1):
            number += 1
            if len(line) > MAX_BYTES:
                while line and not line.endswith(("\n", "\r")):
                    line = text.readline(MAX_BYTES)
                yield number, Rejected("row too long", f"more than {MAX_BYTES:,} characters")
            elif "\0" in line:
                yield number, Rejected("NUL in the table", NUL_HINT)
            elif "\ufffd" in line if marked else not _utf8(line):
                yield (
                    number,
                    Rejected("invalid UTF-8" if not marked else f"invalid {encoding.upper()}", UTF8_HINT),
                )
            else:
                yield number, line
    finally:
        if not file.closed:
            text.detach()  # the file is its owner's to close


def _utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


# ------------------------------------------------------------------------------------------------------ .jsonl


def _read_jsonl(file: BinaryIO) -> Iterator[Row]:
    for number, line in _lines(file, "\n"):
        if isinstance(line, Rejected):
            yield number, line
        elif line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
                yield number, row
            except (ValueError, RecursionError) as error:
                yield number, Rejected("broken JSON", str(error)[:200])


# -------------------------------------------------------------------------------------------------------- .csv


def _read_csv(file: BinaryIO, names: tuple[str, ...], is_picture: Callable[[str], bool]) -> Iterator[Row]:
    csv.field_size_limit(MAX_BYTES)  # a setting of the whole process; its default is 131,072
    lines = _Lines(_lines(file, ""))
    header = None
    while header is None:
        entry = lines.next()
        if entry is None:
            return
        number, line = entry
        if isinstance(line, Rejected):
            raise Rejected(line.reason, f"in the header, line {number}: {line.detail}")
        if line.strip() and not line.startswith("sep="):  # Excel's own first line; the header tells as well
            delimiter, header = _header(line)
    _require_columns(header, names)
    path = next(index for index, name in enumerate(header) if name in PATH_FIELDS)

    def is_row(line: str) -> bool:
        """Whether a line within quotes is a row by itself: a picture's path stands where the paths do."""
        values = next(csv.reader([line], delimiter=delimiter), [])
        if len(values) <= path:
            return False
        name = values[path].strip()
        looks_so = PurePosixPath(name).suffix.lower() in (*EXTENSIONS, *OTHER_IMAGES)
        return (looks_so and len(values) == len(header)) or (bool(name) and len(values) > 1 and is_picture(name))

    while (entry := lines.next()) is not None:
        number, line = entry
        if isinstance(line, Rejected):
            yield number, line
            continue
        values = _row(lines, line, delimiter, len(header), is_row)
        if isinstance(values, Rejected):
            yield number, values
        elif values:
            yield number, dict(zip(header, values))


class _Lines:
    """Lines of a file of which some may be given back."""

    def __init__(self, lines: Iterator[tuple[int, str | Rejected]]) -> None:
        self._lines = lines
        self._back: collections.deque[tuple[int, str | Rejected]] = collections.deque()

    def next(self) -> tuple[int, str | Rejected] | None:
        return self._back.popleft() if self._back else next(self._lines, None)

    def give_back(self, lines: list[tuple[int, str | Rejected]]) -> None:
        self._back.extendleft(reversed(lines))


def _header(line: str) -> tuple[str, list[str]]:
    """(delimiter, columns): by the delimiter that shows a column of paths, else by that with the most columns."""
    best: tuple[str, list[str]] = ("", [])
    for delimiter in _DELIMITERS:
        try:
            columns = [name.strip() for name in next(csv.reader([line], delimiter=delimiter, strict=True))]
        except (csv.Error, StopIteration):
            continue
        if set(columns) & set(PATH_FIELDS):
            return delimiter, columns
        best = max(best, (delimiter, columns), key=lambda one: len(one[1]))
    return best


def _require_columns(columns: list[str], names: tuple[str, ...]) -> None:
    there = ", ".join(repr(name)[:40] for name in columns[:20]) or "none"
    if not set(columns) & set(PATH_FIELDS):
        wanted = ", ".join(PATH_FIELDS)
        raise Rejected("no column of image paths", f"the columns are {there}; the paths stand in one of {wanted}")
    if not set(columns) & set(names):
        wanted = ", ".join(names)
        raise Rejected(
            "no column of captions",
            f"the columns are {there}; captions stand in one of {wanted}, or in that of --caption-field",
        )


def _row(lines: _Lines, first: str, delimiter: str, width: int, is_row: Callable[[str], bool]) -> list[str] | Rejected:
    """The values of the row that begins with this line; [] for an empty one.

    A quote that is not closed would make the rows behind it a part of the caption. Where that can be seen only the
    first line is rejected, and the lines behind it are read as rows of their own.
    """
    taken: list[tuple[int, str | Rejected]] = []

    def rest() -> Iterator[str]:
        yield first
        while len(taken) < _MAX_LINES and (entry := lines.next()) is not None:
            taken.append(entry)
            if isinstance(entry[1], Rejected):
                raise csv.Error(f"line {entry[0]}, within quotes: {entry[1].reason}")
            yield entry[1]

    def refuse(what: str) -> Rejected:
        lines.give_back(taken)
        return Rejected("broken CSV", what)

    try:
        values = next(csv.reader(rest(), delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        closed = not taken and first.count('"') % 2 == 0
        values = next(csv.reader([first], delimiter=delimiter), []) if closed else []
        if len(values) != width:  # else `"Hello" said the man`, which hurts nobody
            return refuse(f"{error}" + ("; is a quote not closed?" if taken else ""))
    if any(value.strip() for value in values[width:]):
        return refuse(
            f"{len(values)} values, the header has {width} columns; a caption with {delimiter!r} in it needs quotes"
        )
    for number, line in taken:
        if isinstance(line, str) and is_row(line):
            return refuse(f"a quote is not closed: line {number}, a row of its own, would be within it")
    return values[:width]


# ---------------------------------------------------------------------------------------------------- .parquet


def _read_parquet(file: BinaryIO, names: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        table = pq.ParquetFile(file)
        columns = table.schema_arrow.names
        _require_columns(columns, names)
        wanted = [name for name in columns if name in (*PATH_FIELDS, *names)]
        for group in range(table.num_row_groups):
            metadata = table.metadata.row_group(group)
            parts = [metadata.column(index) for index in range(metadata.num_columns)]
            size = sum(p.total_uncompressed_size for p in parts if p.path_in_schema.partition(".")[0] in wanted)
            if size > _MAX_GROUP:
                raise Rejected("row group too large", f"{size:,} bytes of {', '.join(wanted)}")
            # A value that is stored once may stand in every row: few rows at a time bound what they take.
            for batch in table.iter_batches(batch_size=_BATCH, row_groups=[group], columns=wanted):
                for index in range(batch.num_rows):
                    number += 1
                    yield number, _values(batch, index)
    except (pa.ArrowException, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise Rejected("broken parquet", f"{first}: the rows after row {number} were not read") from error


def _values(batch: Any, row: int) -> dict[str, Any] | Rejected:
    """A row of a record batch; a text in it that is not UTF-8 costs this row alone."""
    try:
        return {name: batch.column(index)[row].as_py() for index, name in enumerate(batch.schema.names)}
    except ValueError:  # UnicodeDecodeError is one
        return Rejected("invalid UTF-8", UTF8_HINT)
