"""`build --condition NAME=DIR`: precomputed vectors beside the encoders' tensors, also of a dataset that exists."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import FLAGS, index, options, read, write_photos
from safetensors.torch import load
from wording import naming

from fluxdit_jax.dataset.grid import GRID_FILE, read_grid
from fluxdit_jax.dataset.manifest import INDEX, load_manifest
from preprocess import PreprocessError
from preprocess.__main__ import main
from preprocess.build.build import build
from preprocess.build.comparison import WouldLose
from preprocess.build.publish import load_options
from preprocess.inspect.export import export
from preprocess.inspect.verify import repair, verify

COUNT, WIDTH = 12, 5
SMALL = [*FLAGS, "--resolution", "128", "--modulus", "16", "--holdout", "0", "--shard-size", "8"]


def vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=WIDTH).astype(np.float32) * 4


def vector_path(folder: Path, number: int) -> Path:
    return folder / "pose" / f"set{number % 2}" / f"p{number:02}.npy"


@pytest.fixture
def scene(tmp_path: Path, draw_photo) -> Path:
    """A folder with `photos`, `pose`, and the dataset `data` without a condition."""
    write_photos(tmp_path / "photos", COUNT, draw_photo)
    for number in range(COUNT):
        vector_path(tmp_path, number).parent.mkdir(parents=True, exist_ok=True)
        np.save(vector_path(tmp_path, number), vector(number))
    assert main(["build", "--input", str(tmp_path / "photos"), "--output", str(tmp_path / "data"), *SMALL]) == 0
    return tmp_path


def with_pose(scene: Path, *more: str) -> int:
    return main(["build", "--output", str(scene / "data"), "--condition", f"pose={scene / 'pose'}", *more])


def counts(data: Path) -> dict:
    """Of the last build."""
    events = [json.loads(line) for line in (data / "build_log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "end"][-1]["counts"]


def test_a_condition_is_added_to_a_dataset_and_nothing_is_encoded_again(scene: Path) -> None:
    before = read(scene / "data")
    assert with_pose(scene) == 0
    assert counts(scene / "data")["made"] == {} and counts(scene / "data")["pictures"] == 0
    after = read(scene / "data")
    assert len(after) == COUNT
    for record in after.values():
        number = int(record.key[-6:-4])
        np.testing.assert_allclose(
            record.conditions["pose"], vector(number) / np.linalg.norm(vector(number)), rtol=1e-5
        )
        old = before[record.key]
        assert record.latent.tobytes() == old.latent.tobytes()
        assert all(record.conditions[name].tobytes() == array.tobytes() for name, array in old.conditions.items())
    assert verify(scene / "data") == []
    assert load_manifest(scene / "data").further() == ["pose"]
    assert load_options(scene / "data").condition == (f"pose={scene / 'pose'}",)


def test_one_changed_file_makes_one_record_anew(scene: Path) -> None:
    assert with_pose(scene) == 0
    ids = {row["key"]: row["pose_id"] for row in index(scene / "data")}
    np.save(vector_path(scene, 3), -vector(3))
    assert main(["build", "--output", str(scene / "data")]) == 0  # the condition need not be given again
    changed = {row["key"] for row in index(scene / "data") if row["pose_id"] != ids[row["key"]]}
    assert changed == {"set1/p03.png"} and counts(scene / "data")["made"] == {}
    record = read(scene / "data")["set1/p03.png"]
    np.testing.assert_allclose(record.conditions["pose"], -vector(3) / np.linalg.norm(vector(3)), rtol=1e-5)


def test_a_condition_is_not_lost_unasked(scene: Path) -> None:
    assert with_pose(scene) == 0
    without = options(scene / "photos", scene / "data", shard_size=8, holdout=0.0)
    with pytest.raises(WouldLose, match=naming(COUNT, "pose", "--replace")):
        build(without)
    assert load_manifest(scene / "data").further() == ["pose"]
    assert build(without, replace=True).manifest.further() == []
    assert verify(scene / "data") == []


def test_files_that_are_no_such_vectors_are_rejects(scene: Path) -> None:
    bad = {
        0: None,
        1: np.zeros(WIDTH, np.float32),
        2: np.ones(WIDTH + 1, np.float32),
        3: np.full(WIDTH, np.nan, np.float32),
        4: np.ones(WIDTH, np.int32),
        5: np.ones((2, WIDTH), np.float32),
    }
    for number, array in bad.items():
        if array is None:
            vector_path(scene, number).unlink()
        else:
            np.save(vector_path(scene, number), array)
    vector_path(scene, 6).write_bytes(b"\x93NUMPY rubbish")
    other = scene / "other"
    arguments = ["--input", str(scene / "photos"), "--output", str(other), *SMALL, "--max-rejects", "0.9"]
    assert main(["build", *arguments, "--condition", f"pose={scene / 'pose'}"]) == 0
    rejects = [json.loads(line) for line in (other / "rejects.jsonl").read_text().splitlines()]
    assert sorted(int(reject["key"][-6:-4]) for reject in rejects) == [0, 1, 2, 3, 4, 5, 6]
    assert len({reject["reason"] for reject in rejects}) == 6  # 2 and 5 have another shape
    assert len(read(other)) == COUNT - 7 and verify(other) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["pose"], ["pose", "NAME=DIR"]),
        (["pose="], ["pose=", "NAME=DIR"]),
        (["Pose={pose}"], ["Pose", "a-z"]),
        (["text={pose}"], ["text", "text encoder"]),
        (["vision={pose}"], ["vision", "--vision-embeddings"]),
        (["latent={pose}"], ["latent", "VAE"]),
        (["grid={pose}"], ["grid", "reserved"]),
        (["pose_id={pose}"], ["pose_id", "reserved"]),
        (["pose={pose}", "pose={pose}"], ["pose", "more than once"]),
        (["pose={pose}/nowhere"], ["nowhere"]),
        (["pose={photos}"], ["photos", "set0/p00.png.npy"]),
    ],
)
def test_an_option_that_cannot_be_is_named(scene: Path, given: list[str], words: list[str], capsys) -> None:
    before = (scene / "data" / "manifest.json").read_bytes()
    named = [each.format(pose=scene / "pose", photos=scene / "photos") for each in given]
    capsys.readouterr()
    assert main(["build", "--output", str(scene / "data"), *(f"--condition={each}" for each in named)]) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in ("--condition", *words)) and error.count("\n") == 1, error
    assert (scene / "data" / "manifest.json").read_bytes() == before


def test_an_index_is_written_anew_with_it(scene: Path) -> None:
    assert with_pose(scene) == 0
    before = {name: (scene / "data" / name).read_bytes() for name in ("manifest.json", INDEX)}
    (scene / "data" / INDEX).unlink()
    repair(scene / "data", {scene / "data": verify(scene / "data")})
    assert verify(scene / "data") == []
    assert {name: (scene / "data" / name).read_bytes() for name in before} == before


def test_it_is_exported_and_a_subset_takes_it_along(scene: Path, capsys) -> None:
    assert with_pose(scene) == 0
    (first, *_) = export(scene / "data", scene / "tars")
    with tarfile.open(first) as archive:
        tensors = load(archive.extractfile("000000000.safetensors").read())
    assert tensors.keys() == {"latent", "text", "vision", "pose"} and tensors["pose"].shape == (WIDTH,)
    capsys.readouterr()
    subset = ["--input", str(scene / "data"), "--output", str(scene / "set"), "--count", "4", "--resolution", "128"]
    assert main(["subset", *subset, "--lights", "2", "--square"]) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if "preprocess build" in line)
    assert main([word for word in command.split()[3:] if word]) == 0
    stored = read(scene / "data")
    chosen = json.loads((scene / "set" / ".subset" / "subset.json").read_text())["chosen"]
    keys = {one["photograph"]: one["key"] for one in chosen}
    of_set, grid = read(scene / "set-dataset"), read_grid(scene / "set-dataset" / GRID_FILE)
    assert len(of_set) == 16 and grid.keys() == of_set.keys()
    for key, place in grid.items():
        of_photograph = stored[keys[place.photograph]].conditions["pose"]
        np.testing.assert_array_equal(of_set[key].conditions["pose"], of_photograph)
    files = {path.name for path in (scene / "set/.subset/conditions/pose").rglob("*.npy")}
    assert files == {f"{Path(key).name}.npy" for key in grid}


def test_a_subset_needs_the_files_of_a_condition(scene: Path, capsys) -> None:
    assert with_pose(scene) == 0
    subset = ["subset", "--input", str(scene / "data"), "--output", str(scene / "set"), "--resolution", "128"]
    for number in range(COUNT - 1):
        vector_path(scene, number).unlink()
    capsys.readouterr()
    assert main([*subset, "--count", "4", "--lights", "2"]) == 1
    error = capsys.readouterr().err
    assert "pose" in error and ".npy" in error and "Traceback" not in error
    assert not (scene / "set").exists()


def test_a_vector_without_a_field_is_refused_by_the_library(scene: Path) -> None:
    with pytest.raises(PreprocessError, match=naming("--condition", "pose=")):
        build(options(scene / "photos", scene / "data", condition=("pose=",)))


def test_another_condition_leaves_those_that_are_there(scene: Path, capsys) -> None:
    assert with_pose(scene) == 0
    data = str(scene / "data")
    assert main(["build", "--output", data, "--condition", f"depth={scene / 'pose'}"]) == 0
    assert list(load_manifest(scene / "data").layout) == ["text", "vision", "depth", "pose"]
    assert main(["build", "--output", data, "--condition", "depth="]) == 1
    assert "--replace" in capsys.readouterr().err
    assert main(["build", "--output", data, "--condition", "depth=", "--replace"]) == 0
    assert list(load_manifest(scene / "data").layout) == ["text", "vision", "pose"]
