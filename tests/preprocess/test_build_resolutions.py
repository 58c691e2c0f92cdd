"""`build --resolution 64,128`: several resolutions of one image set, made and kept as one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import FLAGS, contents, index, made, options, read, write_image, write_photos
from wording import lines_naming

from fluxdit_jax.dataset.manifest import DatasetError, load_manifest, parts_of
from fluxdit_jax.sampling.prompts import encode_reference, read_reference
from preprocess import PreprocessError, buckets
from preprocess.__main__ import main
from preprocess.build.build import Result, build, plan_only
from preprocess.build.options import Options
from preprocess.decoding import images

COUNT = 12
SIDES = (64, 128)


def several(photos: Path, output: Path, sides: tuple[int, ...] = SIDES, **more: object) -> Options:
    """A build of several resolutions; the modulus of the smallest is 16."""
    values = {"resolution": sides[-1], "resolutions": sides, "modulus": 16 * sides[-1] // sides[0]}
    return options(photos, output, **(values | more))


def one(photos: Path, output: Path, side: int, sides: tuple[int, ...] = SIDES, **more: object) -> Options:
    return options(photos, output, resolution=side, modulus=16 * side // sides[0], **more)


@pytest.fixture
def photos(tmp_path: Path, draw_photo) -> Path:
    return write_photos(tmp_path / "photos", COUNT, draw_photo)


@pytest.fixture
def built(photos: Path, tmp_path: Path) -> tuple[Path, Result]:
    return tmp_path / "data", build(several(photos, tmp_path / "data"))


def all_contents(output: Path) -> dict[str, dict[str, bytes]]:
    return {str(side): contents(folder) for side, folder in parts_of(output).items()}


def test_each_dataset_is_what_a_build_of_its_own_makes(photos: Path, tmp_path: Path, built, monkeypatch) -> None:
    """The largest byte by byte; of the others the latents, as their vision vectors are those of the largest."""
    output, result = built
    assert result.status == 0 and list(parts_of(output)) == list(SIDES) and len(result.manifests) == 2
    assert made(result.counts) == (2 * COUNT, COUNT, COUNT) and result.counts.pictures == COUNT
    build(one(photos, tmp_path / "alone" / "128", 128))
    assert contents(tmp_path / "alone" / "128") == contents(output / "128")
    build(one(photos, tmp_path / "alone" / "64", 64))
    alone, small, large = read(tmp_path / "alone" / "64"), read(output / "64"), read(output / "128")
    assert small.keys() == large.keys() == alone.keys()
    for key, record in small.items():
        assert np.array_equal(record.latent.view(np.uint16), alone[key].latent.view(np.uint16))
        assert np.array_equal(record.vision, large[key].vision)
        assert not np.array_equal(record.vision, alone[key].vision)
        assert np.array_equal(record.text.view(np.uint16), large[key].text.view(np.uint16))
        assert np.multiply(record.encoded_size, 2).tolist() == list(large[key].encoded_size)
    rows = [[(row["split"], row["key"], row["row"]) for row in index(output / str(side))] for side in SIDES]
    assert rows[0] == rows[1], "the same records in the same places"
    assert main(["verify", str(output)]) == 0


def test_a_picture_is_decoded_once(photos: Path, tmp_path: Path, monkeypatch) -> None:
    loads = []
    loaded = images._loaded
    monkeypatch.setattr(images, "_loaded", lambda *arguments: loads.append(1) or loaded(*arguments))
    build(several(photos, tmp_path / "data"))
    assert len(loads) == COUNT


@pytest.mark.parametrize("sides", [(256, 512, 1024), (512, 768, 1024), (256, 1024)])
def test_buckets_agree_at_all_resolutions(sides: tuple[int, ...]) -> None:
    parts = Options(input="in", output="out", resolution=sides[-1], resolutions=sides).checked().parts()
    assert [part.modulus for part in parts] == [buckets.default_modulus(side) for side in sides]
    draw = random.Random(0)
    for _ in range(500):
        height, width = draw.randint(64, 4000), draw.randint(64, 4000)
        found = [np.array(buckets.nearest(part.buckets(), height, width)) / part.resolution for part in parts]
        assert all((each == found[0]).all() for each in found)
        seen = {buckets.nearest(part.seen_buckets(), height, width) for part in parts}
        assert seen == {buckets.nearest(parts[-1].buckets(), height, width)}


def test_the_same_again_and_what_changed(built, photos: Path, draw_photo) -> None:
    output, _ = built
    before = all_contents(output)
    assert not build(several(photos, output)).changed
    assert main(["build", "--output", str(output)]) == 0, "options are those of the datasets"
    assert all_contents(output) == before
    (photos / "set0" / "p00.json").write_text(json.dumps({"caption": "another"}))
    write_image(photos / "set0" / "p04.png", 77, None, draw_photo)
    result = build(several(photos, output))
    assert made(result.counts) == (2, 1, 1) and result.changed
    assert main(["verify", str(output)]) == 0
    fresh = photos.parent / "fresh"
    build(several(photos, fresh / output.name))
    assert all_contents(fresh / output.name) == all_contents(output)


def test_a_resolution_is_added_to_a_finished_dataset(built, photos: Path, tmp_path: Path, capsys) -> None:
    """Only its latents are encoded; the vision vectors stay those of the resolution that was the largest."""
    output, _ = built
    before = all_contents(output)
    assert main(["build", "--output", str(output), "--resolution", "64,128,256"]) == 0
    assert lines_naming(capsys.readouterr().out, "encoded", COUNT, "latents", 0, "captions", "vision vectors")
    after = all_contents(output)
    assert after.keys() == {"64", "128", "256"} and {side: after[side] for side in before} == before
    assert main(["verify", str(output)]) == 0
    fresh = tmp_path / "fresh" / output.name
    build(several(photos, fresh, (64, 128, 256), vision_resolution=128))
    assert all_contents(fresh) == after


def test_a_dataset_of_one_resolution_becomes_one_of_several(photos: Path, tmp_path: Path) -> None:
    alone, output = tmp_path / "alone", tmp_path / "data"
    build(one(photos, alone, 128))
    with pytest.raises(PreprocessError, match="move it into a new folder"):
        build(several(photos, alone))
    output.mkdir()
    alone.rename(output / "128")
    before = {name: data for name, data in contents(output / "128").items() if name.endswith("parquet")}
    arguments = ["build", "--input", str(photos), "--output", str(output), "--resolution", "64,128", *FLAGS]
    assert main([*arguments, "--modulus", "32", "--holdout", "0.2", "--shard-size", "8"]) == 0
    rows, small = index(output / "128"), index(output / "64")
    assert len(before) == 1 and [row["vision_id"] for row in rows] == [row["vision_id"] for row in small]
    assert main(["verify", str(output)]) == 0


def test_outputs_that_hold_something_else(built, photos: Path, tmp_path: Path) -> None:
    output, _ = built
    before = all_contents(output)
    for sides in ((64, 256), (128, 256)):
        with pytest.raises(PreprocessError, match="leaves out"):
            build(several(photos, output, sides))
    with pytest.raises(PreprocessError, match=r"64, 128 px in folders.*data/128"):
        build(one(photos, output, 128))
    with pytest.raises(PreprocessError, match="--vision-resolution"):
        build(several(photos, output, vision_resolution=64))
    with pytest.raises(DatasetError, match=r"several resolutions \(64, 128 px\): name one"):
        load_manifest(output)
    assert all_contents(output) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolutions": (128, 64)}, "ascend"),
        ({"resolutions": (128,)}, "several"),
        ({"resolutions": (64, 64, 128)}, "ascend"),
        ({"modulus": 16}, "8 at 64 px"),
        ({"resolutions": (100, 128)}, "25 at 100 px"),
        ({"vision_resolution": 100}, "100 px"),
    ],
)
def test_resolutions_that_do_not_go_together(photos: Path, tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(PreprocessError, match=words):
        build(several(photos, tmp_path / "data", **changes))
    assert not (tmp_path / "data").exists()


def test_an_input_without_pictures_leaves_no_folders(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(PreprocessError, match="no image"):
        build(several(tmp_path / "photos", tmp_path / "data"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["build_log.jsonl"]


def test_the_dry_run_has_disk_and_time_of_all(photos: Path, tmp_path: Path, capsys) -> None:
    arguments = ["build", "--input", str(photos), "--output", str(tmp_path / "data"), *FLAGS, "--dry-run"]
    assert main([*arguments, "--resolution", "256,512"]) == 0
    said = capsys.readouterr().out
    assert lines_naming(said, "disk", "256 px", "512 px", "in all") and lines_naming(said, "time: about", COUNT)
    assert not (tmp_path / "data").exists()


def test_of_several_no_other_table_is_advised(photos: Path, tmp_path: Path, capsys) -> None:
    """A modulus or a resolution that keeps the shapes of one may be none for the others."""
    for more, advised in (({"resolution": 256}, True), ({"resolution": 256, "resolutions": (128, 256)}, False)):
        plan_only(options(photos, tmp_path / "x", modulus=128, **more), lambda *_: None)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "to keep their shape" in line)
        assert ("--modulus" in line or "--resolution" in line) == advised and "--fit crop" in line


def test_a_damaged_record_is_repaired_with_what_the_vision_encoder_saw(built) -> None:
    output, _ = built
    before = all_contents(output)
    shard = next((output / "64").glob("*.array_record*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(data)
    assert main(["verify", str(output)]) == 1
    assert main(["verify", str(output), "--repair"]) == 0
    assert all_contents(output) == before


def test_verify_misses_a_dataset_that_is_gone_and_one_of_other_pictures(built, photos: Path, capsys) -> None:
    output, _ = built
    other = photos.parent / "other"
    shutil.copytree(photos, other)
    (other / "set1" / "p01.json").write_text(json.dumps({"caption": "of another set"}))
    before = all_contents(output)
    shutil.rmtree(output / "64")
    assert main(["verify", str(output)]) == 1 and str(output / "64") in capsys.readouterr().err
    assert main(["build", "--output", str(output)]) == 0 and all_contents(output) == before
    shutil.rmtree(output / "64")
    build(options(other, output / "64", resolution=64, modulus=16, vision_resolution=128))
    capsys.readouterr()
    assert main(["verify", str(output)]) == 1
    assert lines_naming(capsys.readouterr().out, "caption differs", str(output / "128"))


@pytest.mark.slow
def test_killed_anywhere_it_comes_to_the_same_bytes(tmp_path: Path, draw_photo) -> None:
    photos, output = write_photos(tmp_path / "photos", 60, draw_photo), tmp_path / "data"
    whole = tmp_path / "whole" / "data"
    more = ["--holdout", "0.2", "--shard-size", "4", "--batch-size", "3", "--resolution", "64,128", "--modulus", "32"]
    assert main(["build", "--input", str(photos), "--output", str(whole), *FLAGS, *more]) == 0
    wanted = all_contents(whole)
    command = [sys.executable, "-m", "preprocess", "build", "--input", str(photos), "--output", str(output)]
    draw, kills = random.Random(1), 0
    for attempt in range(12):
        before = len(list(output.glob("*/.build/*.parquet")))
        process = subprocess.Popen([*command, *FLAGS, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while attempt < 8 and process.poll() is None:
            if len(list(output.glob("*/.build/*.parquet"))) > before:
                time.sleep(draw.uniform(0, 0.2))
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += process.wait() == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert process.returncode == 0 and kills > 2
    assert all_contents(output) == wanted and main(["verify", str(output)]) == 0
    assert not (output / ".build").exists()


def test_a_reference_is_shown_to_the_vision_encoder_as_the_pictures_were(built, photos: Path) -> None:
    output, _ = built
    small, large = (load_manifest(output / str(side)) for side in SIDES)
    assert (small.vision_resolution, large.vision_resolution) == (128, 0)
    records = read(output / "64")
    for key in ("set0/p00.png", "set1/p01.png", "set1/p03.png"):
        seen = [read_reference(photos / key, manifest)[0] for manifest in (small, large)]
        assert np.array_equal(seen[0], seen[1])
        assert np.array_equal(encode_reference(seen[0], small, None), records[key].vision)
