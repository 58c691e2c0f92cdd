"""What is encoded already: the units of a dataset and those of a build that did not end, and their tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxdit_jax.dataset.manifest import INDEX, MANIFEST, SHARD_FILES, DatasetError
from preprocess.build.archive import Archive
from preprocess.build.journal import Journal
from preprocess.build.publish import pending_index
from preprocess.build.rows import Finished, RowsFile, UnitInfo, id_columns
from preprocess.build.units import SHARD_SUFFIX, WORK, load_work

_COMPARED = ["key", "content_hash", "bucket_height", "bucket_width"]


class Existing:
    """Units that exist, in the dataset or in `.build`, and where else tensors can be found.

    Attributes:
      units: the finished units of the plan, by uid.
      records: how many the dataset has; 0 if there is none.
      damaged: those of its rows, by number, whose record cannot be used.
      unreadable: why the index of the dataset cannot be read; "" if it can, or there is no dataset.
    """

    def __init__(self, output: Path, distrusted: frozenset[tuple[str, int]], journal: Journal) -> None:
        self._output, self._distrusted, self._journal = output, distrusted, journal
        self.units: dict[str, Finished] = {}
        self.records = 0
        self.damaged: set[int] = set()
        self.unreadable = ""
        self._index: list[Finished] = []
        self._work: list[Finished] = []
        self._sources: list[Finished] = []

    @classmethod
    def load(
        cls,
        output: Path,
        uids: set[str],
        journal: Journal,
        distrusted: frozenset[tuple[str, int]] = frozenset(),
    ) -> Existing:
        """Looks at an output folder, and changes nothing in it.

        Args:
          uids: of the plan's units.
          distrusted: (shard file, row) of records that must not be used.
        """
        existing = cls(output, distrusted, journal)
        existing._load_index(uids)
        for uid, unit in load_work(output / WORK).items():
            existing._work.append(unit)
            # Tensors of a unit of this very plan are not used for its other units: whether it was made before
            # or after a kill must make no difference to them.
            if uid not in uids or not unit.info.final:
                existing._sources.append(unit)
            elif uid not in existing.units:
                existing.add(unit)
        return existing

    def _load_index(self, uids: set[str]) -> None:
        pending = pending_index(self._output)  # while its shards are being moved their places say nothing
        path = pending or self._output / INDEX
        shards = self._output.glob(SHARD_FILES)  # of a copy that was broken off, perhaps without the rest
        if not path.exists() and not (self._output / MANIFEST).exists() and not any(shards):
            return
        try:
            index = RowsFile(path)
            index.check()
        except DatasetError as error:
            self.unreadable = str(error)
            self._journal.say(f"damaged: {error}; what it described is not known")
            return
        self._index, self.records = list(index), index.records
        self._sources += self._index
        distrusted_files = {file for file, _ in self._distrusted}
        start = 0
        for unit in self._index:
            info = unit.info
            rows = range(start, start + info.records)
            start += info.records
            there = bool(pending) or _complete(self._output / info.file, info)
            if not there:
                self.damaged.update(rows)
            if info.file in distrusted_files:
                self.damaged.update(row for row in rows if (info.file, row - rows.start) in self._distrusted)
            if info.uid in uids and info.final and there and info.file not in distrusted_files:
                self.add(unit)

    def add(self, unit: Finished) -> None:
        """A unit of the plan that is finished."""
        self.units[unit.info.uid] = unit

    def rows(self) -> Iterator[dict[str, Any]]:
        """What there is to compare of each record of the dataset: key, content, bucket and the ids of its tensors."""
        for unit in self._index:
            rows = unit.read()
            yield from rows.select([*_COMPARED, *id_columns(rows)]).to_pylist()

    def usable(self) -> Iterator[str]:
        """Ids of all tensors that can be used."""
        start = 0
        for unit in self._index:
            rows = unit.read()
            for column in id_columns(rows):
                numbered = enumerate(rows[column].to_pylist(), start)
                yield from (id_ for number, id_ in numbered if id_ and number not in self.damaged)
            start += rows.num_rows
        for unit in self._work:
            with contextlib.suppress(DatasetError):  # published meanwhile, where this is only looking
                rows = unit.read()
                for column in id_columns(rows):
                    yield from filter(None, rows[column].to_pylist())

    def add_to(self, found: Archive) -> None:
        """Makes the tensors findable that may be used."""
        for unit in self._sources:
            found.add(unit.info, unit.read(), self._shard(unit.info), self._distrusted)

    def report(self, message: str) -> None:
        """Says what is damaged."""
        self._journal.say(f"damaged: {message}")
        self._journal.event("damaged", message=message)

    def _shard(self, info: UnitInfo) -> Path:
        return self._output / info.file if info.file else self._output / WORK / (info.uid + SHARD_SUFFIX)


def _complete(shard: Path, info: UnitInfo) -> bool:
    """Whether a shard is there in its full length; its content is the business of `verify`."""
    try:
        return not info.records or shard.stat().st_size == info.bytes
    except OSError:
        return False
