"""`python -m preprocess export`: a dataset as WebDataset tar shards, for tools of that world."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from fluxdit_jax.dataset import captions, records
from fluxdit_jax.dataset.fields import Layout
from fluxdit_jax.dataset.manifest import MANIFEST, SPLITS, DatasetError, load_manifest
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.shared.atomic_files import replacing
from preprocess import PreprocessError
from preprocess.build.journal import Journal
from preprocess.build.units import disk_errors, read_rows
from preprocess.decoding.formats import EXTENSIONS
from preprocess.input.sidecars import extension

FORMATS = ("webdataset",)


def export(directory: str | Path, output: str | Path, format: str = "webdataset") -> list[Path]:  # noqa: A002
    """Writes one tar for every shard, and removes those of an earlier export of a data set of this name.

    A sample is `NNNNNNNNN.json` (key, caption, sizes, content hash) and `NNNNNNNNN.safetensors` (latent and
    sequences in bfloat16, vectors in float32: .npy has no bfloat16). The number counts the records of a split, so a
    member's name never comes from the data. A record with several captions has `other_captions` in the .json, and
    `other_text` (bfloat16 [sum of n, width]) and `other_lengths` (int64, n of each) in the .safetensors.

    Raises:
      DatasetError: a record is damaged.
      PreprocessError: the format is unknown, or the output cannot be written.
    """
    if format not in FORMATS:
        raise PreprocessError(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    directory, output = Path(directory), Path(output)
    manifest = load_manifest(directory)
    for path in sorted(output.glob("*")):
        if path.name == MANIFEST or extension(path.name) in EXTENSIONS:
            raise PreprocessError(f"--output {output} has {path.name}: give a folder of its own")
    output.mkdir(parents=True, exist_ok=True)
    written = []
    total = sum(manifest.records(split) for split in manifest.shards)
    with Journal(None).bar(total, "export", "record") as bar:
        for split in (name for name in SPLITS if name in manifest.shards):
            number = 0
            for index, shard in enumerate(manifest.shards[split]):
                path = output / f"{manifest.name}-{split}-{index:06d}.tar"
                with disk_errors(path), replacing(path) as temporary, tarfile.open(temporary, "w") as archive:
                    for row, data in read_rows(directory / shard.file, list(range(shard.records))):
                        record = _record(directory / shard.file, row, data, manifest.layout)
                        for suffix, content in _members(record):
                            _add(archive, f"{number:09d}.{suffix}", content)
                        number += 1
                        bar.update(1)
                written.append(path)
    of_an_earlier = {path for split in SPLITS for path in output.glob(f"{manifest.name}-{split}-{'[0-9]' * 6}.tar")}
    for path in of_an_earlier.difference(written):  # of a data set of this name that had more shards
        path.unlink()
    return written


def _record(shard: Path, row: int, data: bytes | DatasetError, layout: Layout) -> Record:
    try:
        if isinstance(data, DatasetError):
            raise data
        return records.decode_record(data, layout)
    except DatasetError as error:
        raise DatasetError(f"{shard} row {row}: {error}; see `python -m preprocess verify`") from error


def _members(record: Record) -> list[tuple[str, bytes]]:
    layout = record.layout()
    about = {
        "key": record.key,
        "caption": record.caption,
        "content_hash": record.content_hash,
        "original_size": list(record.original_size),
        "encoded_size": list(record.encoded_size),
    }
    tensors = {name: array.copy() for name, array in ({"latent": record.latent} | record.conditions).items()}
    if record.other_captions:
        about["other_captions"] = list(record.other_captions)
        for name, others in record.other_conditions.items():
            tensors[captions.feature(name)] = np.concatenate(others)
            if layout[name] is not None:
                tensors[captions.lengths_feature(name)] = np.array([len(other) for other in others], np.int64)
    return [("json", json.dumps(about, ensure_ascii=False).encode()), ("safetensors", save(tensors))]


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time and owner stay 0: the same dataset gives the same bytes
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
