"""The rows of a dataset's index and of the units that it is made of: one row a record, in parquet files.

The metadata of a file say what is known of its units; each unit has a row group of its own, and is read alone.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fluxdit_jax.dataset.fields import USUAL, Layout
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.shared.atomic_files import replacing
from preprocess.build.statistics import Moments
from preprocess.input.findings import Reject

_UNITS, _UNITS_SHA256 = b"fluxdit.units", b"fluxdit.units_sha256"
_ROWS = [
    ("key", pa.string()),
    ("caption", pa.string()),
    ("bucket_height", pa.int32()),
    ("bucket_width", pa.int32()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("tokens", pa.int32()),
    ("content_hash", pa.string()),
    ("source", pa.string()),
]
_PLACE = [("split", pa.string()), ("shard", pa.string()), ("row", pa.int32())]


def rows_schema(fields: Iterable[str], placed: bool = False) -> pa.Schema:
    """Of the rows of a unit whose records have these fields; `placed`: of a dataset's index."""
    return pa.schema([*(_PLACE if placed else ()), *_ROWS, *((f"{name}_id", pa.string()) for name in fields)])


def id_columns(table: pa.Table) -> list[str]:
    """The columns that name the tensors of a record."""
    return [name for name in table.column_names if name.endswith("_id")]


def index_row(record: Record, ids: Mapping[str, str], source: str) -> dict[str, Any]:
    """The row of a record; `ids` of its tensors by field."""
    return {
        "key": record.key,
        "caption": record.caption,
        "bucket_height": record.encoded_size[0],
        "bucket_width": record.encoded_size[1],
        "height": record.original_size[0],
        "width": record.original_size[1],
        "tokens": max(map(len, record.texts)),
        "content_hash": record.content_hash,
        "source": source,
    } | {f"{name}_id": value for name, value in ids.items()}


@dataclasses.dataclass(frozen=True)
class UnitInfo:
    """What is known of a finished unit beside its rows.

    Attributes:
      uid: `plan.Unit.uid`.
      split: of its records.
      sha256, bytes, records: of its shard; "" and 0 if every image of the unit was rejected.
      layout: of its records' conditions.
      lengths: tokens of the longest of each further sequence; that of the captions is in the rows.
      moments: of its latents, None without records.
      rejects: images of the unit that failed after planning.
      file: name of the shard in the dataset; "" while it is in `.build`.
      several: records with more than one caption.
      others: captions beyond the first of each record.
    """

    uid: str
    split: str
    sha256: str
    bytes: int
    records: int
    layout: Layout
    moments: Moments | None
    rejects: tuple[Reject, ...]
    file: str = ""
    several: int = 0
    others: int = 0
    lengths: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def final(self) -> bool:
        """False if trying again may give more records."""
        return not any(reject.transient for reject in self.rejects)

    def to_dict(self) -> dict[str, Any]:
        raw = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        raw = {"text_width" if name == "layout" else name: value for name, value in raw.items()}
        raw["moments"] = self.moments.to_dict() if self.moments else None
        raw["rejects"] = [reject.to_dict() for reject in self.rejects]
        if not self.several:  # an index without such records says nothing of them
            del raw["several"], raw["others"]
        raw["text_width"] = self.layout["text"]
        further = {name: width for name, width in self.layout.items() if name not in USUAL}
        lengths = raw.pop("lengths")
        return raw | ({"conditions": further, "lengths": lengths} if further else {})

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> UnitInfo:
        raw = dict(raw)
        raw["moments"] = Moments.from_dict(raw["moments"]) if raw["moments"] else None
        raw["rejects"] = tuple(Reject(**reject) for reject in raw["rejects"])
        layout: Layout = {"text": raw.pop("text_width"), "vision": None} | raw.pop("conditions", {})
        return cls(**raw, layout=layout)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A unit that is finished; `read` gives its rows, or raises `DatasetError` if they are damaged."""

    info: UnitInfo
    read: Callable[[], pa.Table]


class RowsFile:
    """Rows on disk, of which those of one unit at a time are in memory.

    Attributes:
      units: in the order of the rows.
      records: rows in all.
      rejects_sha256: that of `rejects.jsonl`, in a dataset's index.
      schema: of the rows.

    Raises:
      DatasetError: here and where rows are read, if the file is damaged or not such a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _damage(path):
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            metadata = self._file.schema_arrow.metadata
            if hashlib.sha256(metadata[_UNITS]).hexdigest().encode() != metadata[_UNITS_SHA256]:
                raise ValueError("the checksum of its metadata is wrong")
            about = json.loads(metadata[_UNITS])
            self.units = [UnitInfo.from_dict(raw) for raw in about["units"]]
            self.rejects_sha256: str = about["rejects_sha256"]
            self.records: int = self._file.metadata.num_rows
            if self.records != sum(unit.records for unit in self.units):
                raise ValueError(f"{self.records} rows, not one for each record of its units")
            names = self._file.schema_arrow.names
            fields = ("latent", *USUAL, *(name.removesuffix("_id") for name in names if name.endswith("_id")))
            self.schema = rows_schema(dict.fromkeys(fields), placed="shard" in names)
            groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
            if sum(groups) != self.records or any(rows < 0 for rows in groups):
                raise ValueError(f"{sum(groups)} rows in its row groups, {self.records} in all")
        self._groups = list(itertools.accumulate(groups, initial=0))
        self._units = list(itertools.accumulate((unit.records for unit in self.units), initial=0))
        self._held = -1, self.schema.empty_table()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Reads all rows once."""
        for unit in self:
            unit.read()

    def __iter__(self) -> Iterator[Finished]:
        for number, info in enumerate(self.units):
            yield Finished(info, functools.partial(self.rows, number))

    def rows(self, number: int) -> pa.Table:
        """Of a unit."""
        start, stop, parts = self._units[number], self._units[number + 1], []
        with self._lock:
            while start < stop:
                group = bisect.bisect_right(self._groups, start) - 1
                part = self._group(group).slice(start - self._groups[group], stop - start)
                parts.append(part)
                start += part.num_rows
        return pa.concat_tables(parts) if parts else self.schema.empty_table()

    def _group(self, number: int) -> pa.Table:
        """A row group, of which older files have one for many units."""
        if self._held[0] != number:
            with _damage(self.path):
                table = self._file.read_row_group(number)
                if table.num_rows != self._groups[number + 1] - self._groups[number]:
                    raise ValueError(f"row group {number} has {table.num_rows} rows")
                self._held = number, table.replace_schema_metadata(None).cast(self.schema)
        return self._held[1]


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise DatasetError(f"{path} is damaged or was not written by this program: {why}") from error


def write_rows(
    path: Path, schema: pa.Schema, units: list[UnitInfo], tables: Iterable[pa.Table], rejects_sha256: str = ""
) -> None:
    """Writes what `RowsFile` reads, atomically. Pages and metadata carry checksums.

    Args:
      tables: the rows of each unit.
    """
    about = json.dumps({"units": [unit.to_dict() for unit in units], "rejects_sha256": rejects_sha256}).encode()
    metadata = {_UNITS: about, _UNITS_SHA256: hashlib.sha256(about).hexdigest().encode()}
    # Nothing reads the statistics, and no checksum covers them.
    options = {"compression": "zstd", "write_page_checksum": True, "write_statistics": False}
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema.with_metadata(metadata), **options) as writer:
        for table in tables:
            if table.num_rows:
                writer.write_table(table.cast(schema))


@dataclasses.dataclass
class Rows:
    """All rows of a file in memory; see `RowsFile`."""

    table: pa.Table
    units: list[UnitInfo]
    rejects_sha256: str = ""

    def save(self, path: Path) -> None:
        starts = itertools.accumulate((unit.records for unit in self.units), initial=0)
        tables = (self.table.slice(start, unit.records) for start, unit in zip(starts, self.units))
        write_rows(path, self.table.schema, self.units, tables, self.rejects_sha256)

    @classmethod
    def load(cls, path: Path) -> Rows:
        """Raises `DatasetError` as `RowsFile`."""
        file = RowsFile(path)
        tables = [file.rows(number) for number in range(len(file.units))]
        table = pa.concat_tables([file.schema.empty_table(), *tables])
        return cls(table, file.units, file.rejects_sha256)


def bucket_histogram(table: pa.Table) -> dict[str, int]:
    """ "HEIGHTxWIDTH" to records, sorted."""
    sizes = zip(table["bucket_height"].to_pylist(), table["bucket_width"].to_pylist())
    return {f"{h}x{w}": n for (h, w), n in sorted(collections.Counter(sizes).items())}
