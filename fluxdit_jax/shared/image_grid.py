"""Grids of pictures with labels.

Imports neither JAX nor PyTorch; `preprocess` uses it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

from fluxdit_jax.shared import labels
from fluxdit_jax.shared.atomic_files import replacing

_MARGIN = 6
_BACKGROUND = (250, 250, 248)
_INK = (40, 40, 44)
_TEXT_SIZE = 12


def grid(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    cell: int = 160,
) -> Image.Image:
    """Arranges uint8 [H, W, 3] pictures in rows and columns, each fitted into a square cell.

    Args:
      column_titles: above the columns. row_titles: to the left of the rows, wrapped. In any script, see `labels`.
      cell: side of a cell, pixels; smaller pictures are enlarged, larger ones reduced.
    """
    left = 170 if row_titles else 0
    top = 22 if column_titles else 0
    columns = max(len(row) for row in rows)
    step = cell + _MARGIN
    sheet = Image.new("RGB", (left + columns * step + _MARGIN, top + len(rows) * step + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        _write(draw, (left + _MARGIN + column * step, 6), title, step, 1)
    for y, row in enumerate(rows):
        if row_titles:
            _write(draw, (_MARGIN, top + _MARGIN + y * step), row_titles[y], left - _MARGIN, cell // 16)
        for x, pixels in enumerate(row):
            picture = Image.fromarray(pixels)
            scale = cell / max(picture.size)
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
            corner = (
                left + _MARGIN + x * step + (cell - size[0]) // 2,
                top + _MARGIN + y * step + (cell - size[1]) // 2,
            )
            sheet.paste(picture, corner)
    return sheet


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int, lines: int) -> None:
    text, face = labels.drawable(text)
    font = face.font(_TEXT_SIZE)
    draw.multiline_text(corner, labels.wrapped(text, font, width, lines), fill=_INK, font=font)


def save(picture: Image.Image, path: Path, notes: PngImagePlugin.PngInfo | None = None) -> None:
    """Writes a PNG with its notes, whole or not at all; raises `OSError`, which names the path."""
    with replacing(path) as temporary:
        picture.save(temporary, "png", pnginfo=notes)
