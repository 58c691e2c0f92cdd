"""Tensors that were encoded before, to be taken over instead of being made again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.fields import CAPTION, LATENT, Layout, field_named
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.dataset.records import Record
from preprocess.build.rows import UnitInfo, id_columns
from preprocess.build.units import read_rows
from preprocess.database import Database

Place = tuple[Path, int, Layout]  # shard, row, layout of its records


def tensor_of(record: Record, name: str) -> Any:
    """A field of a record; what is made from captions as a tuple, of all of them."""
    if name == LATENT.name:
        return record.latent
    return record.of_all_captions(name) if field_named(name).made_from == CAPTION else record.conditions[name]


class Archive:
    """Where tensors are that were encoded before, by their ids.

    Args:
      damaged: called with a message when a record turns out to be unreadable.
    """

    def __init__(self, damaged: Callable[[str], None]) -> None:
        self._damaged = damaged
        self._rows = Database("CREATE TABLE tensors (number INTEGER PRIMARY KEY, id TEXT, shard INTEGER, row INTEGER)")
        self._shards: list[tuple[Path, Layout]] = []
        self._numbers: dict[Path, int] = {}

    def add(
        self, info: UnitInfo, rows: pa.Table, shard: Path, distrusted: frozenset[tuple[str, int]] = frozenset()
    ) -> None:
        """Makes the records of a finished unit findable.

        Args:
          shard: where they are.
          distrusted: (file, row) of records that must not be used.
        """
        for column in id_columns(rows):
            places = ((id_, row) for row, id_ in enumerate(rows[column].to_pylist()) if id_)
            self._add(shard, info.layout, (each for each in places if (shard.name, each[1]) not in distrusted))

    def places(self, ids: Iterable[str]) -> dict[str, Place]:
        """Of those of these tensors that are known."""
        self._rows.run("CREATE INDEX IF NOT EXISTS of_id ON tensors (id)")  # of many at once: sorted, not one by one
        found, first = {}, "SELECT shard, row FROM tensors WHERE id = ? ORDER BY number LIMIT 1"
        for id_ in ids:
            if at := self._rows.one(first, id_):
                path, layout = self._shards[at[0]]
                found[id_] = path, at[1], layout
        return found

    def learn(self, places: dict[str, Place]) -> None:
        """Makes findable what `places` gave in another process, as far as it is not known."""
        for id_, (path, row, layout) in places.items():
            self._add(path, layout, [(id_, row)])

    def _add(self, path: Path, layout: Layout, rows: Iterable[tuple[str, int]]) -> None:
        shard = self._numbers.setdefault(path, len(self._shards))
        if shard == len(self._shards):
            self._shards.append((path, layout))
        values = ((id_, shard, row) for id_, row in rows)
        self._rows.run_many("INSERT INTO tensors (id, shard, row) VALUES (?, ?, ?)", values)

    def fetch(self, ids: list[dict[str, str]], field_of: Callable[[str], str] = str) -> list[dict[str, Any]]:
        """For the ids of each item its tensors, by the names of the ids; what is not known is missing.

        Args:
          field_of: the field of a name.

        Returns:
          What is made from captions is a tuple, of all of them.
        """
        found: list[dict[str, Any]] = [{} for _ in ids]
        places = self.places(id_ for of_item in ids for id_ in of_item.values())
        wanted: dict[Path, tuple[Layout, dict[int, list[tuple[int, str]]]]] = {}
        for index, of_item in enumerate(ids):
            for name, id_ in of_item.items():
                if id_ in places:
                    path, row, layout = places[id_]
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
