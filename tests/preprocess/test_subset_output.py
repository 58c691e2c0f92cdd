"""What `subset` leaves on the disk: the same bytes each time, the old set or the new one, and nobody else's files."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build_fixtures import options, read, write_image, write_photos
from subset_fixtures import about, left_out, save, sidecar, small, tree
from wording import naming

from fluxdit_jax.dataset.grid import GRID_FILE, INPUT_GRID, read_grid
from preprocess import PreprocessError
from preprocess.__main__ import main
from preprocess.build.build import build
from preprocess.subset.subset import ABOUT, subset

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def photos(tmp_path: Path, draw_photo) -> Path:
    return write_photos(tmp_path / "photos", 14, draw_photo)


def test_the_same_input_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    first = subset(small(photos, tmp_path / "a", workers=2))
    second = subset(small(photos, tmp_path / "b", workers=1))
    assert first.changed and second.changed
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    stamp = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    assert not subset(small(photos, tmp_path / "a")).changed
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == stamp
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "photos"]


def test_another_choice_takes_the_place_of_the_first(photos: Path, tmp_path: Path) -> None:
    subset(small(photos, tmp_path / "out", count=6, lights=3))
    for more in ({"count": 2}, {"lights": 4}, {"mirror": False}, {"square": True}, {"edit": ("up=>down",)}):
        assert subset(small(photos, tmp_path / "out", **more)).changed
        shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
        subset(small(photos, tmp_path / "fresh", **more))
        assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_file_that_was_lost_is_made_again(photos: Path, tmp_path: Path) -> None:
    subset(small(photos, tmp_path / "out"))
    before = tree(tmp_path / "out")
    for name in (min(before), INPUT_GRID):
        (tmp_path / "out" / name).unlink()
        assert subset(small(photos, tmp_path / "out")).changed
        assert tree(tmp_path / "out") == before


def test_too_few_are_an_error_that_says_how_many_and_why(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copy(photos / "set0" / "p00.png", photos / "copy.png")
    (photos / "copy.json").write_text('{"caption": "the same"}')
    (photos / "bad.png").write_bytes(b"not a picture")
    (photos / "bad.json").write_text('{"caption": "bad"}')
    write_image(photos / "again.png", 20, "photo number 3 of a dog", _drawn)
    save(photos / "black.png", np.zeros((90, 90, 3), np.uint8), "at night")
    arguments = ["subset", "--input", str(photos), "--output", str(tmp_path / "out"), "--resolution", "128"]
    arguments += ["--lights", "2"]
    assert main([*arguments, "--count", "15"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and "--allow-fewer" in error
    assert not list(tmp_path.glob(".*"))  # nothing that it was to be made in
    told = ["1 copy of another, byte by byte", "1 not an image", "1 black", "1 has the caption of another"]
    assert re.search(naming("--count 15", 14, 18, "--count 14", *told), error), error
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--count", "15", "--allow-fewer"]) == 0
    output = about(tmp_path / "out")
    assert len(output["chosen"]) == 14 == output["photographs"] and output["made"] == 56
    assert left_out(output)["set0/p00.png"] == "copy of another, byte by byte"  # copy.png comes first by name
    assert left_out(output)["bad.png"] == "not an image"


def _drawn(height: int, width: int, seed: int) -> np.ndarray:
    """A picture unlike those of `draw_photo`."""
    picture = np.full((height, width, 3), 30, np.uint8)
    picture[: height // 3, : width // 4] = 230
    return picture


def test_without_any_photograph_there_is_no_set(tmp_path: Path) -> None:
    save(tmp_path / "photos" / "a.png", np.zeros((90, 90, 3), np.uint8), "black")
    for allowed in (False, True):
        with pytest.raises(PreprocessError, match=naming("--count 4", 0, 1, "1 black")):
            subset(small(tmp_path / "photos", tmp_path / "out", allow_fewer=allowed))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"count": 0}, ["--count", 1, 0]),
        ({"lights": 0}, ["--lights", 1, 10]),
        ({"lights": 11}, ["--lights", 1, 10, 11]),
        ({"candidates": 3}, ["--candidates", 3, 4]),
        ({"resolution": 100, "square": True}, ["--resolution", 16, 100]),
        ({"edit": ("left to right",)}, ["--edit", "'left to right'"]),
        ({"edit": ("up=>down:right",)}, ["--edit", "'up=>down'"]),
        ({"images": "/tmp"}, ["--images", "dataset"]),
        ({"input": "/nowhere"}, ["--input", "/nowhere"]),
        ({"vision_encoder": "builtin:nothing"}, ["builtin:nothing", "builtin:tone"]),
    ],
)
def test_impossible_options_are_named(photos: Path, tmp_path: Path, more: dict[str, Any], named: list[Any]) -> None:
    with pytest.raises(PreprocessError, match=naming(*named)):
        subset(dataclasses.replace(small(photos, tmp_path / "out"), **more))
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- other people's files


def test_files_that_are_not_ours_are_not_lost(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(PreprocessError, match=f"--output {output} "):
        subset(small(photos, output))
    (output / "thesis.txt").unlink()
    name = min(read_grid(output / INPUT_GRID) or subset(small(photos, output)).about["files"])
    for changed in (sidecar_of(output), INPUT_GRID, min(n for n in tree(output) if n.endswith(".png"))):
        before = (output / changed).read_bytes()
        (output / changed).write_bytes(before + b" ")
        with pytest.raises(PreprocessError, match=naming(f"--output {output}", changed, "changed")):
            subset(small(photos, output, count=2))
        assert (output / changed).read_bytes() == before + b" "
        (output / changed).write_bytes(before)
    (output / "set0" / "extra.png").write_bytes(b"x")
    with pytest.raises(PreprocessError, match=naming(f"--output {output}", "set0/extra.png")):
        subset(small(photos, output, count=2))
    (output / "set0" / "extra.png").unlink()
    (output / name).unlink()
    (output / name).symlink_to(photos / "set0" / "p00.png")
    with pytest.raises(PreprocessError, match=naming(f"--output {output}", name)):
        subset(small(photos, output, count=2))


def sidecar_of(output: Path) -> str:
    return min(name for name in tree(output) if name.endswith(".json") and not name.startswith("."))


def test_a_file_in_the_place_of_the_output(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(PreprocessError, match=naming(f"--output {tmp_path / 'out'}", "folder")):
        subset(small(photos, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("where", ["photos", "."])
def test_the_input_is_never_the_output(photos: Path, tmp_path: Path, where: str) -> None:
    build(options(photos, tmp_path / "elsewhere" / "ds"))
    before = tree(photos)
    for source in (photos, tmp_path / "elsewhere" / "ds"):
        with pytest.raises(PreprocessError, match="--output"):
            subset(small(source, tmp_path / where))
    assert tree(photos) == before


def test_the_output_is_not_below_the_input_whose_next_build_would_take_it(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "ds"))
    for source in (photos, tmp_path / "ds"):
        with pytest.raises(PreprocessError, match=naming("--output", str(photos), "beside it")):
            subset(small(source, photos / "gate"))
    assert not (photos / "gate").exists()


# ------------------------------------------------------------------------------------------------------- names


def test_pictures_of_one_name_become_records_of_their_own(tmp_path: Path, draw_photo) -> None:
    names = ("a.png", "a.jpg", "A.webp", "b.v2.png", "deep/b.v2.png", "c d/é.png")
    for seed, name in enumerate(names):
        write_image(tmp_path / "photos" / name, seed, f"caption {seed}", draw_photo)
    (tmp_path / "photos" / "a.json").write_text('{"caption": "of both of a"}')
    subset(small(tmp_path / "photos", tmp_path / "out", count=6, allow_fewer=True, mirror=False))
    chosen = about(tmp_path / "out")["chosen"]
    photographs = {one["key"]: one["photograph"] for one in chosen}
    assert photographs.items() >= {
        "A.webp": "A.webp", "b.v2.png": "b.v2", "deep/b.v2.png": "deep/b.v2", "c d/é.png": "c d/é",
    }.items()  # fmt: skip
    assert len(photographs) == 5 and {"a.png", "a.jpg"} & photographs.keys(), "those two have one caption"
    build(options(tmp_path / "out", tmp_path / "ds", holdout=0.0))
    grid = read_grid(tmp_path / "ds" / GRID_FILE)
    assert grid.keys() == read(tmp_path / "ds").keys() and len(grid) == 10
    for name, place in grid.items():
        assert place.photograph in photographs.values() and name.startswith(place.photograph)


def test_a_name_that_is_another_ones_mirrored(tmp_path: Path, draw_photo) -> None:
    """`a` mirrored and the photograph `a.mirrored` are two pictures."""
    for seed, name in enumerate(("a.png", "a.mirrored.png", "b.png")):
        write_image(tmp_path / "photos" / name, seed, f"caption {seed}", draw_photo)
    subset(small(tmp_path / "photos", tmp_path / "out", count=3))
    grid = read_grid(tmp_path / "out" / INPUT_GRID)
    assert len(grid) == 12 and {place.photograph for place in grid.values()} == {
        one["photograph"] for one in about(tmp_path / "out")["chosen"]
    }
    for name, place in grid.items():
        key = sidecar(tmp_path / "out", name)["subset_of"]["key"]
        (one,) = (one for one in about(tmp_path / "out")["chosen"] if one["key"] == key)
        assert place.photograph == one["photograph"]


# ------------------------------------------------------------------------------------------------------- kills


def start(photos: Path, output: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "preprocess", "subset", "--input", str(photos), "--output", str(output), *more]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_when(process: subprocess.Popen, there: Callable[[], bool]) -> bool:
    """Kills a process as soon as something is there; False if it has ended before."""
    deadline = time.monotonic() + 120
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.slow  # about 20 s: four processes
def test_a_killed_run_leaves_the_old_set_or_the_new_one(photos: Path, tmp_path: Path) -> None:
    output, staging = tmp_path / "out", tmp_path / ".out.subset"
    choices = [{"count": 4, "lights": 3}, {"count": 6, "lights": 2}]
    whole = []
    for number, choice in enumerate(choices):
        subset(small(photos, tmp_path / f"fresh{number}", **choice))
        whole.append(tree(tmp_path / f"fresh{number}"))
    subset(small(photos, output, **choices[1]))
    moments: list[Callable[[], bool]] = [
        lambda: len(list(staging.glob("next/*/*.png"))) > 3,
        lambda: (staging / "next" / INPUT_GRID).exists(),
        lambda: (staging / "next" / ABOUT).exists(),
        lambda: (staging / "old").exists(),
    ]
    kills = 0
    for number, moment in enumerate(moments):
        choice, new = choices[number % 2], whole[number % 2]
        more = [word for name, value in choice.items() for word in (f"--{name}", str(value))]
        kills += kill_when(start(photos, output, *more, "--resolution", "128", "--workers", "2"), moment)
        left = tree(output if output.exists() else staging / "old")
        assert left in whole
        subset(small(photos, output, **choice))
        assert tree(output) == new and not staging.exists()
    assert kills >= 2, "the last moments are short"


def test_a_kill_between_the_two_renames_loses_nothing(photos: Path, tmp_path: Path) -> None:
    output, staging = tmp_path / "out", tmp_path / ".out.subset"
    subset(small(photos, output))
    before = tree(output)
    staging.mkdir()
    output.rename(staging / "old")
    assert not subset(small(photos, output)).changed
    assert tree(output) == before and not staging.exists()


def test_two_at_once_are_told_apart(photos: Path, tmp_path: Path) -> None:
    output, staging = tmp_path / "out", tmp_path / ".out.subset"
    process = start(photos, output, "--count", "4", "--resolution", "256")
    try:
        deadline = time.monotonic() + 120
        while not list(staging.glob("next/*/*.png")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(PreprocessError, match=naming(process.pid, "--output")):
            subset(small(photos, output))
    finally:
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait() == 0
    assert about(output)["made"] == 40 == len(read_grid(output / INPUT_GRID)), "and the first one goes on"
