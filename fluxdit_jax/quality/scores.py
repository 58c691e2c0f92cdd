"""All measures of a model's answers, with their titles and which direction is better."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from fluxdit_jax.quality import measured, measures
from fluxdit_jax.quality.answers import Answers
from fluxdit_jax.quality.exam import Exam
from fluxdit_jax.quality.measured import Measured
from fluxdit_jax.quality.measures import Copies, Mode
from fluxdit_jax.run.summary_writer import SummaryWriter

HOLDOUT, AGAIN = "holdout pictures", "holdout pictures through the VAE"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a measure is called. `share`: written in per cent. `better`: "low", "high" or "" (neither is)."""

    title: str
    question: str
    better: str
    share: bool = False


KINDS = {
    "held-out loss": Kind(
        "Held-out loss",
        "The loss of holdout pictures from caption and vector, over a uniform grid of times. Its best is not known; it "
        "compares runs on one dataset.",
        "low",
    ),
    "likeness": Kind(
        "Likeness of all pictures",
        "Are the drawn pictures, all together, like those of the dataset? 1,000 times the squared MMD of their vision "
        "vectors: 0 for pictures of the dataset, on average.",
        "low",
    ),
    "recall@1": Kind(
        "Caption followed, recall@1",
        "Of all true pictures, is that of the caption the nearest to the drawn one?",
        "high",
        share=True,
    ),
    "recall@10": Kind(
        "Caption followed, recall@10",
        "Is the true picture of the caption among the ten that are nearest to the drawn one?",
        "high",
        share=True,
    ),
    "median rank": Kind("Caption followed, median rank", "The rank of the true picture of the caption.", "low"),
    "vector": Kind(
        "Vector followed", "Drawn with the vision vector of a picture: the cosine of what came to that vector.", "high"
    ),
    "copies": Kind(
        "Copies of training pictures",
        "Drawn pictures that are as near to one of the training pictures compared with as only 1 % of the holdout "
        "pictures are.",
        "low",
        share=True,
    ),
    "diversity": Kind(
        "Diversity",
        "How different drawings of one caption are, as a share of how different two pictures of the dataset are.",
        "",
        share=True,
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What was measured of a model.

    Attributes:
      numbers: by the names of `KINDS`; those that could not be measured are missing.
      copies: of training pictures, drawing by drawing.
      modes: drawings of different captions that are one picture.
      ranks: int [n], of the true picture of each caption.
    """

    numbers: dict[str, Measured]
    copies: Copies
    modes: list[Mode]
    ranks: np.ndarray

    def to_json(self) -> dict[str, Any]:
        return {
            "numbers": {name: one.to_json() for name, one in self.numbers.items()},
            "collapsed_modes": [list(mode.rows) for mode in self.modes],
        }


def judge(exam: Exam, answers: Answers, losses: np.ndarray | None = None) -> Scores:
    """Measures everything; `losses` are of the holdout pictures."""
    holdout = {HOLDOUT: exam.true, AGAIN: exam.again}
    useless = {"blurred": exam.blurred, "noise": exam.noise}
    copied = measures.copies(answers.drawn, exam.reference.vectors, exam.again, exam.train_again)
    numbers = {} if losses is None else {"held-out loss": measured.mean(losses)}
    numbers["likeness"] = measures.likeness(answers.drawn, exam.reference, holdout, useless)
    numbers |= measures.captions(answers.drawn, exam.true, exam.again)
    if len(answers.rows) > 1:
        numbers["vector"] = measures.vector(answers.with_vector, exam.true[answers.rows], exam.again[answers.rows])
    numbers["copies"] = copied.share
    if len(answers.several) and answers.several.shape[1] > 1:
        numbers["diversity"] = measures.diversity(answers.several, exam.true)
    return Scores(
        numbers=numbers,
        copies=copied,
        modes=measures.collapsed_modes(
            answers.drawn, exam.true, exam.again, [question.caption for question in exam.questions]
        ),
        ranks=measures.ranks(answers.drawn, exam.true),
    )


def written(value: float, kind: Kind) -> str:
    """A number as text, with the precision of its kind."""
    if not np.isfinite(value):
        return "-"
    return f"{value:.1%}" if kind.share else f"{value:.3g}"


def told(scores: Scores) -> list[str]:
    """A line for each number: its value, interval, and what true and useless pictures have."""
    lines = []
    for name, one in scores.numbers.items():
        kind = KINDS[name]
        sides = [f"{word}: {written(value, kind)}" for side in (one.best, one.worst) for word, value in side.items()]
        interval = f"{written(one.low, kind)} to {written(one.high, kind)}"
        lines.append(f"{kind.title:<32} {written(one.value, kind):>8}  ({interval})   {', '.join(sides)}")
    return lines


def scalars(scores: Scores) -> dict[str, float]:
    """Numbers under `score/`, with what true and useless pictures have as lines beside them; finite ones."""
    values = {"score/collapsed modes": float(len(scores.modes))}
    for name, one in scores.numbers.items():
        values[f"score/{name}"] = one.value
        for side, word in ((one.best, "true"), (one.worst, "useless")):
            values |= {f"score/{name}/{word}: {what}": value for what, value in side.items()}
    return {name: value for name, value in values.items() if np.isfinite(value)}


def write_tensorboard(scores: Scores, step: int, folder: Path) -> None:
    """`scalars` at the step of the weights, beside what a run has written."""
    about = "Of `fluxdit_jax.score` at the step of its weights; `score/report.html` explains it."
    with SummaryWriter(folder, suffix=".score") as board:
        board.scalars(step, {(name, about): value for name, value in scalars(scores).items()})
