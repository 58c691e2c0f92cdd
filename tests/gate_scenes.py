"""Two gate sets with a known answer to every question, and an `Oracle` that answers all of them right.

Scenes are drawn in milliseconds: a subject before a backdrop, standing left or right, under one of five lights.
Photographs are those that come with scikit-image, in two sizes, mirrored, under the lights of `preprocess subset`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence

import numpy as np
import skimage.data
from PIL import Image
from scipy.ndimage import gaussian_filter, shift

from fluxdit_jax.dataset.grid import Place
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.gate.edit import TextEdit
from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.memorisation import Memorisation
from fluxdit_jax.gate.retrieval import Library
from fluxdit_jax.gate.sampler import Draw, Request
from fluxdit_jax.gate.swap import Swap
from fluxdit_jax.gate.verdict import Verdict
from fluxdit_jax.vae.decoder import decode_all
from preprocess.encoders.builtin import DctVae, HashText, ToneVision
from preprocess.subset.candidates import variant
from preprocess.subset.lights import LIGHTS as SUBSET_LIGHTS
from preprocess.subset.views import MIRRORED, ORIGINAL

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
# (height, width) of scikit-image's photographs, all of which come with its wheel.
PHOTOGRAPHS = {"astronaut": (64, 64), "coffee": (64, 96), "chelsea": (64, 96), "rocket": (64, 96)}


def _texture(name: str, grain: float) -> np.ndarray:
    """Smooth noise, float64 [SIDE, 2 * SIDE, 3], 0.15 to 0.85, the same for the same name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(SIDE, 2 * SIDE, 3)), (grain, grain, 0))
    grey = noise.mean(-1, keepdims=True)
    noise = grey + 0.4 * (noise - grey)
    return 0.5 + 0.35 * np.clip(noise / (2 * noise.std()), -1, 1)


def scene(subject: str, side: str, light: int) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]."""
    paint = _texture(f"behind {subject}", 3.0)[:, :SIDE]
    offset = -STEP if side == "left" else STEP
    y, x = np.mgrid[:SIDE, :SIDE]
    mask = (((x - SIDE / 2 - offset) / 13) ** 2 + ((y - 36) / 24) ** 2 < 1).astype(float)
    mask = gaussian_filter(mask, 0.7)[..., None]
    cloth = shift(_texture(subject, 2.0), (0, offset - SIDE / 2, 0), order=1, mode="wrap")[:, :SIDE]
    paint = paint * (1 - mask) + (cloth * 0.8) * mask
    colour, (right, down) = LIGHTS[light]
    fall = 1 + right * np.linspace(-1, 1, SIDE)[None, :, None] + down * np.linspace(-1, 1, SIDE)[:, None, None]
    return np.rint(255 * np.clip(paint * fall * colour, 0, 1) ** (1 / 1.6)).astype(np.uint8)


def _encoded(pictures: Sequence[tuple[str, str, Place, np.ndarray]]) -> EvalSet:
    """(key, caption, place, pixels) as the built-in encoders keep them."""
    vae, text, vision = DctVae(), HashText(), ToneVision()
    records = [
        Record(
            key=key,
            caption=caption,
            latent=vae.encode(image[None])[0],
            conditions={"text": text.encode([caption])[0], "vision": vision.encode(image[None])[0]},
            original_size=image.shape[:2],
            encoded_size=image.shape[:2],
            content_hash=hashlib.sha256(image.tobytes()).hexdigest(),
        )
        for key, caption, _, image in pictures
    ]
    truths = decode_all(vae, [record.latent for record in records])
    return EvalSet(tuple(records), tuple(truths), 2, {key: place for key, _, place, _ in pictures})


@functools.cache
def eval_set(subjects: tuple[str, ...] = SUBJECTS, lights: int = len(LIGHTS)) -> EvalSet:
    """Scenes of all subjects, both sides, all lights, at Place(subject, side, "l3"); keys such as c03_l2.png."""
    rows = [(subject, side) for subject in subjects for side in SIDES]
    return _encoded([
        (
            f"c{number:02d}_l{light}.png",
            f"portrait of a {subject}, looking {side}",
            Place(subject, side, f"l{light}"),
            scene(subject, side, light),
        )
        for number, (subject, side) in enumerate(rows)
        for light in range(lights)
    ])  # fmt: skip


@functools.cache
def photographs(lights: int = 5) -> EvalSet:
    """Photographs, as they are and mirrored, under the first lights of `preprocess subset`."""
    pictures = []
    for name, (height, width) in PHOTOGRAPHS.items():
        whole = Image.fromarray(getattr(skimage.data, name)())
        pixels = np.asarray(whole.resize((width, height), Image.Resampling.LANCZOS))
        article = "an" if name[0] in "aeiou" else "a"
        for view, side in ((ORIGINAL, "left"), (MIRRORED, "right")):
            caption = f"a photograph of {article} {name}, looking {side}"
            for light in SUBSET_LIGHTS[:lights]:
                place = Place(name, view, light.name)
                pictures.append((f"{name}/{view}-{light.name}.png", caption, place, variant(pixels, view, light)))
    return _encoded(pictures)


def named(caption: str) -> tuple[str, str]:
    """(subject, side) that a caption names."""
    found = re.fullmatch(r".*\ban? (\w+), looking (left|right)", caption)
    assert found, caption
    return found[1], found[2]


class Oracle:
    """A perfect model of a set: the caption's subject and side, the vector's light. The noise plays no part.

    Without a caption it shows the first row, without a vector, or with one that belongs to no record, the first light.
    Subclasses break it by overriding `see`, `words` or `light`.
    """

    def __init__(self, of: EvalSet):
        self.set = of
        self._vectors = np.stack([record.vision for record in of.records])
        self._rows = {named(of.caption(of.by_place[place])): place.row for place in of.by_place}

    def __call__(self, requests: Sequence[Request]) -> list[np.ndarray]:
        return [self.see(one) for one in requests]

    def see(self, one: Request) -> np.ndarray:
        return self.picture(self.words(one), self.light(one))

    def words(self, one: Request) -> tuple[str, str]:
        """(subject, side) that the caption names."""
        return named(one.caption if "text" in one.conditions else self.set.caption(0))

    def light(self, one: Request) -> str:
        record = self.record(one)
        return self.set.lights[0] if record is None else self.set.places[record].light

    def shown(self, one: Request) -> tuple[str, str]:
        """(subject, side) of the record that the vector was taken from; of the first where it is of none."""
        return named(self.set.caption(self.record(one) or 0))

    def record(self, one: Request) -> int | None:
        """That the vector was taken from."""
        if "vision" not in one.conditions:
            return None
        likeness = self._vectors @ one.conditions["vision"]
        return int(likeness.argmax()) if likeness.max() > 0.99999 else None

    def picture(self, words: tuple[str, str], light: str) -> np.ndarray:
        return self.set.truths[self.set.at(self._rows[words], light)]


def encode_words(captions: list[str]) -> list[dict[str, np.ndarray]]:
    """What the built-in encoder makes of captions, as `encode_prompts` returns it."""
    return [{"text": tokens} for tokens in HashText().encode(captions)]


def measured(of: EvalSet, draw: Draw, pairs: int = 60, edits: int = 40) -> list[Verdict]:
    """The verdicts of the three tests on what a model draws."""
    plans = Memorisation.plan(of), Swap.plan(of, pairs), TextEdit.plan(of, edits, None, encode_words)
    library = Library(of)
    return [plan.measure(draw, library) for plan in plans]
