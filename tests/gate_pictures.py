"""Albums of few small pictures, for measures with a known value, and a `Draw` that answers with chosen pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fluxdit_jax.dataset.fields import BF16
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.gate.album import Album
from fluxdit_jax.gate.painter import Wanted

PATCH = 2


def plain(level: int | tuple[int, int, int], height: int = 8, width: int = 8) -> np.ndarray:
    """A picture of one colour: it has tone and no structure."""
    return np.broadcast_to(np.uint8(level), (height, width, 3)).copy()


def album_of(
    pictures: Sequence[np.ndarray], captions: Sequence[str] = (), keys: Sequence[str] = (), seed: int = 0
) -> Album:
    """The pictures as the truths of records with a caption, a text and a vector of their own each."""
    records = []
    for number, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        vision = np.zeros(max(2, len(pictures)), np.float32)
        vision[number] = 1
        records.append(
            Record(
                key=keys[number] if keys else f"picture {number}.png",
                caption=captions[number] if captions else f"caption {number}",
                latent=np.zeros((1, height // 4, width // 4), BF16),
                conditions={"text": np.full((1, 2), number, BF16), "vision": vision},
                original_size=(height, width),
                encoded_size=(height, width),
                content_hash=hashlib.sha256(picture.tobytes()).hexdigest(),
            )
        )
    return Album(tuple(records), tuple(pictures), PATCH, seed)


class Gallery:
    """A `Draw` that gives the picture that was put behind a `Wanted`."""

    def __init__(self) -> None:
        self.pictures: list[np.ndarray] = []

    def of(self, pictures: Sequence[np.ndarray]) -> list[Wanted]:
        """What to ask for to get these pictures."""
        first = len(self.pictures)
        self.pictures += pictures
        nothing = {"text": np.zeros((0, 2), BF16), "vision": np.zeros(2, np.float32)}
        return [Wanted("", nothing, (1, 1), seed) for seed in range(first, len(self.pictures))]

    def __call__(self, wanted: Sequence[Wanted]) -> list[np.ndarray]:
        return [self.pictures[one.seed] for one in wanted]
