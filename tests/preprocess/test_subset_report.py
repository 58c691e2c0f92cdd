"""What `subset` says: of what the set is, whether the gate can be run on it, and the commands to go on with."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_fixtures import FLAGS, options, read, write_image, write_photos
from PIL import Image
from subset_fixtures import about, save, small
from wording import lines_naming

from fluxdit_jax.dataset.grid import GRID_FILE, read_grid
from fluxdit_jax.dataset.manifest import load_manifest
from preprocess.__main__ import main
from preprocess.build.build import build
from preprocess.subset.lights import LIGHTS
from preprocess.subset.subset import SHEET, subset


@pytest.fixture
def photos(tmp_path: Path, draw_photo) -> Path:
    return write_photos(tmp_path / "photos", 14, draw_photo)


class Said:
    """Makes sets and keeps what is printed."""

    def __init__(self, capsys: pytest.CaptureFixture) -> None:
        self._capsys = capsys

    def __call__(self, source: Path, output: Path, **more: Any) -> str:
        self._capsys.readouterr()
        subset(small(source, output, **more))
        return self._capsys.readouterr().out


@pytest.fixture
def said(capsys: pytest.CaptureFixture) -> Said:
    return Said(capsys)


def test_what_was_made_of_what(photos: Path, tmp_path: Path, said: Said) -> None:
    (photos / "bad.png").write_bytes(b"")
    (photos / "bad.txt").write_text("no bytes")
    printed = said(photos, tmp_path / "out")
    assert lines_naming(printed, "Done", 16, tmp_path / "out")
    assert lines_naming(printed, 4, "photographs", 2, "views", "lights (none, warm)", 15)
    assert lines_naming(printed, "left out", "1 zero bytes")
    assert lines_naming(printed, tmp_path / "out" / SHEET)
    printed = said(photos, tmp_path / "out")
    assert lines_naming(printed, "Up to date", 16) and "Done" not in printed
    assert lines_naming(printed, "128 px by bucket") and "--candidates" not in printed
    assert lines_naming(said(photos, tmp_path / "out", square=True), "128x128")


def test_captions_with_words_of_their_own_are_counted(tmp_path: Path, draw_photo, said: Said) -> None:
    for seed, caption in enumerate(("a man looking left", "a cup on the right", "a dog", "a house", "a bright day")):
        write_image(tmp_path / "photos" / f"{seed}.png", seed, caption, draw_photo)
    printed = said(tmp_path / "photos", tmp_path / "out", count=5)
    assert lines_naming(printed, 2, 3, "'looking left'", "'looking right'")
    assert about(tmp_path / "out")["own_words"] == 2
    printed = said(tmp_path / "photos", tmp_path / "out", count=5, edit=("day=>night", "dog=>cat"))
    assert lines_naming(printed, 4, 1, "'day'", "'night'")
    assert "'day'" not in said(tmp_path / "photos", tmp_path / "out", count=5, mirror=False)


def test_how_well_the_lights_are_seen(photos: Path, tmp_path: Path, said: Said) -> None:
    printed = said(photos, tmp_path / "out", count=10, lights=3)
    seen = about(tmp_path / "out")["lights_seen"]
    assert list(seen["retrieved"]) == ["none", "warm", "cool"] and seen["chance"] == pytest.approx(1 / 3)
    told = [f"{light} {share:.0%}" for light, share in seen["retrieved"].items()]
    assert lines_naming(printed, "builtin:tone", *told, "33%", f"{seen['strength']:.2f}")
    assert min(seen["retrieved"].values()) > 0.9 and "does not see" not in printed
    assert lines_naming(printed, "stand-in", "--vision-encoder")
    assert "stand-in" not in said(photos, tmp_path / "again", count=10, vision_encoder="builtin:tone")


def test_an_encoder_that_does_not_see_the_lights_is_warned_of(photos: Path, tmp_path: Path, said: Said) -> None:
    """One other photograph does not teach ten lights."""
    printed = said(photos, tmp_path / "out", count=2, lights=len(LIGHTS))
    shares = about(tmp_path / "out")["lights_seen"]["retrieved"]
    unseen = [light for light, share in shares.items() if share < 0.6]
    assert unseen and lines_naming(printed, "warning", "builtin:tone", ", ".join(unseen), "--lights")


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({}, []),
        ({"count": 1}, ["vision swap"]),
        ({"lights": 1}, ["vision swap"]),
        ({"mirror": False}, ["text edit"]),
        ({"count": 1, "mirror": False}, ["vision swap", "text edit"]),
    ],
)
def test_a_set_that_the_gate_cannot_judge_is_warned_of(
    photos: Path, tmp_path: Path, said: Said, more: dict[str, Any], warned: list[str]
) -> None:
    printed = said(photos, tmp_path / "out", **more)
    for question in ("vision swap", "text edit"):
        assert bool(lines_naming(printed, "warning", question, "cannot be judged")) == (question in warned), printed


def test_pictures_that_are_bent_or_enlarged_are_told(tmp_path: Path, draw_photo, said: Said) -> None:
    for seed in range(4):
        save(tmp_path / "photos" / f"{seed}.png", draw_photo(160, 240, seed), f"caption {seed}")
    printed = said(tmp_path / "photos", tmp_path / "out", square=True)
    assert lines_naming(printed, "warning", 4, "50%", "--square")
    assert about(tmp_path / "out")["distorted"] == 4
    printed = said(tmp_path / "photos", tmp_path / "out", resolution=512)
    assert lines_naming(printed, "warning", "4 photographs", "enlarged", "1.5 times")
    printed = said(tmp_path / "photos", tmp_path / "out", resolution=256)
    assert "enlarged" not in printed and about(tmp_path / "out")["enlarged"] == 0


def test_names_and_captions_cannot_write_to_the_terminal(tmp_path: Path, draw_photo, said: Said) -> None:
    for seed in range(4):
        write_image(tmp_path / "ph\x1b[2Jotos" / f"\x1b]0;x\x07{seed}.png", seed, f"caption {seed} \x1b[2J", draw_photo)
    printed = said(tmp_path / "ph\x1b[2Jotos", tmp_path / "o\x1b[2Jut", edit=("\x1b[1Ja=>b",))
    assert "\x1b" not in printed


def test_a_sheet_shows_every_picture_of_every_photograph(photos: Path, tmp_path: Path) -> None:
    subset(small(photos, tmp_path / "out", count=3, lights=5))
    subset(small(photos, tmp_path / "few", count=2, lights=1, mirror=False))
    sizes = []
    for name in ("out", "few"):
        with Image.open(tmp_path / name / SHEET) as sheet:
            sizes.append(sheet.size)
            cells = np.asarray(sheet.convert("L"))
    (wide, high), (narrow, low) = sizes
    assert (wide - narrow) == 9 * 118 and high - low == 118
    assert cells[30:130, 220:320].std() > 10, "a picture"


# ---------------------------------------------------------------------------------------------------- commands


def commands(printed: str) -> list[list[str]]:
    """Those that are printed, split as a shell does."""
    lines = [line for line in printed.splitlines() if line.startswith("python -m ")]
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]


def test_the_printed_commands_of_a_folder(photos: Path, tmp_path: Path, said: Said) -> None:
    output = tmp_path / "a gate's set"
    printed = said(photos, output)
    build_line, train, validate = commands(printed)
    assert "# no downloads: " + " ".join(FLAGS) in printed.replace("   #", " #")
    assert main(build_line[3:] + FLAGS) == 0
    data = tmp_path / "a gate's set-dataset"
    grid = read_grid(data / GRID_FILE)
    assert len(grid) == 16 and grid.keys() == read(data).keys()
    manifest = load_manifest(data)
    assert manifest.resolution == 128 and "holdout" not in manifest.shards and manifest.rejects == 0
    assert train[:3] == ["python", "-m", "fluxdit_jax.train"] and f"--config.data.path={data}" in train
    assert "--config.workdir=runs/a gate's set" in train
    assert validate == ["python", "-m", "fluxdit_jax.validate", "--workdir=runs/a gate's set"]
    (again, *_) = commands(said(photos, output, count=2))
    assert "--replace" in again and main(again[3:] + FLAGS) == 0
    assert read_grid(data / GRID_FILE).keys() == read(data).keys() and len(read(data)) == 8


def test_the_printed_command_of_a_dataset_runs_as_it_stands(tmp_path: Path, draw_photo, said: Said) -> None:
    """With the dataset's encoders, its bound of the aspect, and a side that is less than it took."""
    for seed in range(4):
        save(tmp_path / "photos" / f"{seed}.png", draw_photo(120, 660, seed), f"caption {seed}")
    build(options(tmp_path / "photos", tmp_path / "ds", max_aspect=6.0, min_side=100, holdout=0.0))
    printed = said(tmp_path / "ds", tmp_path / "out", count=3, resolution=192)
    (line, *_) = commands(printed)
    assert line[line.index("--max-aspect") + 1] == "6" and "--min-side" not in line and "#" not in printed
    assert main(line[3:]) == 0
    data = tmp_path / "out-dataset"
    assert read_grid(data / GRID_FILE).keys() == read(data).keys() and len(read(data)) == 12
    (line, *_) = commands(said(tmp_path / "ds", tmp_path / "out", count=3, resolution=48, square=True))
    assert line[line.index("--min-side") + 1] == "48" and "--max-aspect" not in line
    assert main(line[3:]) == 0
    assert load_manifest(data).resolution == 48 and load_manifest(data).rejects == 0
    assert read_grid(data / GRID_FILE).keys() == read(data).keys() and len(read(data)) == 12
