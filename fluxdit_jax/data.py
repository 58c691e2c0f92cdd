"""From shards to batches: a Grain pipeline whose every batch is a pure function of seed and position.

The position is the number of samples drawn since the start of the run. Sample i is element i of an endless
sequence of epochs, each a fresh global shuffle in which every record occurs exactly once. So a run that is
stopped anywhere, with any number of threads, micro-batch size or processes, goes on with the same samples.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np

from fluxdit_jax.records import BF16, DatasetError, Manifest, Record, decode_record

# Batches are indexed by a Grain range; this is beyond any run's end.
_ENDLESS = 2**31 - 1


class RecordSource:
    """Random access to the decoded records of one split (`grain.RandomAccessDataSource`).

    Raises:
      DatasetError: at construction, if a shard is missing, truncated or holds another number of records
        than the manifest says; at access, if a record is damaged. The message names shard and row.
    """

    def __init__(self, directory: str | Path, manifest: Manifest, split: str):
        shards = manifest.shards.get(split, ())
        if not shards:
            raise DatasetError(f"{directory}: split {split!r} has no records")
        self._files = [Path(directory) / shard.file for shard in shards]
        self._starts = list(itertools.accumulate((shard.records for shard in shards), initial=0))
        self._text_width = manifest.text.width
        self._shards = []
        for file, shard in zip(self._files, shards, strict=True):
            if not file.is_file():
                raise DatasetError(f"{file} is missing; the manifest lists it with {shard.records} records")
            if file.stat().st_size != shard.bytes:
                raise DatasetError(
                    f"{file} has {file.stat().st_size} bytes, the manifest says {shard.bytes}: it is truncated or "
                    f"from another build. `python -m preprocess verify {directory}` tells what is damaged"
                )
            try:
                opened = grain.sources.ArrayRecordDataSource([str(file)])
            except Exception as error:  # ArrayRecord raises bare C++ errors without a file name
                raise DatasetError(
                    f"{file} cannot be opened: {str(error).splitlines()[0]}. "
                    f"`python -m preprocess verify {directory}` tells what is damaged"
                ) from error
            if len(opened) != shard.records:
                raise DatasetError(
                    f"{file} holds {len(opened)} records, the manifest says {shard.records}: it is from another build"
                )
            self._shards.append(opened)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[shard]
        try:
            return decode_record(self._shards[shard][row], self._text_width)
        except Exception as error:  # ArrayRecord raises bare C++ errors without a file name
            raise DatasetError(f"{self._files[shard]} row {row} (record {index}): {error}") from error


def patchify(latent_CxHxW: np.ndarray, patch: int) -> np.ndarray:
    """[C, h, w] -> [h/p * w/p, p * p * C], tokens row by row, patches as (row, column, channel)."""
    C, h, w = latent_CxHxW.shape
    grid = latent_CxHxW.reshape(C, h // patch, patch, w // patch, patch)
    return grid.transpose(1, 3, 2, 4, 0).reshape(-1, patch * patch * C)


def unpatchify(tokens_NxP: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """The inverse of `patchify` for the first rows * columns tokens: [C, h, w]."""
    rows, columns = grid
    channels = tokens_NxP.shape[-1] // patch**2
    tiles = tokens_NxP[: rows * columns].reshape(rows, columns, patch, patch, channels)
    return tiles.transpose(4, 0, 2, 1, 3).reshape(channels, rows * patch, columns * patch)


def collate(records: list[Record], index: list[int], patch: int, tokens: int, text_tokens: int) -> dict:
    """Stacks records into the arrays `train_step.make_train_step` takes; everything is fresh memory.

    Returns:
      latent bf16 [B, tokens, P], grid int32 [B, 2], text bf16 [B, text_tokens, E], text_length int32 [B],
      vision f32 [B, V], index uint32 [B]. Padding is zero. Captions longer than text_tokens are cut.
    """
    B = len(records)
    first = records[0]
    latent = np.zeros((B, tokens, first.latent.shape[0] * patch**2), BF16)
    text = np.zeros((B, text_tokens, first.text.shape[1]), BF16)
    batch = {
        "latent": latent,
        "grid": np.empty((B, 2), np.int32),
        "text": text,
        "text_length": np.empty((B,), np.int32),
        "vision": np.stack([record.vision for record in records]),
        "index": np.asarray(index, np.uint32),
    }
    for row, record in enumerate(records):
        _, h, w = record.latent.shape
        grid = (h // patch, w // patch)
        if h % patch or w % patch or grid[0] * grid[1] > tokens:
            raise DatasetError(
                f"record {record.key!r} has a latent of {h}x{w}, which does not fit {tokens} patches of side {patch}"
            )
        latent[row, : grid[0] * grid[1]] = patchify(record.latent, patch)
        length = min(len(record.text), text_tokens)
        text[row, :length] = record.text[:length]
        batch["grid"][row] = grid
        batch["text_length"][row] = length
    return batch


def batches(
    source: RecordSource,
    *,
    seed: int,
    start: int,
    batch_size: int,
    patch: int,
    tokens: int,
    text_tokens: int,
    threads: int,
    prefetch: int,
    process: int = 0,
    processes: int = 1,
) -> Iterator[dict]:
    """Endless micro-batches from sample position `start` on.

    Args:
      batch_size: samples of the micro-batch over all processes; each process reads its own equal part.
      threads, prefetch: reader threads, and batches read ahead; neither changes what is read.
    """
    samples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    local = batch_size // processes

    def read(number: int) -> dict:
        first = start + number * batch_size + process * local
        index = list(range(first, first + local))
        return collate([samples[i] for i in index], index, patch, tokens, text_tokens)

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(_ENDLESS).map(read).to_iter_dataset(options))
