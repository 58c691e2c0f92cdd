"""What a model is asked, and what true and useless pictures would answer: of one dataset, for all models of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageFilter

from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.loader.reader import RecordSource, spread
from fluxdit_jax.quality.eye import Eye
from fluxdit_jax.quality.measures import Reference
from fluxdit_jax.shared.sanitize import shown
from fluxdit_jax.vae.decoder import Decoder, decode_all

_Item = TypeVar("_Item")
THUMBNAIL = 160  # longer side, pixels
COPIED = 64  # training pictures that are looked at through the VAE
CHUNK = 32  # pictures decoded at a time
# Without the dataset's own encoder every training picture must be decoded and looked at.
DECODED = 1000


def thumbnail(image: np.ndarray) -> np.ndarray:
    """The picture, uint8 [H, W, 3], at `THUMBNAIL` at most."""
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return np.asarray(small)


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """What of a holdout record is asked: its first caption, its conditions, and the size of its latent."""

    caption: str
    conditions: Mapping[str, np.ndarray]
    size: tuple[int, int]

    @classmethod
    def of(cls, record: Record) -> Question:
        _, height, width = record.latent.shape
        return cls(record.caption, record.conditions, (height, width))

    def grid(self, patch: int) -> tuple[int, int]:
        """(rows, columns) of its tokens."""
        return self.size[0] // patch, self.size[1] // patch


@dataclasses.dataclass(frozen=True, eq=False)
class Exam:
    """n holdout pictures and m training pictures, seen by one eye.

    Attributes:
      questions: of the holdout records; rows: of the split.
      true: f32 [n, V], vectors of their pictures: stored ones, if the eye is the dataset's own.
      again: f32 [n, V], of the pictures as the VAE keeps them: the most that a model can draw.
      reference: of the training pictures.
      blurred, noise: f32 [n, V], of useless pictures: the true ones blurred, and what drawing starts from.
      pictures: of the questions, as the VAE keeps them; thumbnails.
      train: rows of the training split that the reference is of.
      train_again: of some of them through the VAE: what copies of training pictures look like.
    """

    questions: tuple[Question, ...]
    rows: tuple[int, ...]
    true: np.ndarray
    again: np.ndarray
    reference: Reference
    blurred: np.ndarray
    noise: np.ndarray
    pictures: tuple[np.ndarray, ...]
    train: tuple[int, ...]
    train_again: np.ndarray

    @classmethod
    def of(
        cls,
        holdout: RecordSource,
        train: RecordSource,
        eye: Eye,
        decoder: Decoder,
        *,
        count: int,
        references: int,
        progress: Callable[[int], Any] = lambda n: None,
    ) -> Exam:
        """
        Args:
          count, references: holdout and training pictures at most, spread evenly over their splits.
          progress: called with the number of pictures done, `work` in all.
        """
        again, blurred, noise, true = [], [], [], []
        questions: dict[int, Question] = {}
        pictures: list[np.ndarray] = []
        for numbered in _chunks(holdout.iter_valid(spread(len(holdout), count))):
            part = [record for _, record in numbered]
            questions |= {row: Question.of(record) for row, record in numbered}
            true.append(np.stack([record.vision for record in part]))
            images = decode_all(decoder, [record.latent for record in part])
            again.append(eye.vectors(images))
            blurred.append(eye.vectors([_blurred(image) for image in images]))
            noise.append(eye.vectors(decode_all(decoder, _noise(part, holdout.manifest, len(questions)))))
            pictures += map(thumbnail, images)
            progress(len(part))
        rows: list[int] = []
        copied: list[np.ndarray] = []
        vectors = []
        order = spread(len(train), references if eye.own else min(references, DECODED))
        for numbered in _chunks(train.iter_valid(order)):
            rows += [row for row, _ in numbered]
            vectors.append(_stored([record for _, record in numbered], eye, decoder))
            if len(copied) < COPIED:  # the first ones: any will do
                copied += [record.latent for _, record in numbered][: COPIED - len(copied)]
            progress(len(numbered))
        return cls(
            questions=tuple(questions.values()),
            rows=tuple(questions),
            true=np.concatenate(true if eye.own else again),
            again=np.concatenate(again),
            reference=Reference.of(np.concatenate(vectors)),
            blurred=np.concatenate(blurred),
            noise=np.concatenate(noise),
            pictures=tuple(pictures),
            train=tuple(rows),
            train_again=eye.vectors(decode_all(decoder, copied)),
        )

    def caption(self, row: int) -> str:
        return shown(self.questions[row].caption)


def _stored(records: Sequence[Record], eye: Eye, decoder: Decoder) -> np.ndarray:
    if eye.own:
        return np.stack([record.vision for record in records])
    return eye.vectors(decode_all(decoder, [record.latent for record in records]))


def _chunks(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """`CHUNK` at a time, read as they are asked for."""
    rest = iter(items)
    while part := list(itertools.islice(rest, CHUNK)):
        yield part


def _blurred(image: np.ndarray) -> np.ndarray:
    """So far that what is in the picture is gone and its colours stay."""
    radius = max(image.shape[:2]) / 16
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def _noise(records: Sequence[Record], manifest: Manifest, seed: int) -> list[np.ndarray]:
    """Normal latents with the dataset's statistics, of the records' sizes."""
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (manifest.latent_mean, manifest.latent_std))
    rng = np.random.default_rng(seed)
    return [mean + std * rng.standard_normal(record.latent.shape, np.float32) for record in records]
