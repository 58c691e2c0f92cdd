"""The whole gate set as one picture: photographs as rows, lights as columns, drawn beside true."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.verdict import Case, Verdict
from fluxdit_jax.shared import labels

ROWS = 40  # at most
LEGEND = (
    "In each cell: the true picture, then what was drawn from its own caption and vector (memorisation); below, what a "
    "vision swap and a text edit drew that should be it, where they were asked. Framed green where it is nearest to "
    "the true picture among all, red where it is not."
)
_SIDE, _FRAME, _GAP, _HEAD, _WORDS, _TEXT = 84, 3, 12, 24, 190, 12
_GOOD, _BAD, _SOFT = "#1d7f4e", "#c0392b", "#6a707a"


def draw_sheet(eval_set: EvalSet, verdicts: Sequence[Verdict]) -> np.ndarray | None:
    """uint8 [H, W, 3]; None for a set that is no grid."""
    rows, lights = eval_set.rows[:ROWS], eval_set.lights
    if not rows:
        return None
    font = labels.Face().font(_TEXT)
    cell = 2 * _SIDE + _GAP
    sheet = Image.new("RGB", (_WORDS + len(lights) * cell, _HEAD + len(rows) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for column, light in enumerate(lights):
        pen.text((_WORDS + column * cell, 5), light, "black", font)
    cases = [{case.answer: case for case in reversed(verdict.cases)} for verdict in verdicts]
    for number, row in enumerate(rows):
        top = _HEAD + number * cell
        _label(pen, row, eval_set, top)
        for column, light in enumerate(lights):
            index = eval_set.at(row, light)
            if index is None:
                continue
            left = _WORDS + column * cell
            _paste(sheet, pen, eval_set.truths[index], left, top, "white")
            for found, (x, y) in zip(cases, ((1, 0), (0, 1), (1, 1))):
                if (case := found.get(index)) is not None:
                    _paste(sheet, pen, case.drawn, left + x * _SIDE, top + y * _SIDE, _colour(case))
    return np.asarray(sheet)


def _colour(case: Case) -> str:
    return _GOOD if case.passed else _BAD


def _label(pen: ImageDraw.ImageDraw, row: tuple[str, str], eval_set: EvalSet, top: int) -> None:
    index = next(i for i in (eval_set.at(row, light) for light in eval_set.lights) if i is not None)
    for text, colour, lines in ((" ".join(row), _SOFT, 2), (eval_set.caption(index), "black", 7)):
        text, face = labels.drawable(text)
        font = face.font(_TEXT)
        words = labels.wrapped(text, font, _WORDS - _GAP, lines)
        pen.multiline_text((4, top), words, colour, font)
        top += (_TEXT + 3) * (words.count("\n") + 1)


def _paste(sheet: Image.Image, pen: ImageDraw.ImageDraw, image: np.ndarray, left: int, top: int, frame: str) -> None:
    inside = _SIDE - 2 * _FRAME
    picture = Image.fromarray(image)
    scale = inside / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    x, y = left + (_SIDE - size[0]) // 2, top + (_SIDE - size[1]) // 2
    pen.rectangle((x - _FRAME, y - _FRAME, x + size[0] + _FRAME - 1, y + size[1] + _FRAME - 1), fill=frame)
    sheet.paste(picture, (x, y))
