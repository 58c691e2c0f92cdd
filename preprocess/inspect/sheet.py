"""The chosen pictures of a `subset` on one sheet."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from preprocess.build.plan import Item

_CELL, _LINES, _GAP, _HEAD = 168, 4, 8, 40


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A picture of the set: its new name below the output, and why it is in it."""

    item: Item
    name: str
    why: str


def draw_sheet(pictures: list[Image.Image], chosen: list[Chosen], about: dict[str, Any]) -> Image.Image:
    """All pictures with their captions; couples come first, side by side and framed."""
    columns = min(10, len(pictures) + len(pictures) % 2)  # even: a couple stays in one line
    small, large = ImageFont.load_default(11), ImageFont.load_default(16)
    step = _CELL + _GAP
    line = _CELL + 14 * (_LINES + 1) + _GAP
    size = (_GAP + columns * step, _HEAD + -(-len(pictures) // columns) * line)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    light = about["figures"]["light_spread"]
    title = (
        f"{len(pictures)} of {about['candidates']} candidates, light spread {light['chosen']:.2f} "
        f"(by chance {light['by_chance']:.2f})"
    )
    draw.text((_GAP, 10), title, "black", large)
    for number, (picture, one) in enumerate(zip(pictures, chosen)):
        x, y = _GAP + number % columns * step, _HEAD + number // columns * line
        shown = picture.copy()
        shown.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
        sheet.paste(shown, (x + (_CELL - shown.width) // 2, y + (_CELL - shown.height) // 2))
        if one.why.startswith("couple"):
            draw.rectangle((x - 2, y - 2, x + _CELL + 1, y + _CELL + 1), outline="#d06030", width=2)
        text = textwrap.wrap(textwrap.shorten(one.item.caption, 110, placeholder=" ..."), 29)[:_LINES]
        for index, words in enumerate([one.name[-24:], *text]):
            draw.text((x, y + _CELL + 3 + 14 * index), words, "#888888" if index == 0 else "black", small)
    return sheet
