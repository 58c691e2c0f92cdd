"""A finished unit of work on disk, and finding tensors again that were encoded before.

While a build runs, `DATASET/.build/` holds for every finished unit its shard, `<uid>.array_record`, and
`<uid>.parquet`, one row a record with the shard's checksum and statistics in the metadata. The second is
written last: a unit is finished if and only if it is there. When the dataset is published the rows of all
units become `index.parquet`, with the units' metadata in its own.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from array_record.python import array_record_module

from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.fields import CAPTION, LATENT, USUAL, Layout, field_named
from fluxdit_jax.dataset.manifest import DatasetError, sha256_file
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.shared.atomic_files import replacing
from preprocess import PreprocessError
from preprocess.build.statistics import Moments
from preprocess.input.findings import Reject

WORK = ".build"
SHARD_SUFFIX = ".array_record"
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


@dataclasses.dataclass
class Rows:
    """A table of rows with the units that they belong to, in order.

    `rejects_sha256` is that of `rejects.jsonl`, in a dataset's index.
    """

    table: pa.Table
    units: list[UnitInfo]
    rejects_sha256: str = ""

    def save(self, path: Path) -> None:
        """Writes a parquet file atomically. Its pages and its metadata carry checksums."""
        about = {"units": [unit.to_dict() for unit in self.units], "rejects_sha256": self.rejects_sha256}
        units = json.dumps(about).encode()
        metadata = {_UNITS: units, _UNITS_SHA256: hashlib.sha256(units).hexdigest().encode()}
        table = self.table.replace_schema_metadata(metadata)
        with replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)

    @classmethod
    def load(cls, path: Path) -> Rows:
        """Raises `DatasetError` if the file is damaged or not such a table."""
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            metadata = table.schema.metadata
            if hashlib.sha256(metadata[_UNITS]).hexdigest().encode() != metadata[_UNITS_SHA256]:
                raise ValueError("the checksum of its metadata is wrong")
            about = json.loads(metadata[_UNITS])
            units = [UnitInfo.from_dict(raw) for raw in about["units"]]
            if table.num_rows != sum(unit.records for unit in units):
                raise ValueError(f"{table.num_rows} rows, not one for each record of its units")
            table = table.replace_schema_metadata(None)
            fields = list(dict.fromkeys(("latent", *USUAL, *(name.removesuffix("_id") for name in id_columns(table)))))
            table = table.cast(rows_schema(fields, placed="shard" in table.column_names))
            return cls(table, units, about["rejects_sha256"])
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(f"{path} is damaged or was not written by this program: {error}") from error


@contextlib.contextmanager
def disk_errors(what: Path) -> Iterator[None]:
    """Turns a full or read-only disk into a message that says so."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "quota" in str(error):
            raise PreprocessError(
                f"the disk is full: {what} could not be written. Finished shards are kept; make space and give "
                "the same command again, it goes on from there"
            ) from error
        if isinstance(error, OSError) and number in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise PreprocessError(f"{what} cannot be written: {error.strerror}") from error
        raise


def write_unit(
    folder: Path,
    uid: str,
    split: str,
    members: Iterable[Record],
    rows: list[dict[str, Any]],
    layout: Layout,
    rejects: tuple[Reject, ...],
) -> UnitInfo:
    """Writes the shard and then the rows of one unit.

    Args:
      folder: the `.build` folder.
      members: the records, in the order of `rows`.
      rows: of `index_row`, one a record.
      layout: of their conditions.

    Raises:
      PreprocessError: the disk is full or cannot be written.
    """
    shard = folder / (uid + SHARD_SUFFIX)
    moments, others = [], []
    lengths = {name: 0 for name, width in layout.items() if width is not None and name not in USUAL}
    digest, size = "", 0
    with disk_errors(shard):
        if rows:
            with replacing(shard) as temporary:
                writer = array_record_module.ArrayRecordWriter(str(temporary), records.WRITER_OPTIONS)
                try:
                    for record in members:
                        writer.write(records.encode_record(record))
                        moments.append(Moments.of(record.latent))
                        others.append(len(record.other_captions))
                        for name, longest in lengths.items():
                            lengths[name] = max(longest, *map(len, record.of_all_captions(name)))
                finally:
                    writer.close()
                digest, size = sha256_file(temporary), temporary.stat().st_size
        info = UnitInfo(
            uid=uid,
            split=split,
            sha256=digest,
            bytes=size,
            records=len(rows),
            layout=layout,
            moments=Moments.merged(moments),
            rejects=rejects,
            several=sum(map(bool, others)),
            others=sum(others),
            lengths=lengths,
        )
        schema = rows_schema(["latent", *layout])
        Rows(pa.Table.from_pylist(rows, schema), [info]).save(folder / f"{uid}.parquet")
    return info


def load_unit(folder: Path, uid: str) -> Rows | None:
    """A finished unit in a `.build` folder; None if it is not there, or damaged (and to be made again)."""
    with contextlib.suppress(DatasetError):
        rows = Rows.load(folder / f"{uid}.parquet")
        info = rows.units[0] if rows.units else None
        if info and info.uid == uid:
            shard = folder / (uid + SHARD_SUFFIX)
            if not info.records or (shard.is_file() and shard.stat().st_size == info.bytes):
                return rows
    return None


def load_work(folder: Path) -> dict[str, Rows]:
    """Finished units in a `.build` folder by uid."""
    found = {path.stem: load_unit(folder, path.stem) for path in sorted(folder.glob("*.parquet"))}
    return {uid: rows for uid, rows in found.items() if rows is not None}


def bucket_histogram(table: pa.Table) -> dict[str, int]:
    """ "HEIGHTxWIDTH" to records, sorted."""
    sizes = zip(table["bucket_height"].to_pylist(), table["bucket_width"].to_pylist())
    return {f"{h}x{w}": n for (h, w), n in sorted(collections.Counter(sizes).items())}


def tensor_of(record: Record, name: str) -> Any:
    """A field of a record; what is made from captions as a tuple, of all of them."""
    if name == LATENT.name:
        return record.latent
    return record.of_all_captions(name) if field_named(name).made_from == CAPTION else record.conditions[name]


class Archive:
    """Tensors that were encoded before, by their ids, read from the shards that hold them.

    Args:
      wanted: ids worth knowing; others are forgotten, so that memory follows the work and not the dataset.
      damaged: called with a message when a record turns out to be unreadable.
    """

    def __init__(self, wanted: set[str], damaged: Callable[[str], None]) -> None:
        self._wanted = wanted
        self._values = pa.array(sorted(wanted), pa.string())
        self._damaged = damaged
        self._where: dict[str, tuple[Path, int, Layout]] = {}

    def add(
        self, rows: Rows, shard_of: Callable[[UnitInfo], Path], distrusted: frozenset[tuple[str, int]] = frozenset()
    ) -> None:
        """Makes the records of finished units findable.

        Args:
          rows: their rows, units in order.
          shard_of: the path of a unit's shard.
          distrusted: (file, row) of records that must not be used.
        """
        start = 0
        for info in rows.units:
            part = rows.table.slice(start, info.records)
            start += info.records
            path = shard_of(info)
            for column in id_columns(part):
                hits = pc.indices_nonzero(pc.is_in(part[column], value_set=self._values)).to_pylist()
                names = part[column]
                for row in hits:
                    if (path.name, row) not in distrusted:
                        self._where.setdefault(names[row].as_py(), (path, row, info.layout))

    def places(self, ids: Iterable[str]) -> dict[str, tuple[Path, int, Layout]]:
        """Of those of these tensors that are known: (shard, row, layout of its records)."""
        return {id_: self._where[id_] for id_ in ids if id_ in self._where}

    def learn(self, places: dict[str, tuple[Path, int, Layout]]) -> None:
        """Makes findable what `places` gave in another process."""
        self._where.update(places)

    def fetch(self, ids: list[dict[str, str]], field_of: Callable[[str], str] = str) -> list[dict[str, Any]]:
        """For the ids of each item its tensors, by the names of the ids; what is not known is missing.

        Args:
          field_of: the field of a name.

        Returns:
          What is made from captions is a tuple, of all of them.
        """
        found: list[dict[str, Any]] = [{} for _ in ids]
        wanted: dict[Path, tuple[Layout, dict[int, list[tuple[int, str]]]]] = {}
        for index, of_item in enumerate(ids):
            for name, id_ in of_item.items():
                if id_ in self._where:
                    path, row, layout = self._where[id_]
                    wanted.setdefault(path, (layout, {}))[1].setdefault(row, []).append((index, name))
        for path, (layout, by_row) in wanted.items():
            for row, record in self._read(path, sorted(by_row), layout):
                for index, name in by_row[row]:
                    found[index][name] = tensor_of(record, field_of(name))
        return found

    def _read(self, path: Path, rows: list[int], layout: Layout) -> Iterator[tuple[int, Record]]:
        for row, data in read_rows(path, rows):
            try:
                if isinstance(data, DatasetError):
                    raise data
                record = records.decode_record(data, layout)
                records.check_record(record)
                yield row, record
            except DatasetError as error:
                self._damaged(f"{path.name} row {row}: {error}; it is encoded again")


def read_rows(path: Path, rows: list[int]) -> Iterator[tuple[int, bytes | DatasetError]]:
    """Records of a shard by row; a damaged one is an error in its place, and the others are still read."""
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        count = reader.num_records()
    except (RuntimeError, ValueError, OSError) as error:
        for row in rows:
            yield row, DatasetError(f"the shard cannot be opened: {error}")
        return
    try:
        for row in rows:
            if row >= count:
                yield row, DatasetError(f"the shard has only {count} records")
                continue
            try:
                yield row, reader.read([row])[0]
            except (RuntimeError, ValueError, IndexError) as error:
                yield row, DatasetError(f"the record is damaged: {error}")
    finally:
        with contextlib.suppress(RuntimeError):
            reader.close()
