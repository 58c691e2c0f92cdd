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
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from array_record.python import array_record_module

from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.manifest import DatasetError, sha256_file
from fluxdit_jax.dataset.records import Record
from preprocess import PreprocessError
from preprocess.build.statistics import Moments
from preprocess.input.findings import Reject

WORK = ".build"
SHARD_SUFFIX = ".array_record"
_UNITS, _UNITS_SHA256 = b"fluxdit.units", b"fluxdit.units_sha256"
_PLACED = ("split", "shard", "row")
ROWS = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("bucket_height", pa.int32()),
        ("bucket_width", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("tokens", pa.int32()),
        ("content_hash", pa.string()),
        ("source", pa.string()),
        ("latent_id", pa.string()),
        ("text_id", pa.string()),
        ("vision_id", pa.string()),
    ]
)
INDEX_SCHEMA = pa.schema([("split", pa.string()), ("shard", pa.string()), ("row", pa.int32()), *ROWS])


@dataclasses.dataclass(frozen=True)
class UnitInfo:
    """What is known of a finished unit beside its rows.

    Attributes:
      uid: `plan.Unit.uid`.
      split: of its records.
      sha256, bytes, records: of its shard; "" and 0 if every image of the unit was rejected.
      text_width: needed to read its records.
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
    text_width: int
    moments: Moments | None
    rejects: tuple[Reject, ...]
    file: str = ""
    several: int = 0
    others: int = 0

    @property
    def final(self) -> bool:
        """False if trying again may give more records."""
        return not any(reject.transient for reject in self.rejects)

    def to_dict(self) -> dict[str, Any]:
        raw = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        raw["moments"] = self.moments.to_dict() if self.moments else None
        raw["rejects"] = [reject.to_dict() for reject in self.rejects]
        if not self.several:  # an index without such records says nothing of them
            del raw["several"], raw["others"]
        return raw

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> UnitInfo:
        raw = dict(raw)
        raw["moments"] = Moments.from_dict(raw["moments"]) if raw["moments"] else None
        raw["rejects"] = tuple(Reject(**reject) for reject in raw["rejects"])
        return cls(**raw)


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
            table = table.cast(INDEX_SCHEMA if len(table.schema) == len(INDEX_SCHEMA) else ROWS)
            return cls(table, units, about["rejects_sha256"])
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(f"{path} is damaged or was not written by this program: {error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path; what was written there replaces `path` for good when the block ends well."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    text_width: int,
    rejects: tuple[Reject, ...],
) -> UnitInfo:
    """Writes the shard and then the rows of one unit.

    Args:
      folder: the `.build` folder.
      members: the records, in the order of `rows`.
      rows: one dict a record, the columns of `ROWS`.

    Raises:
      PreprocessError: the disk is full or cannot be written.
    """
    shard = folder / (uid + SHARD_SUFFIX)
    moments, others = [], []
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
                finally:
                    writer.close()
                digest, size = sha256_file(temporary), temporary.stat().st_size
        info = UnitInfo(
            uid=uid,
            split=split,
            sha256=digest,
            bytes=size,
            records=len(rows),
            text_width=text_width,
            moments=Moments.merged(moments),
            rejects=rejects,
            several=sum(map(bool, others)),
            others=sum(others),
        )
        Rows(pa.Table.from_pylist(rows, ROWS), [info]).save(folder / f"{uid}.parquet")
    return info


def load_work(folder: Path) -> dict[str, Rows]:
    """Finished units in a `.build` folder by uid; damaged ones are left out (and made again)."""
    units = {}
    for path in sorted(folder.glob("*.parquet")):
        with contextlib.suppress(DatasetError):
            rows = Rows.load(path)
            info = rows.units[0] if rows.units else None
            if info and info.uid == path.stem:
                shard = folder / (info.uid + SHARD_SUFFIX)
                if not info.records or (shard.is_file() and shard.stat().st_size == info.bytes):
                    units[info.uid] = rows
    return units


def bucket_histogram(table: pa.Table) -> dict[str, int]:
    """ "HEIGHTxWIDTH" to records, sorted."""
    sizes = zip(table["bucket_height"].to_pylist(), table["bucket_width"].to_pylist())
    return {f"{h}x{w}": n for (h, w), n in sorted(collections.Counter(sizes).items())}


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
        self._where: dict[str, tuple[Path, int, int]] = {}

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
            for column in ("latent_id", "text_id", "vision_id"):
                hits = pc.indices_nonzero(pc.is_in(part[column], value_set=self._values)).to_pylist()
                names = part[column]
                for row in hits:
                    if (path.name, row) not in distrusted:
                        self._where.setdefault(names[row].as_py(), (path, row, info.text_width))

    def fetch(self, names: list[tuple[str, str, str]]) -> list[list[Any]]:
        """For each (latent, text, vision) id the latent, the texts of all captions and the vector; None: not known."""
        found: list[list[Any]] = [[None, None, None] for _ in names]
        wanted: dict[tuple[Path, int], dict[int, list[tuple[int, int]]]] = {}
        for index, triple in enumerate(names):
            for kind, name in enumerate(triple):
                if name in self._where:
                    path, row, width = self._where[name]
                    wanted.setdefault((path, width), {}).setdefault(row, []).append((index, kind))
        for (path, width), by_row in wanted.items():
            for row, record in self._read(path, sorted(by_row), width):
                tensors = (record.latent, record.texts, record.vision)
                for index, kind in by_row[row]:
                    found[index][kind] = tensors[kind]
        return found

    def _read(self, path: Path, rows: list[int], width: int) -> Iterator[tuple[int, Record]]:
        for row, data in read_rows(path, rows):
            try:
                if isinstance(data, DatasetError):
                    raise data
                record = records.decode_record(data, width)
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
