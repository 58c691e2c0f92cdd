"""What is encoded already: the units of a dataset and those of a build that did not end, and their tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from fluxdit_jax.dataset.manifest import INDEX, DatasetError
from preprocess.build.journal import Journal
from preprocess.build.publish import pending_index
from preprocess.build.units import SHARD_SUFFIX, WORK, Archive, Rows, UnitInfo, load_work


class Existing:
    """Units that exist, in the dataset or in `.build`, and where else tensors can be found.

    Attributes:
      units: the finished units of the plan, by uid.
      index: the rows of the dataset; empty if there is none.
      damaged: rows of `index` whose record cannot be used.
      work: rows of finished units in `.build`.
    """

    def __init__(self, output: Path, distrusted: frozenset[tuple[str, int]], journal: Journal) -> None:
        self._output, self._distrusted, self._journal = output, distrusted, journal
        self.units: dict[str, tuple[UnitInfo, pa.Table]] = {}
        self.index = Rows(pa.table({}), [])
        self.damaged: set[int] = set()
        self.work: list[Rows] = []
        self._sources: list[Rows] = []

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
        for uid, rows in load_work(output / WORK).items():
            existing.work.append(rows)
            # Tensors of a unit of this very plan are not used for its other units: whether it was made before
            # or after a kill must make no difference to them.
            if uid not in uids or not rows.units[0].final:
                existing._sources.append(rows)
            elif uid not in existing.units:
                existing.add(rows)
        return existing

    def _load_index(self, uids: set[str]) -> None:
        pending = pending_index(self._output)  # while its shards are being moved their places say nothing
        path = pending or self._output / INDEX
        if not path.exists():
            return
        try:
            self.index = Rows.load(path)
        except DatasetError as error:
            self._journal.say(f"damaged: {error}; what it described is encoded again")
            return
        if self.index.units:
            self._sources.append(self.index)
        distrusted_files = {file for file, _ in self._distrusted}
        start = 0
        for info in self.index.units:
            table = self.index.table.slice(start, info.records).drop_columns(["split", "shard", "row"])
            rows = range(start, start + info.records)
            start += info.records
            there = bool(pending) or _complete(self._output / info.file, info)
            if not there:
                self.damaged.update(rows)
            if info.file in distrusted_files:
                self.damaged.update(row for row in rows if (info.file, row - rows.start) in self._distrusted)
            if info.uid in uids and info.final and there and info.file not in distrusted_files:
                self.add(Rows(table, [info]))

    def add(self, rows: Rows) -> None:
        """One unit that is finished."""
        self.units[rows.units[0].uid] = (rows.units[0], rows.table)

    def add_to(self, found: Archive) -> None:
        """Makes the tensors findable that may be used."""
        for rows in self._sources:
            found.add(rows, self._shard, self._distrusted)

    @property
    def has_tensors(self) -> bool:
        return bool(self._sources)

    def report(self, message: str) -> None:
        """Says what is damaged."""
        self._journal.say(f"damaged: {message}")
        self._journal.event("damaged", message=message)

    def _shard(self, info: UnitInfo) -> Path:
        return self._output / info.file if info.file else self._output / WORK / (info.uid + SHARD_SUFFIX)


def archive(every: list[Existing], wanted: Callable[[], set[str]]) -> Archive:
    """The tensors of all of these; `wanted` gives the ids worth knowing, and is asked only if there are any."""
    found = Archive(wanted() if any(each.has_tensors for each in every) else set(), every[0].report)
    for each in every:
        each.add_to(found)
    return found


def _complete(shard: Path, info: UnitInfo) -> bool:
    """Whether a shard is there in its full length; its content is the business of `verify`."""
    try:
        return not info.records or shard.stat().st_size == info.bytes
    except OSError:
        return False
