"""`python -m preprocess verify`: reads every byte of a dataset and says what is wrong, by shard and row."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from array_record.python import array_record_module

from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.grid import GRID_FILE, read_grid
from fluxdit_jax.dataset.manifest import (
    INDEX,
    MANIFEST,
    REJECTS,
    SHARD_FILES,
    DatasetError,
    Manifest,
    Shard,
    load_manifest,
    sha256_file,
)
from fluxdit_jax.shared.sanitize import shown
from preprocess import PreprocessError
from preprocess.buckets import nearest
from preprocess.build.build import build
from preprocess.build.journal import Journal
from preprocess.build.options import Options
from preprocess.build.parts import all_locked
from preprocess.build.plan import Fingerprints, digest
from preprocess.build.publish import OPTIONS_FILE, load_options, write_tfds_metadata
from preprocess.build.rows import (
    Finished,
    Rows,
    RowsFile,
    UnitInfo,
    bucket_histogram,
    id_columns,
    index_row,
    rows_schema,
)
from preprocess.build.statistics import Moments
from preprocess.build.units import read_rows
from preprocess.database import Database

WHOLE = -1  # the row of a finding about a whole shard


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something wrong: in which file, at which row (-1: the file as a whole), and what."""

    file: str
    row: int
    what: str

    def __str__(self) -> str:
        return f"{shown(self.file)}{f' row {self.row}' if self.row >= 0 else ''}: {self.what}"


def verify(directory: str | Path, workers: int = 2) -> list[Finding]:
    """Reads everything and compares it with the manifest and the index.

    Raises:
      DatasetError: there is no manifest, or it cannot be read.
    """
    directory = Path(directory)
    manifest = load_manifest(directory)
    findings: list[Finding] = []
    index, rejects_sha256 = None, ""
    try:
        rows = RowsFile(directory / INDEX)
        rows.check()
        index, rejects_sha256 = {unit.info.file: unit for unit in rows}, rows.rejects_sha256
    except DatasetError as error:
        findings.append(Finding(INDEX, WHOLE, str(error)))
    findings += _check_metadata(directory, manifest, rejects_sha256)
    shards = [(split, shard) for split, of_split in manifest.shards.items() for shard in of_split]
    moments: list[Moments] = []
    keys = Database("CREATE TABLE keys (key TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID")
    journal = Journal(None)
    with (
        ThreadPoolExecutor(workers) as pool,
        journal.bar(sum(s.records for _, s in shards), "verify", "record") as bar,
    ):
        jobs = [pool.submit(_check_shard, directory, s, split, manifest, index, bar.update) for split, s in shards]
        for (split, shard), job in zip(shards, jobs):
            found, of_shard, shard_keys = job.result()
            findings += found
            if split == "train" and of_shard:
                moments.append(of_shard)
            for row, key in enumerate(shard_keys):
                if key and not keys.run("INSERT OR IGNORE INTO keys VALUES (?, ?)", key, f"{shard.file} row {row}"):
                    ((other,),) = keys.rows("SELECT place FROM keys WHERE key = ?", key)
                    findings.append(Finding(shard.file, row, f"key {key!r} is in {other} too"))
    count = sum(unit.info.records for unit in index.values()) if index is not None else 0
    if index is not None and count != sum(shard.records for _, shard in shards):
        findings.append(Finding(INDEX, WHOLE, f"{count} rows, not one for each record"))
    if not findings:
        findings += _check_statistics(manifest, Moments.merged(moments))
    return findings


def _check_metadata(directory: Path, manifest: Manifest, rejects_sha256: str) -> list[Finding]:
    findings = []
    if (directory / MANIFEST).read_text(encoding="utf-8") != manifest.to_json():
        findings.append(Finding(MANIFEST, WHOLE, "says the right things, but is not as it was written"))
    listed = {shard.file for shards in manifest.shards.values() for shard in shards}
    for path in directory.glob(SHARD_FILES):
        if path.name not in listed:
            findings.append(Finding(path.name, WHOLE, "is not in the manifest"))
    with tempfile.TemporaryDirectory() as folder:
        for name in listed:
            (Path(folder) / name).touch()
        write_tfds_metadata(Path(folder), manifest)
        for name in ("dataset_info.json", "features.json"):
            if not (directory / name).is_file():
                findings.append(Finding(name, WHOLE, "is missing"))
            elif (directory / name).read_bytes() != (Path(folder) / name).read_bytes():
                findings.append(Finding(name, WHOLE, "is not what the manifest calls for"))
    if (directory / OPTIONS_FILE).exists():
        try:
            load_options(directory)
        except PreprocessError as error:
            findings.append(Finding(OPTIONS_FILE, WHOLE, str(error)))
    try:
        read_grid(directory / GRID_FILE)
    except DatasetError as error:
        findings.append(Finding(GRID_FILE, WHOLE, str(error)))
    rejects = directory / REJECTS
    if not rejects.is_file():
        findings.append(Finding(REJECTS, WHOLE, "is missing"))
    elif rejects_sha256 and sha256_file(rejects) != rejects_sha256:
        findings.append(Finding(REJECTS, WHOLE, f"its sha256 is not the one in {INDEX}"))
    return findings


def _check_shard(
    directory: Path,
    shard: Shard,
    split: str,
    manifest: Manifest,
    index: dict[str, Finished] | None,
    progress: Callable[[int], None],
) -> tuple[list[Finding], Moments | None, list[str]]:
    path = directory / shard.file
    findings: list[Finding] = []

    def whole(what: str) -> None:
        findings.append(Finding(shard.file, WHOLE, what))

    if not path.is_file():
        whole("is missing")
        return findings, None, []
    digest = sha256_file(path)
    if digest != shard.sha256:
        whole(f"sha256 is {digest[:16]}..., the manifest says {shard.sha256[:16]}...")
    if path.stat().st_size != shard.bytes:
        whole(f"{path.stat().st_size} bytes, the manifest says {shard.bytes}")
    try:
        count = array_record_module.ArrayRecordReader(str(path)).num_records()
    except (RuntimeError, ValueError, OSError) as error:
        whole(f"cannot be opened: {error}")
        return findings, None, []
    if count != shard.records:
        whole(f"{count} records, the manifest says {shard.records}")
    rows = None
    if index is not None:
        of_shard = index[shard.file].read() if shard.file in index else None
        rows = of_shard.to_pylist() if of_shard is not None else []
        if len(rows) != shard.records or any((r["split"], r["shard"]) != (split, shard.file) for r in rows):
            whole(f"{len(rows)} rows in {INDEX}, {shard.records} records in the manifest")
            rows = None
        elif of_shard is not None and bucket_histogram(of_shard) != shard.buckets:
            whole(f"the buckets in {INDEX} are not those in the manifest")
    keys, moments = [], None
    for row, data in read_rows(path, list(range(count))):
        progress(1)
        key = ""
        try:
            if isinstance(data, DatasetError):
                raise data
            record = records.decode_record(data, manifest.layout)
            records.check_record(record)
            _compare(record, rows[row] if rows and row < len(rows) else None, manifest)
            part = Moments.of(record.latent)
            moments = Moments.merged([moments, part] if moments else [part])
            key = record.key
        except DatasetError as error:
            findings.append(Finding(shard.file, row, str(error)))
        keys.append(key)
    return findings, moments, keys


def _compare(record: records.Record, row: dict[str, Any] | None, manifest: Manifest) -> None:
    """Raises `DatasetError` if a record does not fit the manifest or its row of the index."""
    records.check_fit(record, manifest)
    if row is None:
        return
    for name, value in index_row(record, {}, row["source"]).items():
        if row[name] != value:
            raise DatasetError(f"{name} is {value!r}, {INDEX} says {row[name]!r}")


def _check_statistics(manifest: Manifest, moments: Moments | None) -> list[Finding]:
    if moments is None:
        return [Finding(MANIFEST, WHOLE, "there is no readable record in the train split")]
    findings = []
    if moments.count != manifest.latent_count:
        what = f"latent_count is {manifest.latent_count}, the records have {moments.count}"
        findings.append(Finding(MANIFEST, WHOLE, what))
    for name, stated, found in (
        ("latent_mean", manifest.latent_mean, moments.mean),
        ("latent_std", manifest.latent_std, moments.std),
    ):
        error = float(np.abs(np.array(stated) - found).max())
        if not error <= 1e-9 * max(1.0, float(np.abs(found).max())):
            findings.append(Finding(MANIFEST, WHOLE, f"{name} is off by {error:.3g} from the records"))
    return findings


def difference(datasets: list[Path]) -> list[Finding]:
    """What sound datasets of several resolutions of one image set do not have in common, though they should."""
    shared = ["split", "key", "caption", "content_hash", "height", "width", "tokens"]
    first, *others = (Rows.load(dataset / INDEX).table for dataset in datasets)
    shared += [column for column in id_columns(first) if column != "latent_id"]
    return [
        Finding(str(dataset), WHOLE, f"its records are not those of {datasets[0]}: {name} differs")
        for dataset, table in zip(datasets[1:], others, strict=True)
        for name in shared
        if name not in table.column_names or not table[name].equals(first[name])
    ]


def repair(directory: str | Path, findings: Mapping[Path, list[Finding]]) -> None:
    """Encodes again what is damaged, and writes anew what can be derived from the rest.

    Runs the dataset's own `build` with the damaged records as if they had never been made. So sources that
    have changed since are taken up too, as with any `build`.

    Args:
      directory: of a dataset, or of those of several resolutions.
      findings: of each dataset.

    Raises:
      PreprocessError: the build's options or the sources are not there.
      WouldLose: sound records would go, because their pictures are not there.
    """
    options = dataclasses.replace(load_options(Path(directory)), output=str(directory))
    # Of all datasets in one set: a shard's name holds that of its folder.
    damaged = frozenset((f.file, f.row) for found in findings.values() for f in found if ".array_record" in f.file)
    with all_locked(options):
        for dataset, found in findings.items():
            if any(finding.file == INDEX for finding in found):
                with contextlib.suppress(DatasetError):  # without a manifest too, everything is encoded again
                    salvage_index(dataset, load_options(dataset))
            elif any(finding.file == MANIFEST for finding in found):
                damaged |= _unlike_index(dataset)
    build(options, damaged)


def _unlike_index(directory: Path) -> set[tuple[str, int]]:
    """All records of the shards that are not those of the index, for want of a manifest that `verify` compares with."""
    with contextlib.suppress(DatasetError):
        return {
            (unit.file, row)
            for unit in RowsFile(directory / INDEX).units
            if not (directory / unit.file).is_file() or sha256_file(directory / unit.file) != unit.sha256
            for row in range(unit.records)
        }
    return set()


def salvage_index(directory: Path, options: Options) -> None:
    """Writes the index anew from the records themselves.

    Raises:
      DatasetError: the manifest is damaged as well.
    """
    manifest = load_manifest(directory)
    prints = Fingerprints.of(options, manifest.encoders)
    further = [name for name in manifest.lengths if name != "text"]
    tables, infos = [], []
    for split, shards in manifest.shards.items():
        for shard in shards:
            rows, moments, others = [], [], []
            lengths = dict.fromkeys(further, 0)
            for row, data in read_rows(directory / shard.file, list(range(shard.records))):
                with contextlib.suppress(DatasetError):
                    if isinstance(data, DatasetError):
                        raise data
                    record = records.decode_record(data, manifest.layout)
                    moments.append(Moments.of(record.latent))
                    others.append(len(record.other_captions))
                    lengths = {name: max(n, *map(len, record.of_all_captions(name))) for name, n in lengths.items()}
                    seen = nearest(options.seen_buckets(), *record.original_size)
                    ids = prints.ids_of(record.content_hash, record.encoded_size, seen, record.captions)
                    place = {"split": split, "shard": shard.file, "row": row}
                    rows.append(place | index_row(record, dict(zip(prints.names, ids, strict=True)), record.key))
            # Rows of unreadable records are missing, so the unit's name fits no plan and it is made again.
            whole = [[r["key"], r["content_hash"], *(r[f"{name}_id"] for name in prints.names)] for r in rows]
            infos.append(
                UnitInfo(
                    uid=digest(records.WRITER_OPTIONS, split, whole),
                    split=split,
                    sha256=shard.sha256,
                    bytes=shard.bytes,
                    records=len(rows),
                    layout=manifest.layout,
                    moments=Moments.merged(moments),
                    rejects=(),
                    file=shard.file,
                    several=sum(map(bool, others)),
                    others=sum(others),
                    lengths=lengths,
                )
            )
            tables.append(pa.Table.from_pylist(rows, rows_schema(prints.names, placed=True)))
    rejects = directory / REJECTS
    digest_of_rejects = sha256_file(rejects) if rejects.is_file() else ""
    Rows(pa.concat_tables(tables), infos, digest_of_rejects).save(directory / INDEX)


def report(findings: list[Finding], directory: str, whole: str = "") -> int:
    """Prints findings and returns the exit status: 0 if there are none.

    Args:
      whole: the folder of several resolutions that the dataset is in.
    """
    for finding in findings:
        print(shown(str(finding), lines=True))
    if findings:
        print(
            f"error: {len(findings)} things are wrong with {directory}; `python -m preprocess verify "
            f"{whole or directory} --repair` encodes again what is damaged",
            file=sys.stderr,
        )
        return 1
    print(f"{directory}: every record, checksum and statistic is right")
    return 0
