"""The records under test, with the pictures they stand for and what is known of them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping

import numpy as np

from fluxdit_jax.dataset.records import Record
from fluxdit_jax.gate import image_metrics
from fluxdit_jax.gate.painter import Wanted

# The demonstration set's c07_l3.png: composition 7 under light 3.
DEMO_KEYS = r"(?:.*/)?(?P<composition>c\d+)_(?P<lighting>l\d+)\.\w+"


@dataclasses.dataclass(frozen=True, eq=False)
class Album:
    """Attributes:
    records: under test.
    truths: the latent of each, decoded: uint8 [H, W, 3]; the best picture that the VAE lets a model draw.
    patch: side of a token in latent pixels.
    seed: of the first record's noise.
    keys: regular expression with the groups `composition` and `lighting` that a record's key matches as a whole
      if its place in a grid of known truths is known.
    """

    records: tuple[Record, ...]
    truths: tuple[np.ndarray, ...]
    patch: int
    seed: int = 0
    keys: str = DEMO_KEYS

    def __len__(self) -> int:
        return len(self.records)

    def caption(self, index: int) -> str:
        return self.records[index].caption

    def grid(self, index: int) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        _, h, w = self.records[index].latent.shape
        return h // self.patch, w // self.patch

    def seed_of(self, index: int) -> int:
        """Seed of the noise that belongs to a record."""
        return self.seed + index

    def wanted(
        self,
        caption_of: int,
        vision_of: int,
        noise_of: int,
        caption: str | None = None,
        made: Mapping[str, np.ndarray] | None = None,
        vision: np.ndarray | None = None,
        seed: int | None = None,
    ) -> Wanted:
        """The picture with the caption, the vector, and the noise and size of these records.

        Further conditions are those of the first record, with the caption.

        Args:
          caption, made: instead of the first record's, together; `made` is what is made from the caption, by name.
          vision: instead of the second's.
          seed: instead of the third's.
        """
        conditions = self.records[caption_of].conditions | {"vision": self.records[vision_of].vision}
        changed = dict(made or {}) | ({} if vision is None else {"vision": vision})
        return Wanted(
            caption=self.caption(caption_of) if caption is None else caption,
            conditions=conditions | changed,
            grid=self.grid(noise_of),
            seed=self.seed_of(noise_of) if seed is None else seed,
        )

    @functools.cached_property
    def thumbnails(self) -> np.ndarray:
        """Of the truths, see `image_metrics.thumbnails`."""
        return image_metrics.thumbnails(self.truths)

    @functools.cached_property
    def structures(self) -> np.ndarray:
        """Of the truths, see `image_metrics.structures`."""
        return image_metrics.structures(self.truths)

    @functools.cached_property
    def tones(self) -> np.ndarray:
        """Of the truths, see `image_metrics.tones`."""
        return image_metrics.tones(self.truths)

    @functools.cached_property
    def places(self) -> tuple[tuple[str, str] | None, ...]:
        """(composition, lighting) of each record, where its key tells."""
        pattern = re.compile(self.keys)
        matches = [pattern.fullmatch(record.key) for record in self.records]
        return tuple(m and (m["composition"], m["lighting"]) for m in matches)

    @functools.cached_property
    def _by_place(self) -> dict[tuple[str, str], int]:
        return {place: index for index, place in enumerate(self.places) if place is not None}

    @functools.cached_property
    def _compositions(self) -> dict[str, str]:
        return {self.caption(index): place[0] for index, place in enumerate(self.places) if place is not None}

    def true_answer(self, caption: str, lighting_of: int) -> int | None:
        """Index of the record that shows this caption under the lighting of that record; None if not known."""
        composition, place = self._compositions.get(caption), self.places[lighting_of]
        if composition is None or place is None:
            return None
        return self._by_place.get((composition, place[1]))

    def nearest(self, images: list[np.ndarray]) -> np.ndarray:
        """Index of the truth nearest to each picture, by the RMS distance of thumbnails."""
        return image_metrics.distances(image_metrics.thumbnails(images), self.thumbnails).argmin(1)
