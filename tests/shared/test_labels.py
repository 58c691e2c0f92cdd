"""Words on pictures: the right font, or code points, and never the box of a character that a font lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import get_data_path
from PIL import Image, ImageDraw
from training_helpers import REPOSITORY

from fluxdit_jax.shared import image_grid, labels

FONTS = Path(get_data_path()) / "fonts" / "ttf"
pytest_plugins = ("training_fixtures",)


def boxes(text: str) -> bool:
    """Whether something of the text as it is drawn is the box of its font."""
    drawn, face = labels.drawable(text)
    return any(not face.has(character) for character in drawn)


@pytest.mark.parametrize(
    "text",
    ["a dog", "Портрет женщины", "Ελληνικά", "שלום", "صورة امرأة", "山の写真", "한국어", "हिन्दी", "ไทย",
     "👩\u200d👩\u200d👧 🙂",
     "\x1b[31m", "e\u0301", "\u202eright", "\ufdd0"],
)  # fmt: skip
def test_no_boxes_in_any_script(text: str) -> None:
    assert not boxes(text)


def test_what_can_be_drawn_is_drawn_and_the_rest_becomes_code_points() -> None:
    for text in ("a dog, 3 × 4", "Портрет женщины", "שלום"):
        assert labels.drawable(text)[0] == text
    text, face = labels.drawable("a \U0010fffd dog")
    assert "U+10FFFD" in text and text.startswith("a ") and text.endswith(" dog") and face == labels.Face()


def test_a_font_that_lacks_a_character_is_noticed() -> None:
    latin = labels.Face()
    assert latin.has("a") and not latin.has("山") and not latin.has("Ж")
    assert labels.Face(str(FONTS / "DejaVuSans.ttf")).has("Ж")
    assert not labels.Face(str(FONTS / "DejaVuSans.ttf")).has("\u093f")  # a mark that stands on no circle of its own


def test_a_font_of_the_system_is_found(tmp_path: Path) -> None:
    """What neither Pillow's font nor DejaVu has, from a folder of fonts that fontconfig knows."""
    if shutil.which("fc-match") is None:
        pytest.skip("needs fontconfig")
    (tmp_path / "fonts").mkdir()
    shutil.copy(FONTS / "STIXGeneral.ttf", tmp_path / "fonts")
    (tmp_path / "fonts.conf").write_text(
        f"<fontconfig><dir>{tmp_path}/fonts</dir><cachedir>{tmp_path}/cache</cachedir></fontconfig>"
    )
    lacking = next(
        chr(code)
        for code in range(0x2000, 0xFFFF)
        if labels.Face(str(FONTS / "STIXGeneral.ttf")).has(chr(code))
        and not any(face.has(chr(code)) for face in (labels.Face(), labels.Face(str(FONTS / "DejaVuSans.ttf"))))
        and not chr(code).isspace()
    )
    code = f"from fluxdit_jax.shared.labels import drawable; print(*drawable({lacking!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY,
        env=os.environ | {"FONTCONFIG_FILE": str(tmp_path / "fonts.conf"), "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.stdout.startswith(f"{lacking} ") and "STIXGeneral.ttf" in done.stdout and not done.stderr


def test_a_missing_script_is_told_once(package_log: list[str]) -> None:
    labels._report_scripts.cache_clear()
    for _ in range(2):
        labels.drawable("\U00012000")
    assert [line for line in package_log if "CUNEIFORM" in line and line.startswith("WARNING")] == package_log[:1]
    assert len(package_log) == 1


def test_long_words_stay_beside_the_pictures() -> None:
    """Text without spaces is broken; nothing is drawn under a picture and cut off there."""
    white = [[np.full((64, 64, 3), 255, np.uint8)]]
    sheet = np.asarray(image_grid.grid(white, row_titles=["x" * 200], cell=64))
    assert (sheet[6:70, 176:240] == 255).all() and (sheet[:, :170] < 100).any()
    font = labels.Face().font(12)
    draw = ImageDraw.Draw(Image.new("RGB", (8, 8)))
    for text in ("x" * 200, "word " * 50, "山の写真" * 20):
        lines = labels.wrapped(labels.drawable(text)[0], font, 164, 4).split("\n")
        assert len(lines) <= 4 and lines[-1].endswith(" ...")
        assert all(draw.textlength(line.removesuffix(" ..."), font=font) <= 164 for line in lines)


def test_the_same_words_in_other_scripts_differ_on_a_sheet() -> None:
    sheets = [
        np.asarray(image_grid.grid([[np.zeros((32, 32, 3), np.uint8)]], row_titles=[text], cell=64))
        for text in ("山の写真", "海の写真", "гора", "море", "صورة", "אישה")
    ]
    assert len({sheet.tobytes() for sheet in sheets}) == len(sheets)


def test_the_contact_sheet_of_inspect_tells_captions_apart(tmp_path: Path, draw_photo) -> None:
    """matplotlib draws one and the same sign for every character of a script that its fonts lack."""
    from build_fixtures import options, write_image

    from preprocess.build.build import build
    from preprocess.inspect.report import inspect

    sheets = []
    for caption in ("山の写真", "海の写真"):
        folder = tmp_path / caption
        write_image(folder / "in" / "a.png", 0, caption, draw_photo)
        build(options(folder / "in", folder / "ds", holdout=0.0))
        inspect(str(folder / "ds"), None, 4, "cpu")
        sheets.append(np.asarray(Image.open(folder / "ds" / "inspect" / "contact.png")))
    assert sheets[0].shape != sheets[1].shape or (sheets[0] != sheets[1]).any()
