"""The whole gate set as one picture: photographs as rows, lights as columns, drawn beside true."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.verdict import Case, Verdict

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
ROWS = 40  # at most
LEGEND = (
    "In each cell: the true picture, then what was drawn from its own caption and vector (memorisation); below, what a "
    "vision swap and a text edit drew that should be it, where they were asked. Framed green where it is nearest to "
    "the true picture among all, red where it is not."
)
_SIDE, _FRAME, _GAP, _HEAD, _WORDS = 84, 3, 12, 24, 190
_GOOD, _BAD, _SOFT = "#1d7f4e", "#c0392b", "#6a707a"


def draw_sheet(eval_set: EvalSet, verdicts: Sequence[Verdict]) -> np.ndarray | None:
    """uint8 [H, W, 3]; None for a set that is no grid."""
    rows, lights = eval_set.rows[:ROWS], eval_set.lights
    if not rows:
        return None
    font = ImageFont.load_default(12)
    cell = 2 * _SIDE + _GAP
    sheet = Image.new("RGB", (_WORDS + len(lights) * cell, _HEAD + len(rows) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for column, light in enumerate(lights):
        pen.text((_WORDS + column * cell, 5), light, "black", font)
    cases = [{case.answer: case for case in reversed(verdict.cases)} for verdict in verdicts]
    for number, row in enumerate(rows):
        top = _HEAD + number * cell
        _label(pen, row, eval_set, top, font)
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


def _label(pen: ImageDraw.ImageDraw, row: tuple[str, str], eval_set: EvalSet, top: int, font: Font) -> None:
    index = next(i for i in (eval_set.at(row, light) for light in eval_set.lights) if i is not None)
    caption = textwrap.wrap(textwrap.shorten(eval_set.caption(index), 160, placeholder=" ..."), 28)
    for line, (text, colour) in enumerate([(" ".join(row)[-30:], _SOFT), *((words, "black") for words in caption)]):
        pen.text((4, top + 15 * line), text, colour, font)


def _paste(sheet: Image.Image, pen: ImageDraw.ImageDraw, image: np.ndarray, left: int, top: int, frame: str) -> None:
    inside = _SIDE - 2 * _FRAME
    picture = Image.fromarray(image)
    scale = inside / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    x, y = left + (_SIDE - size[0]) // 2, top + (_SIDE - size[1]) // 2
    pen.rectangle((x - _FRAME, y - _FRAME, x + size[0] + _FRAME - 1, y + size[1] + _FRAME - 1), fill=frame)
    sheet.paste(picture, (x, y))
