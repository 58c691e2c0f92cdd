"""A finished unit of work on disk.

While a build runs, `DATASET/.build/` holds for every finished unit its shard, `<uid>.array_record`, and
`<uid>.parquet`, one row a record with the shard's checksum and statistics in the metadata. The second is
written last: a unit is finished if and only if it is there. When the dataset is published the rows of all
units become `index.parquet`, with the units' metadata in its own.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from array_record.python import array_record_module

from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.fields import USUAL, Layout
from fluxdit_jax.dataset.manifest import DatasetError, sha256_file
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.shared.atomic_files import replacing
from preprocess import PreprocessError
from preprocess.build.rows import Finished, RowsFile, UnitInfo, rows_schema, write_rows
from preprocess.build.statistics import Moments
from preprocess.input.findings import Reject

WORK = ".build"
SHARD_SUFFIX = ".array_record"


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
        write_rows(folder / f"{uid}.parquet", schema, [info], [pa.Table.from_pylist(rows, schema)])
    return info


def load_unit(folder: Path, uid: str) -> Finished | None:
    """A finished unit in a `.build` folder; None if it is not there, or damaged (and to be made again)."""
    path = folder / f"{uid}.parquet"
    with contextlib.suppress(DatasetError):
        file = RowsFile(path)
        info = file.units[0] if file.units else None
        if info and info.uid == uid:
            file.check()
            shard = folder / (uid + SHARD_SUFFIX)
            if not info.records or (shard.is_file() and shard.stat().st_size == info.bytes):
                return Finished(info, lambda: RowsFile(path).rows(0))
    return None


def load_work(folder: Path) -> dict[str, Finished]:
    """Finished units in a `.build` folder by uid."""
    found = {path.stem: load_unit(folder, path.stem) for path in sorted(folder.glob("*.parquet"))}
    return {uid: unit for uid, unit in found.items() if unit is not None}


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
