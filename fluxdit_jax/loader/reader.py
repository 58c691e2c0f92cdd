"""From shards to batches: a Grain pipeline whose every batch is a pure function of seed and position.

The position is the number of samples drawn since the start of the run. Sample i is element i of an endless
sequence of epochs, each a fresh global shuffle in which every record occurs exactly once. So a run that is
stopped anywhere, with any number of threads, micro-batch size or processes, goes on with the same samples.

A picture with several captions meets one of them in each sample, drawn by (seed, sample number): see
`captions.draw`. Everything that does not train (held-out loss, previews, the gate) takes the first caption.

A damaged record stops the run, or, if asked to, the next sound record in the order of its epoch takes its place:
then a batch is a pure function of seed, position and which records are damaged.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from fluxdit_jax.dataset import captions
from fluxdit_jax.dataset.cells import grid_at
from fluxdit_jax.dataset.fields import BF16, PATCHES, field_named, of_captions
from fluxdit_jax.dataset.manifest import DatasetError, Manifest
from fluxdit_jax.dataset.records import Record, check_fit, check_record, decode_record
from fluxdit_jax.dataset.shards import Shards
from fluxdit_jax.loader.batch_memory import BatchMemory
from fluxdit_jax.model.patches import patchify

log = logging.getLogger(__name__)
ON_CORRUPT = ("stop", "skip")
_DAMAGED_SHARE = 0.01  # of a split, at least one record: with more of it damaged, skipping stops too
# Batches are indexed by a Grain range; this is beyond any run's end.
_ENDLESS = 2**31 - 1


class RecordSource:
    """Random access to the decoded and checked records of one split (`grain.RandomAccessDataSource`).

    Attributes:
      manifest: of the data set.
      damaged: the records that `iter_valid` passed over so far, and what is wrong with each.

    Raises:
      DatasetError: at construction, if a shard is missing, truncated or holds another number of records
        than the manifest says (see `Shards`); at access, if a record is damaged: its checksum, its encoding, or,
        looked for when it is first read, a value that is not finite, a vector that has not unit norm, or a size
        that the manifest does not know.
        The message names shard and row.
    """

    def __init__(self, directory: str | Path, manifest: Manifest, split: str, on_corrupt: str = "stop"):
        """
        Args:
          on_corrupt: what `iter_valid` does at a damaged record: "stop" raises, "skip" passes over it.
        """
        if on_corrupt not in ON_CORRUPT:
            raise ValueError(f"on_corrupt is {on_corrupt!r}; it must be one of {', '.join(ON_CORRUPT)}")
        self._directory, self.manifest, self._split = directory, manifest, split
        self._skip = on_corrupt == "skip"
        self._lock = threading.Lock()
        self.damaged: dict[int, str] = {}
        shards = manifest.shards.get(split, ())
        if not shards:
            raise DatasetError(f"{directory}: split {split!r} has no records")
        self._shards = Shards(directory, shards)
        self._starts = list(itertools.accumulate((shard.records for shard in shards), initial=0))
        # Whose values were found in order. Their checksum is verified at every read, so once is enough.
        self._checked = bytearray(len(self))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[shard]
        try:
            record = decode_record(self._shards.read(shard, row), self.manifest.layout)
            if not self._checked[index]:
                check_record(record)
                check_fit(record, self.manifest)
                self._checked[index] = True
            return record
        except Exception as error:  # ArrayRecord raises bare C++ errors without a file name
            raise DatasetError(f"{self._shards.files[shard]} row {row} (record {index}): {error}") from error

    def iter_valid(self, order: Iterable[int]) -> Iterator[tuple[int, Record]]:
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


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """The arrays of a micro-batch: what `collate` makes and the network takes.

    Attributes:
      patch: side of a patch in latent pixels.
      tokens: image tokens a latent is padded to.
      token_width: values of one.
      widths: of each condition, by name.
      lengths: tokens that each sequence among them is padded or cut to.
      cell: side in pixels of a cell of the patches, if they are among them, see `cells.side_of`; else 0.
    """

    patch: int
    tokens: int
    token_width: int
    widths: dict[str, int]
    lengths: dict[str, int]
    cell: float = 0.0

    def without_patches(self) -> BatchLayout:
        """The same for what does not train."""

        def others(sizes: dict[str, int]) -> dict[str, int]:
            return {name: size for name, size in sizes.items() if name != PATCHES.name}

        return dataclasses.replace(self, widths=others(self.widths), lengths=others(self.lengths), cell=0.0)

    def __hash__(self) -> int:
        return hash((self.patch, self.tokens, self.token_width, *self.widths.items(), *self.lengths.items(), self.cell))

    def shapes(self, rows: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, dtype) of every array.

        latent bf16 [B, tokens, P], grid int32 [B, 2], of each sequence NAME bf16 [B, length, E] and NAME_length int32
        [B], of each vector f32 [B, V], index uint32 [B] (the sample's number), replaced bool [B] (it stands in for a
        damaged record). Patches are int8 [B, length, V + 2] with the rows and columns of their cells, int32 [B, 2].
        """
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "latent": ((self.tokens, self.token_width), BF16),
            "grid": ((2,), np.int32),
        }
        for name, width in self.widths.items():
            dtype = field_named(name).dtype
            if name in self.lengths:
                shapes |= {name: ((self.lengths[name], width), dtype), f"{name}_length": ((), np.int32)}
            else:
                shapes[name] = ((width,), dtype)
        if self.cell:
            shapes["cells"] = ((2,), np.int32)
        shapes |= {"index": ((), np.uint32), "replaced": ((), np.bool_)}
        return {name: ((rows, *shape), np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}


def collate(
    records: Iterable[Record],
    index: list[int],
    layout: BatchLayout,
    replaced: list[bool] | None = None,
    memory: BatchMemory | None = None,
) -> dict[str, np.ndarray]:
    """Stacks records into the arrays of `layout`.

    Args:
      records: are taken one by one, so that they need not all be in memory.
      index: numbers of the samples.
      replaced: which records stand in for damaged ones, looked at after the last record; None: none of them.
      memory: where the batch is written; its arrays are read-only. None: fresh memory.

    Returns:
      The arrays of `BatchLayout.shapes`. Padding is zero. What is made from the caption is that of the first one
      (`with_drawn_caption` makes another the first). Sequences longer than their length are cut.
    """
    B, names = len(index), list(layout.lengths)
    batch, filled = (memory or BatchMemory(B, layout.shapes(B), 1 + len(names))).take()
    before = filled.tolist()
    filled[:] = layout.tokens, *layout.lengths.values()  # should this fail half-way, all of it counts as used
    latent = batch["latent"].view(np.uint16)
    sequences = [(name, batch[name].view(np.uint8), length) for name, length in layout.lengths.items()]
    vectors = [(name, batch[name]) for name in layout.widths if name not in layout.lengths]
    grids, cell_grids, counts = [], [], []
    patch = layout.patch
    for row, record in enumerate(records):
        _, h, w = record.latent.shape
        rows, columns = h // patch, w // patch
        count = rows * columns
        if h % patch or w % patch or count > layout.tokens:
            raise DatasetError(
                f"record {record.key!r} has a latent of {w}x{h} (width x height), which does not fit {layout.tokens} "
                f"patches of side {patch}"
            )
        patchify(record.latent.view(np.uint16), patch, latent[row, :count])
        latent[row, count : before[row][0]] = 0
        used = [count]
        for number, (name, out, most) in enumerate(sequences, 1):
            values = record.conditions[name]
            length = min(len(values), most)
            _copy(values[:length], out[row, :length])
            out[row, length : before[row][number]] = 0
            used.append(length)
        for name, out in vectors:
            _copy(record.conditions[name], out[row])
        grids.append((rows, columns))
        cell_grids.append(grid_at(record.encoded_size, layout.cell) if layout.cell else None)
        counts.append(used)
    filled[:] = counts
    batch["grid"][:] = grids
    if layout.cell:
        batch["cells"][:] = cell_grids
    for number, name in enumerate(names, 1):
        batch[f"{name}_length"][:] = filled[:, number]
    batch["index"][:] = index
    batch["replaced"][:] = False if replaced is None else replaced
    if memory is not None:
        for array in batch.values():
            array.flags.writeable = False  # what is written into the padding would be in later batches
    return batch


def with_drawn_caption(record: Record, seed: int, number: int, weights: Sequence[float]) -> Record:
    """The record with the one caption that sample `number` is trained on; see `captions.draw`."""
    if not record.other_captions:
        return record
    chosen = captions.draw(seed, number, len(record.captions), weights)
    made = {field.name: record.of_all_captions(field.name)[chosen] for field in of_captions(record.layout())}
    return dataclasses.replace(
        record.having(**made), caption=record.captions[chosen], other_captions=(), other_conditions={}
    )


def _copy(source: np.ndarray, out: np.ndarray) -> None:
    """Copies between contiguous arrays of as many bytes.

    As plain memory, since numpy lets go of the interpreter's lock, and waiting for it again takes a reader thread
    longer than the copy.

    Raises:
      ValueError: they have not the same number of bytes.
    """
    out.reshape(-1).view(np.uint8).data[:] = source.reshape(-1).view(np.uint8).data


def batches(
    source: RecordSource,
    *,
    seed: int,
    start: int,
    batch_size: int,
    layout: BatchLayout,
    threads: int,
    prefetch: int,
    caption_weights: Sequence[float] = (),
    process: int = 0,
    processes: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless micro-batches from sample position `start` on, of the first sound record from each position on.

    Their arrays are read-only, and their memory is used again once nothing refers to any of them.

    Args:
      batch_size: samples of the micro-batch over all processes; each process reads its own equal part.
      threads, prefetch: reader threads, and batches read ahead; neither changes what is read.
      caption_weights: of a picture's first, second, ... caption; see `captions.draw`.
    """
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    local = batch_size // processes
    memory = BatchMemory(local, layout.shapes(local), 1 + len(layout.lengths))

    def rest_of_epoch(position: int, number: int) -> Iterator[int]:
        """The record at a position, the others to the end of its epoch, then those from its beginning."""
        yield number
        begin = position - position % len(source)
        for i in itertools.chain(range(position + 1, begin + len(source)), range(begin, position)):
            yield order[i]

    def read(number: int) -> dict[str, np.ndarray]:
        first = start + number * batch_size + process * local
        index = list(range(first, first + local))
        wanted = [order[i] for i in index]
        replaced = []

        # One record at a time: its memory is used again for the next one, where that of a whole batch of
        # records would be returned to the system and faulted in anew.
        def records() -> Iterator[Record]:
            for position, asked in zip(index, wanted, strict=True):
                found, record = next(source.iter_valid(rest_of_epoch(position, asked)))
                replaced.append(found != asked)
                yield with_drawn_caption(record, seed, position, caption_weights)

        return collate(records(), index, layout, replaced, memory)

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(_ENDLESS).map(read).to_iter_dataset(options))


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices spread evenly over range(count); all of them if there are fewer."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(wanted, count)).round())]
