"""What `build`, `--dry-run` and `inspect` say of pictures and captions, and that what they advise is right."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from build_fixtures import FLAGS, write_image
from PIL import Image
from wording import lines_naming, naming, numbers

from fluxdit_jax.dataset.grid import GRID_FILE, read_grid
from fluxdit_jax.dataset.manifest import load_manifest
from preprocess.__main__ import main
from preprocess.build.advice import repeated_captions
from preprocess.build.items import Repeated


class Road:
    """A folder of photographs of one size, and the commands that read it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture) -> None:
        self.photos, self.data = folder / "photos", folder / "data"
        self._capsys = capsys

    def draw(self, draw, size: tuple[int, int], count: int = 8) -> None:  # noqa: ANN001
        self.photos.mkdir(exist_ok=True)
        width, height = size
        for number in range(count):
            path = self.photos / f"{width}x{height}_{number:02}.png"
            Image.fromarray(draw(height, width, number)).save(path)
            path.with_suffix(".txt").write_text(f"{path.stem}")

    def run(self, *arguments: str) -> str:
        self._capsys.readouterr()
        assert main(list(arguments)) == 0
        return self._capsys.readouterr().out

    def build(self, *more: str) -> str:
        common = ["--input", str(self.photos), "--output", str(self.data), "--holdout", "0", *FLAGS]
        return self.run("build", *common, *more)


def bent(said: str) -> list[str]:
    """Warnings that pictures of 240x160 are bent by more than 10 %."""
    return lines_naming(said, "warning", "10%", "240x160")


@pytest.fixture
def road(tmp_path: Path, capsys: pytest.CaptureFixture) -> Road:
    return Road(tmp_path, capsys)


def test_distortion_is_told_by_the_build_too_and_the_advice_helps(road: Road, draw_photo) -> None:
    road.draw(draw_photo, (240, 160))
    for more in (("--dry-run",), ()):
        said = road.build("--resolution", "128", *more)
        (warning,) = bent(said)
        assert re.search(numbers(8, 8, 10), warning) and re.search(naming("240x160", "144x112"), warning)
        (ways,) = lines_naming(said, "--fit crop", "--fit pad")
        assert "--modulus" not in ways, "16 is the least allowed"
    advice = re.search("--resolution [0-9]+", ways)[0]
    assert not bent(road.build("--dry-run", *advice.split()))
    said = road.build("--dry-run", "--resolution", "256", "--modulus", "64")
    (ways,) = lines_naming(said, "--fit crop", "--fit pad")
    advice = re.search("--modulus [0-9]+", ways)[0]
    assert not bent(road.build("--dry-run", "--resolution", "256", *advice.split()))
    assert not bent(road.build("--dry-run", "--fit", "crop"))


def test_a_resolution_that_fits_small_pictures_is_named(road: Road, draw_photo) -> None:
    road.draw(draw_photo, (240, 160))
    said = road.build("--resolution", "512", "--dry-run")
    assert re.search(numbers(8, 1.5), said)
    side = re.search("--resolution [0-9]+", said)[0]
    assert "enlarged" not in road.build("--dry-run", *side.split())
    larger = str(int(side.split()[1]) + 64)
    assert "enlarged" in road.build("--dry-run", "--resolution", larger), "the largest one is named"


def test_captions_that_many_share_are_reported_by_all_three(road: Road, draw_photo) -> None:
    road.draw(draw_photo, (160, 160))
    for number, path in enumerate(sorted(road.photos.glob("*.txt"))):
        path.write_text("a dog\x1b[2J" if number < 4 else "a cat" if number < 6 else f"number {number}")
    told = [road.build("--resolution", "128", "--dry-run"), road.build("--resolution", "128")]
    for said in [*told, road.run("inspect", str(road.data), "--cells", "1")]:
        assert re.search(f"warning: {numbers(6, 8, 4)}", said)
        assert re.search("4  a dog", said) and re.search("2  a cat", said) and "\x1b" not in said
    assert repeated_captions(Repeated.of(["a", "b", "c"])) == []
    (line, *_) = repeated_captions(Repeated.of(["a", "a", *map(str, range(98))]))
    assert "2 of 100" in line and "warning" not in line


def test_width_comes_before_height_in_every_table(road: Road, draw_photo) -> None:
    road.draw(draw_photo, (240, 160))
    planned = road.build("--resolution", "256", "--dry-run")
    road.build("--resolution", "256")
    for said in (planned, road.run("inspect", str(road.data), "--cells", "1")):
        assert re.search(r"^ +304 x 208 +1\.46 ", said, re.M), said
        assert "width x height" in said and "height x width" not in said


def test_captions_of_deleted_photographs_are_listed_and_are_no_rejects(road: Road, draw_photo) -> None:
    road.draw(draw_photo, (160, 160))
    for number in range(8):
        (road.photos / f"deleted{number}.txt").write_text("lone")
        (road.photos / f"gone{number}.json").write_text('{"caption": "lone"}')
    (road.photos / "metadata.jsonl").write_text('{"file_name": "away.jpg", "caption": "lone"}\n')
    said = road.build("--resolution", "128", "--dry-run")
    assert lines_naming(said, 0, "rejected") and re.search(r"\b17$", said, re.M)
    road.build("--resolution", "128", "--max-rejects", "0")
    assert load_manifest(road.data).rejects == 0


def test_a_square_subset_tells_how_much_it_bends(road: Road, draw_photo) -> None:
    road.draw(draw_photo, (240, 160))
    said = road.run(
        "subset", "--input", str(road.photos), "--output", str(road.data), "--count", "4", "--resolution", "128",
        "--lights", "1", "--square",
    )  # fmt: skip
    assert re.search(numbers(4, 4, 10, 50), said)
    about = json.loads((road.data / ".subset" / "subset.json").read_text())
    assert about["distorted"] == 4


def test_a_set_chosen_anew_is_built_by_the_printed_command(road: Road, draw_photo) -> None:
    road.draw(draw_photo, (160, 160), count=14)
    arguments = ["--input", str(road.photos), "--output", str(road.data), "--resolution", "128"]
    for count in (8, 3):
        said = road.run("subset", *arguments, "--count", str(count), "--lights", "2")
        line = next(line for line in said.splitlines() if line.startswith("python -m preprocess build"))
        assert main(shlex.split(line.partition("#")[0])[3:] + FLAGS) == 0
        dataset = road.data.with_name("data-dataset")
        grid = read_grid(dataset / GRID_FILE)
        assert len(grid) == load_manifest(dataset).records("train") == 4 * count
    write_image(road.data / "mine.png", 1, "not from there", draw_photo)
