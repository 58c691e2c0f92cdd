"""`build` into a dataset that exists: nothing of it goes without `--replace`, and what is left out is as before."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from build_fixtures import FLAGS, contents, index, options, read, write_image, write_photos
from wording import lines_naming, naming, numbers

from fluxdit_jax.dataset.manifest import load_manifest
from preprocess.__main__ import main
from preprocess.build import repeat
from preprocess.build.build import build
from preprocess.build.comparison import WouldLose
from preprocess.inspect.verify import repair, verify

COUNT = 12
SMALL = [*FLAGS, "--resolution", "128", "--modulus", "16", "--holdout", "0", "--shard-size", "8"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, draw_photo) -> Path:
    """A folder with `photos` and the dataset `data` of them."""
    folder = tmp_path_factory.mktemp("first")
    write_photos(folder / "photos", COUNT, draw_photo)
    assert main(["build", "--input", str(folder / "photos"), "--output", str(folder / "data"), *SMALL]) == 0
    return folder


def alone(*values: int) -> str:
    """A pattern of a line with these numbers and no others."""
    return rf"^[^\d\n]*{numbers(*values)}[^\d\n]*$"


class Scene:
    """A copy of the first build, in which `photos` and `data` may be changed."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture) -> None:
        self.photos, self.data = folder / "photos", folder / "data"
        self._capsys = capsys
        self.before = self.files()

    def files(self) -> dict[str, bytes]:
        return contents(self.data) if self.data.exists() else {}

    def build(self, *more: str, status: int = 0) -> str:
        self._capsys.readouterr()
        found = main(["build", "--output", str(self.data), *more])
        captured = self._capsys.readouterr()
        said = captured.out + captured.err
        assert found == status, said
        return said

    def ended(self, *more: str) -> dict[str, Any]:
        """What the log says of a build at its end."""
        self.build(*more)
        lines = (self.data / "build_log.jsonl").read_text().splitlines()
        return next(line for line in map(json.loads, reversed(lines)) if line["event"] == "end")

    def refused(self, *more: str) -> str:
        said = self.build(*more, status=1)
        kept = {name: data for name, data in self.files().items() if name != ".build"}
        assert kept == self.before and "--replace" in said and str(self.data) in said
        assert verify(self.data) == []
        return said


@pytest.fixture
def scene(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Scene:
    shutil.copytree(first / "photos", tmp_path / "photos")
    shutil.copytree(first / "data", tmp_path / "data")
    raw = json.loads((tmp_path / "data" / "build.json").read_text())["options"]
    chosen = repeat.Options(**(raw | {"input": str(tmp_path / "photos"), "output": str(tmp_path / "data")}))
    repeat.save_options(tmp_path / "data" / "build.json", chosen)
    return Scene(tmp_path, capsys)


# -------------------------------------------------------------------------------------------------- refusals


def test_a_trial_with_a_limit_loses_nothing(scene: Scene) -> None:
    said = scene.refused("--limit", "4")
    assert lines_naming(said, 8, "--limit 4") and "--limit 0" in said
    assert "--limit 11" in scene.refused("--limit", "11"), "one record, and an option that differs"
    scene.build("--limit", "4", "--replace")
    assert len(index(scene.data)) == 4
    assert lines_naming(scene.build(), "--limit 4", 8), "the limit is the dataset's"
    scene.build("--limit", "0")
    assert len(index(scene.data)) == COUNT, "to grow needs no permission"


def test_a_wrong_input_and_a_half_mounted_one(scene: Scene, draw_photo) -> None:
    other = write_photos(scene.photos.parent / "other", 3, draw_photo)
    write_image(other / "new.png", 40, "new", draw_photo)
    said = scene.refused("--input", str(other))
    assert lines_naming(said, 9, "set0/p04.png") and str(other) in said and str(scene.photos) in said
    shutil.move(scene.photos / "set0", scene.photos.parent / "aside")
    assert lines_naming(scene.refused(), 6, "set0/p00.png")
    (scene.photos / "set0").mkdir()
    for path in sorted((scene.photos.parent / "aside").glob("*.png")):
        shutil.copy(path, scene.photos / "set0")
    assert lines_naming(scene.refused(), 6, "no caption")
    for path in sorted((scene.photos.parent / "aside").glob("*.json")):
        shutil.copy(path, scene.photos / "set0")
    assert not scene.ended()["changed"]


def test_other_pictures_under_the_same_names(scene: Scene, draw_photo) -> None:
    for number, path in enumerate(sorted(scene.photos.rglob("*.png"))):
        write_image(path, number + 300, None, draw_photo)
    assert lines_naming(scene.refused(), COUNT, "image", "set0/p00.png")
    made = scene.ended("--replace")["counts"]["made"]
    assert (made["latent"], made.get("text", 0)) == (COUNT, 0)


def test_all_captions_may_be_written_anew(scene: Scene) -> None:
    for path in scene.photos.rglob("*.json"):
        path.write_text(json.dumps({"caption": f"another caption of {path.name}"}))
    said = scene.build("--dry-run")
    assert re.search(numbers(0, 0, COUNT, 0), said) and lines_naming(said, COUNT, "caption", "set0/p00.png")
    made = scene.ended()["counts"]["made"]
    assert (made.get("latent", 0), made["text"]) == (0, COUNT)


@pytest.mark.parametrize(
    ("given", "was"),
    [
        (("--resolution", "96"), "--resolution 128"),
        (("--modulus", "32"), "--modulus 16"),
        (("--fit", "crop"), "--fit resize"),
        (("--holdout", "0.3"), "--holdout 0.0"),
        (("--shard-size", "5"), "--shard-size 8"),
        (("--max-tokens", "4"), "--max-tokens 512"),
        (("--max-aspect", "2"), "--max-aspect 4.0"),
        (("--dtype", "bfloat16"), "--dtype auto"),
    ],
)
def test_an_option_that_differs_is_named_with_both_values(scene: Scene, given: tuple, was: str) -> None:
    said = scene.refused(*given)
    assert was in said and f"{given[0]} {given[1]}" in said


def test_other_encoders_and_another_reading(scene: Scene, tiny_t5_dir: Path) -> None:
    said = scene.refused("--text-encoder", str(tiny_t5_dir), "--device", "cpu")
    assert lines_naming(said, COUNT, "text encoder", "set0/p00.png") and "builtin:hash" in said
    for path in scene.photos.rglob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt": "other words"}))
    assert "--caption-field prompt" in scene.refused("--caption-field", "prompt")


# --------------------------------------------------------------------------------- what is left out is as before


def test_the_output_alone_repeats_its_build_anywhere(scene: Scene, monkeypatch: pytest.MonkeyPatch, draw_photo) -> None:
    monkeypatch.chdir(scene.photos)
    assert not scene.ended()["changed"] and scene.files() == scene.before
    write_image(scene.photos / "more.png", 50, "one more", draw_photo)
    (scene.photos / "set1" / "p03.json").unlink()
    (scene.photos / "set1" / "p03.png").unlink()
    said = scene.build()
    assert re.search(numbers(12, 11, 1, 0, 1), said), said
    assert re.search(alone(1, 1), said, re.M) and lines_naming(said, 1, 12, "set1/p03.png")
    assert load_manifest(scene.data).resolution == 128


def test_a_moved_input_is_taken_if_nothing_is_missing_in_it(scene: Scene) -> None:
    moved = scene.photos.rename(scene.photos.parent / "moved")
    assert str(scene.photos) in scene.build(status=1)
    assert scene.ended("--input", str(moved))["changed"], "build.json says where"
    assert not scene.ended()["changed"]
    (moved / "set0" / "p00.png").unlink()
    again = moved.rename(scene.photos)
    assert str(again) in scene.build("--input", str(again), status=1)


def test_without_a_dataset_an_input_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["build", "--output", str(tmp_path / "data")]) == 1
    assert "--input is needed" in capsys.readouterr().err and not (tmp_path / "data").exists()


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_dataset_that_does_not_store_its_options(scene: Scene, how: str) -> None:
    path = scene.data / "build.json"
    path.unlink() if how == "missing" else path.write_text('{"options": {}, "checksum": "0"}')
    assert re.search(naming("--input", str(scene.data), path.name), scene.build(status=1))
    same = ("--input", str(scene.photos), "--holdout", "0", "--shard-size", "8")
    assert "--resolution 128" in scene.build(*same, "--resolution", "96", status=1)
    assert re.search(numbers(COUNT, COUNT, 0, 0, 0), scene.build(*same))
    assert repeat.load_options(scene.data).input == str(scene.photos)


# ------------------------------------------------------------------------------------------- dry run, interruption


def tree(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_compares_and_writes_nothing(scene: Scene, draw_photo) -> None:
    write_image(scene.photos / "more.png", 50, "one more", draw_photo)
    (scene.photos / "set0" / "p00.json").write_text('{"caption": "edited"}')
    (scene.photos / "set1" / "p03.png").unlink()
    before = tree(scene.data.parent)
    said = scene.build("--dry-run")
    assert re.search(numbers(12, 10, 1, 1, 1), said) and re.search(alone(1, 2), said, re.M)
    assert lines_naming(said, 1, "caption", "set0/p00.png") and lines_naming(said, 1, 12, "set1/p03.png")
    assert "--replace" not in said
    said = scene.build("--dry-run", "--resolution", "256")
    assert "--replace" in said and lines_naming(said, 11, "size", "set0/p00.png")
    assert "--replace" not in scene.build("--dry-run", "--resolution", "256", "--replace")
    scene.build("--dry-run", "--input", str(scene.photos), "--output", str(scene.photos / "out"), *SMALL)
    scene.build("--dry-run", "--input", str(scene.photos), "--max-aspect", "1.01", "--min-side", "9000", status=1)
    assert tree(scene.data.parent) == before
    scene.build("--dry-run", "--draw", str(scene.data.parent / "plan.png"))
    assert set(tree(scene.data.parent)) - set(before) == {str(scene.data.parent / "plan.png")}


def test_a_copy_is_new_and_a_renamed_picture_is_kept(scene: Scene) -> None:
    shutil.copy(scene.photos / "set0" / "p00.png", scene.photos / "set0" / "copy.png")
    shutil.copy(scene.photos / "set0" / "p00.json", scene.photos / "set0" / "copy.json")
    said = scene.build("--dry-run")
    assert re.search(numbers(COUNT + 1, COUNT, 1, 0, 0), said)
    assert re.search(alone(0, 0), said, re.M)
    for suffix in (".png", ".json"):
        (scene.photos / "set0" / f"copy{suffix}").unlink()
        (scene.photos / "set0" / f"p00{suffix}").rename(scene.photos / "set0" / f"renamed{suffix}")
    assert re.search(numbers(COUNT, COUNT, 0), scene.build("--dry-run"))


def test_a_dry_run_tells_of_too_many_rejects(scene: Scene, draw_photo) -> None:
    for number in range(3):
        write_image(scene.photos / f"mute{number}.png", 40 + number, None, draw_photo)
    said = scene.build("--dry-run")
    assert re.search(numbers(3, 3, 15, 20.0), said) and "--max-rejects 0.2" in said
    scene.build("--max-rejects", "0.2")


def test_a_dry_run_with_encoders_that_are_not_here(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken to be those that the dataset was built with, where the names are the same."""
    text = (scene.data / "build.json").read_text()
    chosen = repeat.Options(**(json.loads(text)["options"] | {"text_encoder": "owner/t5"}))
    repeat.save_options(scene.data / "build.json", chosen)
    assert re.search(numbers(COUNT, COUNT, 0, 0, 0), scene.build("--dry-run"))
    said = scene.build("--dry-run", "--text-encoder", "owner/other")
    assert re.search(numbers(COUNT, 0, 0, COUNT), said) and "--replace" in said


DIES = """
import os, sys
from pathlib import Path
from preprocess.__main__ import main
from preprocess.build import parts

class Dies(parts.Existing):
    def add(self, rows):
        super().add(rows)
        if len(list(Path(sys.argv[2]).glob(".build/*.parquet"))) >= int(sys.argv[1]):
            os._exit(9)

parts.Existing = Dies
sys.exit(main(["build", "--output", *sys.argv[2:]]))
"""


def interrupt(output: Path, *arguments: str, after: int) -> None:
    """Runs a build in a process of its own, which dies when it has finished some units."""
    command = [sys.executable, "-c", DIES, str(after), str(output), *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr


def test_an_interrupted_first_build(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scene = Scene(tmp_path, capsys)
    given = ("--input", str(first / "photos"), *SMALL, "--shard-size", "4")
    interrupt(scene.data, *given, after=1)
    done = len(list(scene.data.glob(".build/*.parquet")))
    assert done
    before = tree(tmp_path)
    said = scene.build("--dry-run")
    assert tree(tmp_path) == before
    again = scene.build()
    (line,) = (line for line in again.splitlines() if re.match(numbers(COUNT, 0), line))
    finished, new, changed = map(int, re.findall(r"\d+", line)[2:5])
    assert finished and finished + new == COUNT and not changed
    assert line in said and "--resolution 128" in again
    assert verify(scene.data) == [] and len(read(scene.data)) == COUNT


def test_an_interrupted_replacement_goes_on_by_the_output_alone(scene: Scene) -> None:
    interrupt(scene.data, "--resolution", "96", "--replace", after=1)
    assert load_manifest(scene.data).resolution == 128, "not before it is complete"
    assert "--resolution 128" in scene.build("--resolution", "64", status=1)
    said = scene.build()
    assert "--resolution 96" in said and load_manifest(scene.data).resolution == 96
    assert "--resolution 96" in scene.build("--resolution", "128", status=1)


# ------------------------------------------------------------------------------------------------------ repair


def test_repair_keeps_sound_records_whose_pictures_are_gone(scene: Scene) -> None:
    shutil.move(scene.photos / "set0", scene.photos.parent / "aside")
    shard = scene.data / index(scene.data)[0]["shard"]
    data = bytearray(shard.read_bytes())
    data[70_000] ^= 1
    shard.write_bytes(data)
    findings = verify(scene.data)
    assert findings
    with pytest.raises(WouldLose, match=naming(6, "set0/p00.png")):
        repair(scene.data, {scene.data: findings})
    assert verify(scene.data) == findings, "the manifest is back"
    shutil.move(scene.photos.parent / "aside", scene.photos / "set0")
    repair(scene.data, {scene.data: findings})
    assert verify(scene.data) == [] and scene.files() == scene.before


def test_what_is_damaged_everywhere_is_encoded_again_unasked(scene: Scene) -> None:
    for shard in scene.data.glob("*.array_record*"):
        shard.write_bytes(b"")
    assert lines_naming(scene.build(), COUNT, "damaged")
    assert verify(scene.data) == [] and scene.files() == scene.before


def test_the_library_asks_as_the_command_line_does(scene: Scene, tmp_path: Path) -> None:
    chosen = options(scene.photos, tmp_path / "again")
    build(chosen)
    with pytest.raises(Exception, match="--fit crop"):
        build(options(scene.photos, tmp_path / "again", fit="crop"))
    assert build(options(scene.photos, tmp_path / "again", fit="crop"), replace=True).changed
