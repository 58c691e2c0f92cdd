"""Sets of few small pictures, for measures with a known value, and a `Draw` that answers with chosen pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fluxdit_jax.dataset.fields import BF16
from fluxdit_jax.dataset.grid import Place
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.sampler import Request

PATCH = 2
VIEWS = ("original", "mirrored", "from above")


def plain(level: int | tuple[int, int, int], height: int = 8, width: int = 8) -> np.ndarray:
    """A picture of one colour."""
    return np.broadcast_to(np.uint8(level), (height, width, 3)).copy()


def set_of(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str] = (),
    places: Sequence[Place | None] = (),
    seed: int = 0,
) -> EvalSet:
    """The pictures as the truths of records with a caption, a text and a vector of their own each."""
    records = []
    for number, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        vision = np.zeros(max(2, len(pictures)), np.float32)
        vision[number] = 1
        records.append(
            Record(
                key=f"picture {number}.png",
                caption=captions[number] if captions else f"caption {number}",
                latent=np.zeros((1, height // 4, width // 4), BF16),
                conditions={"text": np.full((1, 2), number, BF16), "vision": vision},
                original_size=(height, width),
                encoded_size=(height, width),
                content_hash=hashlib.sha256(picture.tobytes()).hexdigest(),
            )
        )
    grid = {record.key: place for record, place in zip(records, places) if place is not None}
    return EvalSet(tuple(records), tuple(pictures), PATCH, grid, seed)


def full_grid(photographs: int, views: int = 2, lights: int = 5, seed: int = 0, size: tuple[int, int] = (8, 8)):
    """An `EvalSet` of random pictures in every place of a grid; captions "picture of p0, v1"."""
    places = [
        Place(f"p{p}", VIEWS[v], f"l{light}")
        for p in range(photographs)
        for v in range(views)
        for light in range(lights)
    ]
    rng = np.random.default_rng([seed, len(places)])
    pictures = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for _ in places]
    return set_of(pictures, [f"picture of {place.photograph}, {place.view}" for place in places], places, seed)


class Gallery:
    """A `Draw` that gives the picture that was put behind a `Request`."""

    def __init__(self) -> None:
        self.pictures: list[np.ndarray] = []

    def of(self, pictures: Sequence[np.ndarray]) -> list[Request]:
        """What to ask for to get these pictures."""
        first = len(self.pictures)
        self.pictures += pictures
        nothing = {"text": np.zeros((0, 2), BF16), "vision": np.zeros(2, np.float32)}
        return [Request("", nothing, (1, 1), seed) for seed in range(first, len(self.pictures))]

    def __call__(self, requests: Sequence[Request]) -> list[np.ndarray]:
        return [self.pictures[one.seed] for one in requests]
