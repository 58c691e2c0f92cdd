"""A gate set on one sheet: a photograph a row, lights and views as columns."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CELL, _GAP, _HEAD, _WORDS = 112, 4, 24, 210


def draw_sheet(rows: list[list[np.ndarray]], texts: list[tuple[str, ...]], columns: list[str]) -> Image.Image:
    """
    Args:
      rows: pictures of each photograph.
      texts: of each photograph its name and its captions.
      columns: titles.
    """
    small = ImageFont.load_default(11)
    step = _CELL + _GAP
    sheet = Image.new("RGB", (_WORDS + len(columns) * step, _HEAD + len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((_WORDS + column * step, 6), title, "black", small)
    for number, (pictures, (name, *captions)) in enumerate(zip(rows, texts)):
        top = _HEAD + number * step
        lines = [(name[-32:], "#888888")]
        for caption in captions:
            text = textwrap.shorten(caption, 100, placeholder=" ...")
            lines += [(line, "black") for line in textwrap.wrap(text, 36)[:3]]
        for index, (line, colour) in enumerate(lines):
            draw.text((6, top + 14 * index), line, colour, small)
        for column, picture in enumerate(pictures):
            cell = Image.fromarray(picture)
            cell.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
            sheet.paste(cell, (_WORDS + column * step + (_CELL - cell.width) // 2, top + (_CELL - cell.height) // 2))
    return sheet
