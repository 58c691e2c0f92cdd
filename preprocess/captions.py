"""Captions: from a .json or .txt beside the image, or from a table of many."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from preprocess.images import Rejected

FIELDS = ("caption", "text")
PATH_FIELDS = ("file_name", "image_path")
MAX_CHARACTERS = 20_000  # about 8 times what 512 tokens hold
MAX_BYTES = 4_000_000  # of one caption file


def fields(first: str = "") -> tuple[str, ...]:
    """Names under which a caption is looked for, in order; `first` is the user's own."""
    return (first, *FIELDS) if first else FIELDS


def from_json(data: bytes, names: tuple[str, ...]) -> str:
    """The caption in a JSON object; raises `Rejected`."""
    try:
        raw = json.loads(_decode(data))
    except (ValueError, RecursionError) as error:
        raise Rejected("broken JSON", str(error)[:200]) from error
    return from_mapping(raw, names)


def from_text(data: bytes) -> str:
    """The caption that is a whole text file; raises `Rejected`."""
    return clean(_decode(data))


def from_mapping(raw: Any, names: tuple[str, ...]) -> str:
    """The first of the named fields that is there; raises `Rejected`."""
    if not isinstance(raw, dict):
        raise Rejected("no caption", f"expected a JSON object, got {type(raw).__name__}")
    for name in names:
        if raw.get(name) is not None:
            return clean(raw[name])
    raise Rejected("no caption", f"none of the fields {', '.join(names)}")


def clean(caption: Any) -> str:
    """The caption without white space around it; raises `Rejected` if it is not a usable text."""
    if not isinstance(caption, str):
        raise Rejected("caption is not a string", f"got {type(caption).__name__}")
    caption = caption.strip()
    if not caption:
        raise Rejected("empty caption")
    if len(caption) > MAX_CHARACTERS:
        raise Rejected("caption too long", f"{len(caption):,} characters, the limit is {MAX_CHARACTERS:,}")
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejected("invalid UTF-8", f"half of a surrogate pair at character {error.start}") from error
    return caption


def _decode(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise Rejected("caption too long", f"a file of {len(data):,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("invalid UTF-8", f"byte {error.start} of the caption file") from error


def read_table(file: BinaryIO, suffix: str) -> Iterator[tuple[int, dict | Rejected]]:
    """Rows of a metadata file, `.jsonl` or `.csv`, with their line numbers from 1, one at a time."""
    yield from _read_csv(file) if suffix == ".csv" else _read_jsonl(file)


def _read_jsonl(file: BinaryIO) -> Iterator[tuple[int, dict | Rejected]]:
    number = 0
    while line := file.readline(MAX_BYTES + 1):  # a bound on memory for a file that is one endless line
        number += 1
        if not line.strip():
            continue
        if len(line) > MAX_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_BYTES)
            yield number, Rejected("caption too long", f"a row of more than {MAX_BYTES:,} bytes")
            continue
        try:
            row = json.loads(_decode(line))
            if not isinstance(row, dict):
                raise Rejected("broken JSON", f"expected an object, got {type(row).__name__}")
            yield number, row
        except Rejected as rejected:
            yield number, rejected
        except (ValueError, RecursionError) as error:
            yield number, Rejected("broken JSON", str(error)[:200])


def _read_csv(file: BinaryIO) -> Iterator[tuple[int, dict | Rejected]]:
    reader = csv.DictReader(_csv_lines(file))
    try:
        for row in reader:
            yield reader.line_num, row
    except UnicodeDecodeError:
        yield reader.line_num + 1, Rejected("invalid UTF-8", "in the table: the rows after it were not read")
    except csv.Error as error:
        yield max(1, reader.line_num), Rejected("broken CSV", f"{error}: the rows after it were not read")


def _csv_lines(file: BinaryIO) -> Iterator[str]:
    """The lines of a .csv, whatever ends them; raises `csv.Error` for one that is too long for memory."""
    encoding = "utf-8-sig"
    while line := file.readline(MAX_BYTES + 1):
        if len(line) > MAX_BYTES:
            raise csv.Error(f"a line of more than {MAX_BYTES:,} bytes")
        yield from io.StringIO(line.decode(encoding), newline="")
        encoding = "utf-8"


def path_in(row: dict) -> str:
    """The image's path in a row of a table; raises `Rejected`."""
    for name in PATH_FIELDS:
        value = row.get(name)
        if isinstance(value, str) and value:
            return value
    raise Rejected("no image path", f"none of the fields {', '.join(PATH_FIELDS)} is a text")
