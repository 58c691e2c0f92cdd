"""Small scenes with a known answer to every question of the gate, and models that answer right or wrong.

A scene is a subject before a backdrop, the subject standing left or right, under one of five lights: a full grid, as
the demonstration set is, but drawn in milliseconds. An `Oracle` stands for a perfect model: it reads the caption's
words and knows the light of a vector. What a broken model would do is a function from what is wanted to a picture.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter, shift

from fluxdit_jax.dataset.records import Record
from fluxdit_jax.gate.album import Album
from fluxdit_jax.gate.painter import Wanted
from fluxdit_jax.sampling import image_grid
from preprocess.encoders.builtin import DctVae, HashText, ToneVision

SUBJECTS = ("fox", "teapot", "lighthouse", "cactus")
SIDES = ("left", "right")
# Colour of the light, and how it falls off to the right and downwards.
LIGHTS = (
    ((1.00, 1.00, 1.00), (0.0, 0.0)),
    ((1.00, 0.62, 0.35), (-0.4, 0.0)),
    ((0.28, 0.40, 0.80), (0.4, 0.0)),
    ((0.85, 0.30, 0.55), (0.0, -0.4)),
    ((0.25, 0.70, 0.40), (0.0, 0.4)),
)
SIDE = 64  # pixels
STEP = 8  # pixels that the subject stands left or right of the middle


def _texture(name: str, grain: float) -> np.ndarray:
    """Smooth noise, float64 [SIDE, 2 * SIDE, 3], 0.15 to 0.85, the same for the same name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(SIDE, 2 * SIDE, 3)), (grain, grain, 0))
    grey = noise.mean(-1, keepdims=True)
    noise = grey + 0.4 * (noise - grey)
    return 0.5 + 0.35 * np.clip(noise / (2 * noise.std()), -1, 1)


def scene(subject: str, side: str, light: int, step: int = STEP) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]."""
    paint = _texture(f"behind {subject}", 3.0)[:, :SIDE]
    offset = -step if side == "left" else step
    y, x = np.mgrid[:SIDE, :SIDE]
    mask = (((x - SIDE / 2 - offset) / 13) ** 2 + ((y - 36) / 24) ** 2 < 1).astype(float)
    mask = gaussian_filter(mask, 0.7)[..., None]
    cloth = shift(_texture(subject, 2.0), (0, offset - SIDE / 2, 0), order=1, mode="wrap")[:, :SIDE]
    paint = paint * (1 - mask) + (cloth * 0.8) * mask
    colour, (right, down) = LIGHTS[light]
    fall = 1 + right * np.linspace(-1, 1, SIDE)[None, :, None] + down * np.linspace(-1, 1, SIDE)[:, None, None]
    return np.rint(255 * np.clip(paint * fall * colour, 0, 1) ** (1 / 1.6)).astype(np.uint8)


def caption(subject: str, side: str) -> str:
    return f"portrait of a {subject}, looking {side}"


def album(subjects: Sequence[str] = SUBJECTS, lights: int = len(LIGHTS)) -> Album:
    """All subjects, both sides, all lights; keys such as c03_l2.png. The truths are what the DCT codec keeps."""
    vae, text, vision = DctVae(), HashText(), ToneVision()
    records = []
    for number, (subject, side) in enumerate((s, p) for s in subjects for p in SIDES):
        for light in range(lights):
            image = scene(subject, side, light)
            records.append(
                Record(
                    key=f"c{number:02d}_l{light}.png",
                    caption=caption(subject, side),
                    latent=vae.encode(image[None])[0],
                    conditions={
                        "text": text.encode([caption(subject, side)])[0],
                        "vision": vision.encode(image[None])[0],
                    },
                    original_size=image.shape[:2],
                    encoded_size=image.shape[:2],
                    content_hash=hashlib.sha256(image.tobytes()).hexdigest(),
                )
            )
    truths = image_grid.decode_all(vae, [record.latent for record in records])
    return Album(tuple(records), tuple(truths), patch=2)


class Oracle:
    """A perfect model of an album: the caption's subject and side, the vector's light. The noise plays no part.

    A vector that belongs to no record gives the first light. Subclasses break it by overriding `see`.
    """

    def __init__(self, album: Album):
        self.album = album
        self._vectors = np.stack([record.vision for record in album.records])
        self._index = {(r.caption, p[1]): i for i, (r, p) in enumerate(zip(album.records, album.places))}

    def __call__(self, wanted: Sequence[Wanted]) -> list[np.ndarray]:
        return [self.see(one) for one in wanted]

    def see(self, one: Wanted) -> np.ndarray:
        return self.picture(*self.words(one.caption), self.light(one))

    def words(self, text: str) -> tuple[str, str]:
        """(subject, side) that a caption names."""
        found = re.fullmatch(r".*\ba (\w+), looking (left|right)", text)
        return found[1], found[2]

    def shown(self, one: Wanted) -> tuple[str, str]:
        """(subject, side) of the record that the vector was taken from."""
        return self.words(self.album.caption(self._record(one) or 0))

    def light(self, one: Wanted) -> int:
        record = self._record(one)
        return 0 if record is None else int(self.album.places[record][1][1:])

    def picture(self, subject: str, side: str, light: int) -> np.ndarray:
        return self.album.truths[self._index[caption(subject, side), f"l{light}"]]

    def _record(self, one: Wanted) -> int | None:
        likeness = self._vectors @ one.conditions["vision"]
        return int(likeness.argmax()) if likeness.max() > 0.999 else None


def encode_words(captions: list[str]) -> list[dict[str, np.ndarray]]:
    """What the built-in encoder makes of captions, as `encode_prompts` returns it."""
    return [{"text": tokens} for tokens in HashText().encode(captions)]
