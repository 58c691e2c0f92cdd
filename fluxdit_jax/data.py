"""From shards to batches: a Grain pipeline whose every batch is a pure function of seed and position.

The position is the number of samples drawn since the start of the run. Sample i is element i of an endless
sequence of epochs, each a fresh global shuffle in which every record occurs exactly once. So a run that is
stopped anywhere, with any number of threads, micro-batch size or processes, goes on with the same samples.

A damaged record stops the run, or, if asked to, the next sound record in the order of its epoch takes its place:
then a batch is a pure function of seed, position and which records are damaged.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import grain
import numpy as np

from fluxdit_jax.records import (
    BF16,
    DatasetError,
    Manifest,
    Record,
    check_fit,
    check_record,
    decode_record,
)

log = logging.getLogger(__name__)
ON_CORRUPT = ("stop", "skip")
_DAMAGED_SHARE = 0.01  # of a split, at least one record: with more of it damaged, skipping stops too
# Batches are indexed by a Grain range; this is beyond any run's end.
_ENDLESS = 2**31 - 1


class RecordSource:
    """Random access to the decoded and checked records of one split (`grain.RandomAccessDataSource`).

    Attributes:
      damaged: the records that `sound` passed over so far, and what is wrong with each.

    Raises:
      DatasetError: at construction, if a shard is missing, truncated or holds another number of records
        than the manifest says; at access, if a record is damaged: its checksum, its encoding, a value that is
        not finite, a vector that has not unit norm, or a size that the manifest does not know. The message
        names shard and row.
    """

    def __init__(self, directory: str | Path, manifest: Manifest, split: str, on_corrupt: str = "stop"):
        """
        Args:
          on_corrupt: what `sound` does at a damaged record: "stop" raises, "skip" passes over it.
        """
        if on_corrupt not in ON_CORRUPT:
            raise ValueError(f"on_corrupt is {on_corrupt!r}; it must be one of {', '.join(ON_CORRUPT)}")
        self._directory, self._manifest, self._split = directory, manifest, split
        self._skip = on_corrupt == "skip"
        self._lock = threading.Lock()
        self.damaged: dict[int, str] = {}
        shards = manifest.shards.get(split, ())
        if not shards:
            raise DatasetError(f"{directory}: split {split!r} has no records")
        self._files = [Path(directory) / shard.file for shard in shards]
        self._starts = list(itertools.accumulate((shard.records for shard in shards), initial=0))
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
            record = decode_record(self._shards[shard][row], self._manifest.text.width)
            check_record(record)
            check_fit(record, self._manifest)
            return record
        except Exception as error:  # ArrayRecord raises bare C++ errors without a file name
            raise DatasetError(f"{self._files[shard]} row {row} (record {index}): {error}") from error

    def sound(self, order: Iterable[int]) -> Iterator[tuple[int, Record]]:
        """(number, record) of those of these records that are not damaged, read one by one as they are asked for.

        A damaged record is named in the log once, and read once.

        Raises:
          DatasetError: a record is damaged and on_corrupt is "stop"; or more than 1 % of the split, and more
            than one record, are damaged; or there is no sound record among these.
        """
        none = True
        for number in order:
            if number in self.damaged:
                continue
            try:
                record = self[number]
            except DatasetError as error:
                if not self._skip:
                    raise DatasetError(
                        f"{error}. `python -m preprocess verify --repair {self._directory}` encodes it again; "
                        "config.data.on_corrupt=skip goes on without it"
                    ) from error
                self._pass_over(number, error)
                continue
            none = False
            yield number, record
        if none:
            raise DatasetError(f"{self._directory}: of the records wanted of {self._split!r}, none is sound")

    def _pass_over(self, number: int, error: DatasetError) -> None:
        most = max(1, int(len(self) * _DAMAGED_SHARE))
        with self._lock:
            if number in self.damaged:  # another thread was faster
                return
            self.damaged[number] = str(error)
            count = len(self.damaged)
        log.warning("damaged record passed over (%d so far, at most %d): %s", count, most, error)
        if count > most:
            raise DatasetError(
                f"{count} of the {len(self)} records of the split {self._split!r} are damaged, the last: {error}. "
                f"config.data.on_corrupt=skip goes on with at most {most}; "
                f"`python -m preprocess verify --repair {self._directory}` encodes them again"
            ) from error


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


def collate(
    records: list[Record],
    index: list[int],
    patch: int,
    tokens: int,
    text_tokens: int,
    replaced: list[bool] | None = None,
) -> dict:
    """Stacks records into the arrays `train_step.make_train_step` takes; everything is fresh memory.

    Args:
      replaced: which records stand in for damaged ones; None: none of them.

    Returns:
      latent bf16 [B, tokens, P], grid int32 [B, 2], text bf16 [B, text_tokens, E], text_length int32 [B],
      vision f32 [B, V], index uint32 [B], replaced bool [B]. Padding is zero. Captions longer than text_tokens
      are cut.
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
        "replaced": np.zeros(B, bool) if replaced is None else np.asarray(replaced, bool),
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
    """Endless micro-batches from sample position `start` on, of the first sound record from each position on.

    Args:
      batch_size: samples of the micro-batch over all processes; each process reads its own equal part.
      threads, prefetch: reader threads, and batches read ahead; neither changes what is read.
    """
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    local = batch_size // processes

    def rest_of_epoch(position: int) -> Iterator[int]:
        """The records from a position to the end of its epoch, then those from its beginning."""
        begin = position - position % len(source)
        return (
            order[i] for i in itertools.chain(range(position, begin + len(source)), range(begin, position))
        )

    def read(number: int) -> dict:
        first = start + number * batch_size + process * local
        index = list(range(first, first + local))
        numbers, records = zip(*(next(source.sound(rest_of_epoch(i))) for i in index), strict=True)
        replaced = [number != order[i] for number, i in zip(numbers, index, strict=True)]
        return collate(records, index, patch, tokens, text_tokens, replaced)

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(_ENDLESS).map(read).to_iter_dataset(options))
