"""What a model draws for an exam, as vision vectors and thumbnails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fluxdit_jax.dataset.fields import TEXT
from fluxdit_jax.loader.reader import spread
from fluxdit_jax.quality.exam import Exam, thumbnail
from fluxdit_jax.quality.eye import Eye
from fluxdit_jax.sampling.pipeline import Generator, besides_captions, conditions
from fluxdit_jax.sampling.solvers import Guidance
from fluxdit_jax.vae.decoder import Decoder, decode_all


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How much is drawn.

    Attributes:
      with_vector: questions that are drawn with all of their conditions, too.
      captions, drawings: captions that are drawn several times, and how many times.
    """

    with_vector: int = 256
    captions: int = 16
    drawings: int = 4

    def pictures(self, questions: int) -> int:
        """In all, for so many questions."""
        return questions + min(self.with_vector, questions) + min(self.captions, questions) * self.drawings


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """The vectors of what a model drew of the questions of an exam.

    Attributes:
      drawn: f32 [n, V], for each question from its caption alone.
      pictures: the same as thumbnails.
      rows: int [k], of questions spread over all. with_vector: f32 [k, V], for these from all of their conditions.
      several: f32 [G, S, V], S drawings of each of G captions spread over all, from other noise.
    """

    drawn: np.ndarray
    pictures: tuple[np.ndarray, ...]
    rows: np.ndarray
    with_vector: np.ndarray
    several: np.ndarray


class Pupil:
    """A model that is examined: draws by its EMA weights. The noise depends on question and drawing alone."""

    def __init__(self, generator: Generator, ema: Any, decoder: Decoder, eye: Eye, text_limit: int | None, text: float):
        """
        Args:
          text_limit: tokens that longer captions are cut to, as in training.
          text: guidance scale of what is made from the caption.
        """
        self._generator, self._params, self._decoder, self._eye = generator, generator.cast(ema), decoder, eye
        self._text_limit, self._text = text_limit, text

    def answer(self, exam: Exam, patch: int, amounts: Amounts, progress: Callable[[int], Any]) -> Answers:
        """Draws everything; `progress` is called with the number of pictures done."""
        count = len(exam.questions)
        drawn, pictures = self._draw(exam, patch, range(count), False, 0, progress)
        rows = spread(count, amounts.with_vector) if amounts.with_vector else []
        vector, _ = self._draw(exam, patch, rows, True, 0, progress)
        captions = spread(count, amounts.captions) if amounts.captions else []
        several = [self._draw(exam, patch, captions, False, 1 + k, progress)[0] for k in range(amounts.drawings)]
        nothing = np.empty((0, 0, exam.true.shape[1]), np.float32)
        stacked = np.stack(several, axis=1) if several else nothing
        return Answers(drawn, tuple(pictures), np.array(rows, int), vector, stacked)

    def _draw(
        self, exam: Exam, patch: int, rows: Sequence[int], vector: bool, drawing: int, progress: Callable[[int], Any]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        vectors = [np.empty((0, exam.true.shape[1]), np.float32)]
        pictures: list[np.ndarray] = []
        kinds = self._generator.conditions
        others = besides_captions(kinds)  # they would tell what the true picture is
        guidance = Guidance({kind.name: self._text for kind in kinds if kind.name not in others})
        for start in range(0, len(rows), self._generator.batch_size):
            part = rows[start : start + self._generator.batch_size]
            questions = [exam.questions[row] for row in part]
            absent = {} if vector else dict.fromkeys(others)
            wanted: list[Mapping[str, np.ndarray | None]] = [
                {**one.conditions, TEXT.name: one.conditions[TEXT.name][: self._text_limit], **absent}
                for one in questions
            ]
            latents = self._generator.latents(
                self._params,
                conditions(kinds, wanted, [one.grid(patch) for one in questions]),
                self._generator.noise([drawing * 1_000_003 + row for row in part]),
                guidance=guidance,
            )
            images = decode_all(self._decoder, latents)
            vectors.append(self._eye.vectors(images))
            pictures += map(thumbnail, images)
            progress(len(part))
        return np.concatenate(vectors), pictures
