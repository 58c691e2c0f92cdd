"""Words on pictures in any script: a font that has the characters, or their code points, never empty boxes.

Imports neither JAX nor PyTorch; `preprocess` uses it too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import re
import subprocess
import unicodedata
from pathlib import Path

from PIL import ImageFont

log = logging.getLogger(__name__)
_NOBODY = "\U0010ffff"  # no font has it: what is drawn instead is drawn for every character that a font lacks
_OTHERS = ("/System/Library/Fonts/Supplemental/Arial Unicode.ttf",)  # of machines without fontconfig
_SIZE = 24  # pixels, to compare glyphs


@dataclasses.dataclass(frozen=True)
class Face:
    """A font: its file and the number of the face in it. The file is "" for Pillow's own, which has Latin letters."""

    file: str = ""
    index: int = 0

    def font(self, size: int) -> ImageFont.FreeTypeFont:
        """Raises `OSError` if the file is no font that can be scaled."""
        return _font(self, size)

    def has(self, character: str) -> bool:
        """Whether the font draws it; white space and invisible characters are drawn by every font."""
        return character.isspace() or _has(self, character)


@functools.lru_cache(maxsize=64)
def _font(face: Face, size: int) -> ImageFont.FreeTypeFont:
    if not face.file:
        font = ImageFont.load_default(size=size)
        assert isinstance(font, ImageFont.FreeTypeFont)  # as it is where a size is given
        return font
    return ImageFont.truetype(face.file, size, index=face.index)


@functools.lru_cache(maxsize=100_000)
def _has(face: Face, character: str) -> bool:
    # without shaping, which draws a lone accent on a circle
    font = face.font(_SIZE)
    if face.file:
        font = ImageFont.truetype(face.file, _SIZE, index=face.index, layout_engine=ImageFont.Layout.BASIC)
    mask, missing = (font.getmask(text) for text in (character, _NOBODY))
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))


def drawable(text: str) -> tuple[str, Face]:
    """The text as it can be drawn, and a face that has all of it.

    The face is Pillow's own, DejaVu Sans (Greek, Cyrillic, Hebrew, Arabic) where matplotlib is installed, or the one
    that fontconfig names for the text's characters. Characters that the best of them lacks become code points: U+5C71.
    """
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" and not 0xFE00 <= ord(c) <= 0xFE0F)
    characters = frozenset(c for c in text if not c.isspace())
    best, lacking = Face(), characters
    for find in (Face, _dejavu, functools.partial(_system_face, characters)):
        face = find()
        if face is not None and len(left := _lacking(face, characters)) < len(lacking):
            best, lacking = face, left
        if not lacking:
            return text, best
    _report(lacking)
    pattern = "[" + "".join(re.escape(c) for c in sorted(lacking)) + "]"
    return re.sub(pattern, lambda found: f" U+{ord(found[0]):04X} ", text), best


def _lacking(face: Face, characters: frozenset[str]) -> frozenset[str]:
    try:
        return frozenset(c for c in characters if not face.has(c))
    except OSError:  # a font of bitmaps, or a damaged one
        return characters


@functools.cache
def _dejavu() -> Face | None:
    found = importlib.util.find_spec("matplotlib")  # not imported: that takes a second
    for folder in (found.submodule_search_locations or ()) if found else ():
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return Face(str(file))
    return None


@functools.lru_cache(maxsize=256)
def _system_face(characters: frozenset[str]) -> Face | None:
    wanted = " ".join(f"{ord(c):x}" for c in sorted(characters)[-200:])
    try:
        done = subprocess.run(
            ["fc-match", "-f", "%{file}\n%{index}", f":charset={wanted}:scalable=true"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        file, _, index = done.stdout.partition("\n")
        return Face(file, int(index) & 0xFFFF)  # above it stands the instance of a variable font
    except (OSError, ValueError, subprocess.SubprocessError):
        return next((Face(file) for file in _OTHERS if Path(file).is_file()), None)


@functools.lru_cache(maxsize=1000)
def _report_scripts(scripts: frozenset[str]) -> None:
    log.warning(
        "no font on this machine has the characters %s: they are written as code points. Install one that has, such "
        "as Noto Sans (Debian: fonts-noto-core, fonts-noto-cjk)",
        ", ".join(sorted(scripts)),
    )


def _report(lacking: frozenset[str]) -> None:
    """Once for each set of scripts; the first word of a character's name is its script's."""
    scripts = frozenset(unicodedata.name(c).split()[0] for c in lacking if unicodedata.name(c, ""))
    if scripts:  # control characters have no names, and no font has them
        _report_scripts(scripts)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> str:
    """The text in lines of at most `width` pixels, broken between words or, where a word is too long, inside it."""
    found = [""]
    for word in text.split():
        if found[-1] and font.getlength(f"{found[-1]} {word}") <= width:
            found[-1] += f" {word}"
            continue
        if found[-1]:
            found.append("")
        for character in word:
            if found[-1] and font.getlength(found[-1] + character) > width:
                found.append("")
            found[-1] += character
        if len(found) > lines:
            break
    if len(found) > lines:
        found = [*found[: lines - 1], found[lines - 1] + " ..."]
    return "\n".join(found)
