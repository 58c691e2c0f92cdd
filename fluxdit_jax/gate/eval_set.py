"""The records under test, with the pictures they stand for and their places in the gate set's grid."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from fluxdit_jax.dataset.fields import conditions, of_captions
from fluxdit_jax.dataset.grid import Grid, Place
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.gate.sampler import Request
from fluxdit_jax.sampling.pipeline import grid_of


@dataclasses.dataclass(frozen=True, eq=False)
class EvalSet:
    """The pictures that the gate tests a model on.

    Attributes:
      records: under test.
      truths: the latent of each, decoded: uint8 [H, W, 3]; the best picture that the VAE lets a model draw.
      patch: side of a token in latent pixels.
      grid: the places of pictures, by record key; empty for a set that is no grid.
      seed: of the first record's noise.
      left_out: records of a grid's set that are not under test.
    """

    records: tuple[Record, ...]
    truths: tuple[np.ndarray, ...]
    patch: int
    grid: Grid = dataclasses.field(default_factory=dict)
    seed: int = 0
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def caption(self, index: int) -> str:
        return self.records[index].caption

    @functools.cached_property
    def of_caption(self) -> list[str]:
        """Names of the conditions that are made from the caption."""
        return [field.name for field in of_captions(self.records[0].layout())]

    def seed_of(self, index: int) -> int:
        """Seed of the noise that belongs to a record."""
        return self.seed + index

    def request(
        self,
        caption_of: int,
        vision_of: int,
        *,
        noise_of: int | None = None,
        caption: str | None = None,
        made: Mapping[str, np.ndarray] | None = None,
        vision: np.ndarray | None = None,
        guidance: float = 1.0,
    ) -> Request:
        """The picture with the caption and size of one record and the vector of another.

        Further conditions are those of the first record, with the caption.

        Args:
          noise_of: the record whose noise it starts from; None: the first.
          caption, made: instead of the first record's, together; `made` is what is made from the caption, by name.
          vision: instead of the second's.
          guidance: scale of all conditions.
        """
        first = self.records[caption_of]
        given = {name: first.conditions[name] for name in conditions(first.layout())}
        given |= {"vision": self.records[vision_of].vision}
        changed = dict(made or {}) | ({} if vision is None else {"vision": vision})
        return Request(
            caption=first.caption if caption is None else caption,
            conditions=given | changed,
            grid=grid_of(first, self.patch),
            seed=self.seed_of(caption_of if noise_of is None else noise_of),
            guidance=guidance,
        )

    def request_alone(self, index: int, names: Sequence[str]) -> Request:
        """The record's picture from these of its conditions, without the others."""
        record = self.records[index]
        chosen = {name: record.conditions[name] for name in names}
        return Request(record.caption, chosen, grid_of(record, self.patch), self.seed_of(index))

    # ------------------------------------------------------------------------------------------------ the grid

    @functools.cached_property
    def places(self) -> tuple[Place | None, ...]:
        """Of each record, None where it has none."""
        return tuple(self.grid.get(record.key) for record in self.records)

    @functools.cached_property
    def by_place(self) -> dict[Place, int]:
        return {place: index for index, place in enumerate(self.places) if place is not None}

    @functools.cached_property
    def _in_order(self) -> list[Place]:
        """Of the records, in the order of the grid."""
        return [place for place in self.grid.values() if place in self.by_place]

    @functools.cached_property
    def rows(self) -> list[tuple[str, str]]:
        """(photograph, view), in the order of the grid."""
        return list(dict.fromkeys(place.row for place in self._in_order))

    @functools.cached_property
    def lights(self) -> list[str]:
        """In the order of the grid."""
        return list(dict.fromkeys(place.light for place in self._in_order))

    def at(self, row: tuple[str, str], light: str) -> int | None:
        """The record at a place; None if there is none."""
        return self.by_place.get(Place(*row, light))
