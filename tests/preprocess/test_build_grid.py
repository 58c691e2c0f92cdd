"""The grid of a gate set on its way through `build`: taken along with the records, never without or beyond them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from build_fixtures import FLAGS, contents, index, killed_before, made, options, read, write_photos
from subset_fixtures import save, small
from wording import lines_naming, naming

from fluxdit_jax.dataset.grid import GRID_FILE, INPUT_GRID, Place, read_grid, to_json, write_grid
from fluxdit_jax.dataset.manifest import INDEX, MANIFEST
from preprocess import PreprocessError
from preprocess.__main__ import main
from preprocess.build.build import Result, build
from preprocess.inspect.forecast import dry_run
from preprocess.inspect.verify import repair, verify
from preprocess.subset.subset import subset

NOTHING = (0, 0, 0)  # latents, captions, vectors
GONE = ("goes", GRID_FILE)  # a grid that goes is not put in its place


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, draw_photo) -> Path:
    """A folder with the gate set `set`, 16 pictures of 4 photographs, and the dataset `data` of it; read only."""
    folder = tmp_path_factory.mktemp("grid")
    write_photos(folder / "photos", 6, draw_photo)
    subset(small(folder / "photos", folder / "set"))
    build(options(folder / "set", folder / "data", holdout=0.0))
    return folder


@pytest.fixture
def scene(whole: Path, tmp_path: Path) -> Path:
    """A copy of one's own, built anew: the same dataset of another input."""
    for name in ("set", "data"):
        shutil.copytree(whole / name, tmp_path / name)
    built(tmp_path)
    return tmp_path


def built(scene: Path, replace: bool = False, **more: object) -> Result:
    return build(options(scene / "set", scene / "data", **({"holdout": 0.0} | more)), replace=replace)


def grid_of(scene: Path) -> dict[str, Place]:
    return read_grid(scene / "data" / GRID_FILE)


def test_it_is_taken_along(whole: Path) -> None:
    grid = grid_of(whole)
    assert len(grid) == 16 and grid == read_grid(whole / "set" / INPUT_GRID)
    assert grid.keys() == read(whole / "data").keys()
    assert len(set(grid.values())) == 16 and len({place.row for place in grid.values()}) == 8
    assert verify(whole / "data") == []
    assert not built(whole).changed, "the same again"


def test_a_folder_without_one_makes_none(tmp_path: Path, draw_photo) -> None:
    write_photos(tmp_path / "photos", 4, draw_photo)
    build(options(tmp_path / "photos", tmp_path / "data", holdout=0.0))
    assert not (tmp_path / "data" / GRID_FILE).exists() and read_grid(tmp_path / "data" / GRID_FILE) == {}
    write_grid(tmp_path / "photos" / INPUT_GRID, {"elsewhere.png": Place("a", "original", "none")})
    result = build(options(tmp_path / "photos", tmp_path / "data", holdout=0.0))
    assert not result.changed and not (tmp_path / "data" / GRID_FILE).exists(), "of none of its records"


def test_only_what_became_a_record_is_in_it(scene: Path) -> None:
    names = sorted(grid_of(scene))
    (scene / "set" / names[0]).write_bytes(b"no picture")
    (scene / "set" / names[5]).with_suffix(".json").unlink()
    (scene / "set" / names[9]).unlink()
    built(scene, replace=True, max_rejects=0.5)
    assert set(grid_of(scene)) == set(names) - {names[0], names[5], names[9]}
    assert grid_of(scene).keys() == read(scene / "data").keys()
    built(scene, replace=True, max_rejects=0.5, limit=5)
    assert grid_of(scene).keys() == read(scene / "data").keys() and len(grid_of(scene)) == 4
    assert verify(scene / "data") == []


def test_other_pictures_of_the_input_are_records_without_a_place(scene: Path, draw_photo) -> None:
    save(scene / "set" / "other.png", draw_photo(160, 160, 50), "not of the grid")
    assert made(built(scene).counts) == (1, 1, 1)
    assert "other.png" in read(scene / "data") and len(grid_of(scene)) == 16


def test_records_of_both_splits_are_in_it(scene: Path) -> None:
    built(scene, replace=True, holdout=0.4)
    assert {row["split"] for row in index(scene / "data")} == {"train", "holdout"}
    assert grid_of(scene).keys() == read(scene / "data").keys()


def test_it_comes_goes_and_changes_without_encoding(scene: Path) -> None:
    given, before = scene / "set" / INPUT_GRID, contents(scene / "data")
    text = given.read_text()
    given.unlink()
    result = built(scene)
    assert result.changed and made(result.counts) == NOTHING and not (scene / "data" / GRID_FILE).exists()
    assert verify(scene / "data") == [] and not built(scene).changed
    grid = {key: Place(place.photograph, place.view, f"{place.light}er") for key, place in read_grid_of(text).items()}
    write_grid(given, grid)
    result = built(scene)
    assert result.changed and made(result.counts) == NOTHING and grid_of(scene) == grid
    given.write_text(text)
    assert built(scene).changed and contents(scene / "data") == before


def read_grid_of(text: str) -> dict[str, Place]:
    return {key: Place(*place) for key, place in json.loads(text)["places"].items()}


DAMAGES = {
    "empty": "",
    "cut short": '{"places": {\n"a.png": ["a", "original",',
    "a list": '["a.png"]',
    "no places": '{"a.png": ["a", "original", "none"]}',
    "two words": '{"places": {"a.png": ["a", "original"]}}',
    "a number": '{"places": {"a.png": ["a", "original", 3]}}',
    "nothing": '{"places": {"a.png": null}}',
    "a place twice": '{"places": {"a.png": ["a", "original", "none"], "b.png": ["a", "original", "none"]}}',
    "another word": to_json({"a.png": Place("a", "original", "warm")}).replace("warm", "worm"),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_refused_before_anything_is_encoded(
    scene: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    (scene / "set" / INPUT_GRID).write_text(DAMAGES[damage])
    before = contents(scene / "data")
    arguments = ["build", "--input", str(scene / "set"), *FLAGS, "--resolution", "128", "--holdout", "0"]
    for output in ("data", "new"):
        capsys.readouterr()
        assert main([*arguments, "--output", str(scene / output), "--replace"]) == 1
        said = capsys.readouterr()
        assert re.search(naming(scene / "set" / INPUT_GRID), said.err), said.err
        assert "Traceback" not in said.err
    assert not (scene / "new" / ".build").exists()
    assert {name: (scene / "data" / name).read_bytes() for name in before} == before
    assert verify(scene / "data") == [] and not list((scene / "new").rglob("*.array_record*"))
    with pytest.raises(PreprocessError, match=naming(INPUT_GRID)):
        dry_run(options(scene / "set", scene / "dry"))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (c, n)
        for c in ("comes", "goes", "changes")
        for n in (INDEX, "build.json", GRID_FILE, MANIFEST)
        if (c, n) != GONE
    ],
)
def test_killed_while_it_publishes_it_is_there_when_continued(scene: Path, change: str, name: str) -> None:
    given = scene / "set" / INPUT_GRID
    text = given.read_text()
    if change == "comes":
        given.unlink()
        built(scene)
    whole_grid = read_grid_of(text)
    less = {key: whole_grid[key] for key in sorted(whole_grid)[1:]}
    wanted = {"comes": whole_grid, "goes": {}, "changes": less}[change]
    given.write_text(to_json(wanted))
    if change == "goes":
        given.unlink()
    with killed_before(scene / "data" / name):
        built(scene)
    assert not (scene / "data" / MANIFEST).exists()
    assert made(built(scene).counts) == NOTHING
    assert grid_of(scene) == wanted and (scene / "data" / GRID_FILE).exists() == bool(wanted)
    assert verify(scene / "data") == [] and not built(scene).changed


def test_a_killed_first_build_goes_on_to_the_same_grid(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "preprocess", "build", "--input", str(whole / "set"), *FLAGS]
    command += ["--output", str(tmp_path / "data"), "--resolution", "128", "--modulus", "16", "--holdout", "0"]
    command += ["--shard-size", "2", "--batch-size", "1", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("data/.build/*.parquet"))) < 2:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "data" / GRID_FILE).exists()
    build(options(whole / "set", tmp_path / "data", holdout=0.0, shard_size=2))
    assert read_grid(tmp_path / "data" / GRID_FILE) == grid_of(whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_a_damaged_one_and_repair_writes_it_anew(
    scene: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    before = contents(scene / "data")
    (scene / "data" / GRID_FILE).write_text(DAMAGES[damage])
    findings = verify(scene / "data")
    assert [finding.file for finding in findings] == [GRID_FILE]
    assert main(["verify", str(scene / "data")]) == 1
    capsys.readouterr()
    repair(scene / "data", {scene / "data": findings})
    assert "encoded 0 latents, 0 captions, 0 vision vectors" in capsys.readouterr().out
    assert verify(scene / "data") == [] and contents(scene / "data") == before


@pytest.mark.parametrize("kind", ["a tar in a folder", "a tar", "a table in a folder", "a table"])
def test_pictures_in_archives_and_tables_have_their_places(whole: Path, tmp_path: Path, kind: str) -> None:
    folder, table = tmp_path / "input", []
    folder.mkdir()
    places = read_grid(whole / "set" / INPUT_GRID)
    prefix = "all.tar/" if "tar" in kind else "pictures/"
    if "tar" in kind:
        with tarfile.open(folder / "all.tar", "w") as archive:
            for name in places:
                archive.add(whole / "set" / name, name)
                archive.add((whole / "set" / name).with_suffix(".json"), name.replace(".png", ".json"))
    for name in places if "table" in kind else ():
        (folder / prefix / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole / "set" / name, folder / prefix / name)
        caption = json.loads((whole / "set" / name).with_suffix(".json").read_text())["caption"]
        table.append(json.dumps({"file_name": prefix + name, "caption": caption}))
    if table:
        (folder / "metadata.jsonl").write_text("\n".join(table))
    write_grid(folder / INPUT_GRID, {prefix + name: place for name, place in places.items()})
    source = {"a tar": folder / "all.tar", "a table": folder / "metadata.jsonl"}.get(kind, folder)
    build(options(source, tmp_path / "data", holdout=0.0))
    assert read_grid(tmp_path / "data" / GRID_FILE) == {prefix + name: place for name, place in places.items()}
    assert read(tmp_path / "data").keys() == read_grid(tmp_path / "data" / GRID_FILE).keys()


def test_its_captions_may_repeat(scene: Path, capsys: pytest.CaptureFixture) -> None:
    """Each caption is that of all lights: in another folder that would be worth a warning."""
    capsys.readouterr()
    built(scene)
    said = capsys.readouterr().out
    assert lines_naming(said, "gate set", 4, "photographs") and "warning" not in said
    dry_run(options(scene / "set", scene / "dry"))
    assert not lines_naming(capsys.readouterr().out, "warning", "caption")
    (scene / "set" / INPUT_GRID).unlink()
    built(scene)
    said = capsys.readouterr().out
    assert "gate set" not in said and lines_naming(said, "warning", 16)
