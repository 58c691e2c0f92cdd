"""`subset`: from a folder or a dataset to a folder that `build` takes whole; nothing lost, nothing touched."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import FLAGS, options, read, write_image, write_photos
from PIL import Image
from wording import naming

from preprocess import PreprocessError
from preprocess.__main__ import main
from preprocess.build.build import build
from preprocess.build.journal import Journal
from preprocess.subset.candidates import SubsetOptions, gather
from preprocess.subset.subset import ABOUT, SHEET, subset


@pytest.fixture
def photos(tmp_path: Path, draw_photo) -> Path:
    return write_photos(tmp_path / "photos", 14, draw_photo)


def small(source: Path, output: Path, **more) -> SubsetOptions:
    values = {"count": 8, "resolution": 128, "workers": 2}
    return SubsetOptions(str(source), str(output), **(values | more))


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def left_out(about: dict) -> dict[str, str]:
    return {entry["key"]: entry["reason"] for entry in about["left_out"]}


def test_from_a_folder_to_a_dataset(photos, tmp_path, capsys):
    source = photos / "set0" / "p00.json"
    source.write_text(json.dumps({"caption": "photo number 0 of a dog", "id": 7, "tags": ["x", {"y": 1.5}]}))
    before = tree(photos)
    output = tmp_path / "gate"
    status = main(
        ["subset", "--input", str(photos), "--output", str(output), "--count", "14", "--resolution", "128",
         "--square"]
    )  # fmt: skip
    assert status == 0
    printed = capsys.readouterr().out
    assert tree(photos) == before
    assert {p.name for p in output.iterdir()} == {"set0", "set1", ".subset"}
    pictures = sorted(output.rglob("p*.png"))
    assert len(pictures) == 14
    for picture in pictures:
        with Image.open(picture) as image:
            assert (image.format, image.size, image.mode) == ("PNG", (128, 128), "RGB")
    caption = json.loads((output / "set0" / "p00.json").read_text())
    assert caption.pop("subset_of") == {
        "folder": str(photos),
        "key": "set0/p00.png",
        "sha256": hashlib.sha256((photos / "set0" / "p00.png").read_bytes()).hexdigest(),
    }
    assert caption == {"caption": "photo number 0 of a dog", "id": 7, "tags": ["x", {"y": 1.5}]}
    with Image.open(output / SHEET) as sheet:
        assert sheet.width > 168 * 10

    command = next(line for line in printed.splitlines() if line.startswith("python -m preprocess build"))
    assert main(shlex.split(command.partition("#")[0])[3:] + FLAGS) == 0
    found = read(tmp_path / "gate-dataset")
    assert {key.removesuffix(".png") for key in found} == {
        p.relative_to(output).with_suffix("").as_posix() for p in pictures
    }
    assert {record.latent.shape for record in found.values()} == {(16, 16, 16)}
    assert (tmp_path / "gate-dataset" / "rejects.jsonl").read_text() == ""


def test_without_square_pictures_have_the_size_that_build_gives_them(photos, tmp_path):
    output = tmp_path / "gate"
    about = subset(small(photos, output)).about
    build(options(output, tmp_path / "ds", holdout=0.0))
    for record in read(tmp_path / "ds").values():
        assert record.original_size == record.encoded_size  # build resizes nothing any more
    assert len({json.dumps(entry["file"]) for entry in about["chosen"]}) == 8


def test_the_pixels_are_those_of_the_build_of_the_source(photos, tmp_path):
    subset(small(photos, tmp_path / "gate", count=14))
    build(options(photos, tmp_path / "direct", holdout=0.0))
    build(options(tmp_path / "gate", tmp_path / "ds", holdout=0.0))
    direct, through = read(tmp_path / "direct"), read(tmp_path / "ds")
    assert direct.keys() == through.keys()
    for key, record in direct.items():
        assert (record.latent == through[key].latent).all(), key
        assert (record.vision == through[key].vision).all(), key


def test_a_dataset_gives_what_its_folder_gives_and_its_own_encoders(photos, tmp_path, capsys):
    build(options(photos, tmp_path / "ds"))
    capsys.readouterr()
    subset(small(tmp_path / "ds", tmp_path / "a"))
    command = next(line for line in capsys.readouterr().out.splitlines() if "preprocess build" in line)
    for flag, value in zip(FLAGS[::2], FLAGS[1::2]):
        assert f"{flag} {value}" in command
    subset(small(photos, tmp_path / "b"))
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert a.keys() == b.keys()
    assert {n for n in a if a[n] != b[n]} == {ABOUT}  # which names the input


def test_vectors_and_features_come_from_the_records(photos, tmp_path):
    vectors = tmp_path / "vectors"
    rng = np.random.default_rng(0)
    for image in photos.rglob("*.png"):
        path = vectors / f"{image.relative_to(photos)}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rng.normal(size=1024).astype(np.float32))
    build(options(photos, tmp_path / "ds", vision_embeddings=str(vectors)))
    pool = gather(small(tmp_path / "ds", tmp_path / "out").checked(), tmp_path, Journal(None))
    stored = read(tmp_path / "ds")
    assert len(pool.items) == 14
    for row, item in enumerate(pool.items):
        record = stored[item.key]
        np.testing.assert_array_equal(pool.features.vision[row], record.vision)
        mean = record.text.astype(np.float64).mean(0)
        np.testing.assert_allclose(pool.features.text[row], mean / np.linalg.norm(mean), atol=1e-12)
        assert np.linalg.norm(pool.features.light[row]) == pytest.approx(1, abs=1e-3)


def test_what_has_changed_since_the_build_is_left_out_and_told(photos, tmp_path, draw_photo, capsys):
    build(options(photos, tmp_path / "ds"))
    write_image(photos / "set0" / "p00.png", 99, "photo number 0 of a dog", draw_photo)
    (photos / "set1" / "p01.json").write_text('{"caption": "another"}')
    (photos / "set0" / "p02.png").unlink()
    write_image(photos / "set0" / "new.png", 50, "not in the dataset", draw_photo)
    capsys.readouterr()
    about = subset(small(tmp_path / "ds", tmp_path / "out", count=11)).about
    assert left_out(about) == {
        "set0/p00.png": "picture changed since the dataset was built",
        "set1/p01.png": "caption changed since the dataset was built",
        "set0/p02.png": "not in the input folder any more",
    }
    assert f"1 {left_out(about)['set0/p02.png']}" in capsys.readouterr().out
    assert about["pictures"] == 14 and about["candidates"] == 11


def test_a_damaged_record_is_left_out(photos, tmp_path):
    build(options(photos, tmp_path / "ds", shard_size=100, holdout=0.0))
    (shard,) = (tmp_path / "ds").glob("*.array_record-*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    about = subset(small(tmp_path / "ds", tmp_path / "out", count=13)).about
    assert list(left_out(about).values()) == ["damaged record"]


def test_pictures_that_moved(photos, tmp_path):
    build(options(photos, tmp_path / "ds"))
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(PreprocessError, match="--images DIR"):
        subset(small(tmp_path / "ds", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    about = subset(small(tmp_path / "ds", tmp_path / "out", images=str(tmp_path / "elsewhere"))).about
    assert about["images"] == str(tmp_path / "elsewhere") and len(about["chosen"]) == 8


def test_the_same_input_gives_the_same_bytes(photos, tmp_path):
    first = subset(small(photos, tmp_path / "a", workers=2))
    second = subset(small(photos, tmp_path / "b", workers=1))
    assert first.changed and second.changed
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    stamp = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    assert not subset(small(photos, tmp_path / "a")).changed
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == stamp
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "photos"]


def test_another_choice_takes_the_place_of_the_first(photos, tmp_path):
    subset(small(photos, tmp_path / "out", count=14))
    subset(small(photos, tmp_path / "out", count=5))
    subset(small(photos, tmp_path / "fresh", count=5))
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_too_few_are_an_error_that_says_how_many(photos, tmp_path, capsys):
    shutil.copy(photos / "set0" / "p00.png", photos / "copy.png")
    (photos / "copy.json").write_text('{"caption": "the same"}')
    (photos / "bad.png").write_bytes(b"not a picture")
    (photos / "bad.json").write_text('{"caption": "bad"}')
    arguments = ["subset", "--input", str(photos), "--output", str(tmp_path / "out"), "--resolution", "128"]
    assert main([*arguments, "--count", "15"]) == 1
    error = capsys.readouterr().err
    assert re.search(naming("--count 15", 14, 15, "1 copies", "1 not an image", "--allow-fewer"), error)
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--count", "15", "--allow-fewer"]) == 0
    about = json.loads((tmp_path / "out" / ABOUT).read_text())
    assert len(about["chosen"]) == 14
    assert left_out(about)["set0/p00.png"] == "the same picture as"  # copy.png comes first by name
    assert left_out(about)["bad.png"] == "not an image"


def test_couples_of_the_edit_come_first(tmp_path, draw_photo):
    for n in range(24):
        caption = f"person {n // 2} looking {'left' if n % 2 else 'right'}" if n < 8 else f"thing {n}"
        write_image(tmp_path / "photos" / f"p{n:02}.png", n, caption, draw_photo)
    about = subset(small(tmp_path / "photos", tmp_path / "out", count=16)).about
    assert about["couples"] == {"twins": 4, "all": 4}
    first = about["chosen"][:8]
    for one, other in zip(first[::2], first[1::2]):
        assert one["why"].endswith(other["file"]) and other["why"].endswith(one["file"])
        assert one["caption"].replace("left", "right") == other["caption"]
    edit = ("thing 8=>thing 9:up",)
    about = subset(small(tmp_path / "photos", tmp_path / "out", count=16, edit=edit)).about
    assert {entry["caption"] for entry in about["chosen"][:2]} == {"thing 8", "thing 9"}


def test_files_that_are_not_ours_are_not_lost(photos, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(PreprocessError, match=f"--output {output} "):
        subset(small(photos, output))
    (output / "thesis.txt").unlink()
    about = subset(small(photos, output)).about
    edited = output / Path(about["chosen"][0]["file"]).with_suffix(".json")
    edited.write_text('{"caption": "my better caption"}')
    with pytest.raises(PreprocessError, match=f"--output {output} .*{edited.name}"):
        subset(small(photos, output, count=5))
    assert "better" in edited.read_text()
    edited.unlink()
    (output / "extra.png").write_bytes(b"x")
    with pytest.raises(PreprocessError, match=f"--output {output} .*extra.png"):
        subset(small(photos, output, count=5))


@pytest.mark.parametrize("where", ["photos", "."])
def test_the_input_is_never_the_output(photos, tmp_path, where):
    build(options(photos, tmp_path / "elsewhere" / "ds"))
    before = tree(photos)
    for source in (photos, tmp_path / "elsewhere" / "ds"):
        with pytest.raises(PreprocessError, match="--output"):
            subset(small(source, tmp_path / where))
    assert tree(photos) == before


def test_names_that_would_meet(tmp_path, draw_photo):
    photos = tmp_path / "photos"
    for seed, name in enumerate(("a.png", "a.jpg", "b.v2.png")):
        write_image(photos / name, seed, "the same caption for both", draw_photo)
    with tarfile.open(photos / "more.tar", "w") as archive:
        for name, data in (
            ("deep/c.png", (photos / "a.png").read_bytes() + b"trailing"),
            ("deep/c.json", b'{"text": "from an archive", "caption": null, "n": 3}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    write_image(photos / "more.png", 9, "more", draw_photo)
    about = subset(small(photos, tmp_path / "out", count=4)).about
    assert {e["key"] for e in about["left_out"]} == {"more.tar/deep/c.png"}  # it looks like a.png
    (photos / "a.png").unlink()
    subset(small(photos, tmp_path / "out", count=4))
    build(options(tmp_path / "out", tmp_path / "ds", holdout=0.0))
    found = read(tmp_path / "ds")
    assert set(found) == {"a.png", "b.v2.png", "more.png", "more.tar/deep/c.png"}
    assert found["more.tar/deep/c.png"].caption == "from an archive"
    assert json.loads((tmp_path / "out" / "more.tar/deep/c.json").read_text())["n"] == 3


def test_two_pictures_of_one_name(tmp_path, draw_photo):
    for seed, name in enumerate(("a.png", "a.jpg", "b.png")):
        write_image(tmp_path / "photos" / name, seed, "the same caption for both", draw_photo)
    subset(small(tmp_path / "photos", tmp_path / "out", count=3))
    build(options(tmp_path / "out", tmp_path / "ds", holdout=0.0))
    assert set(read(tmp_path / "ds")) == {"a.png.png", "a.jpg.png", "b.png"}


def test_captions_of_a_named_field_are_used_and_the_other_is_kept(tmp_path, draw_photo):
    for seed in range(4):
        path = tmp_path / "photos" / f"{seed}.png"
        write_image(path, seed, None, draw_photo)
        path.with_suffix(".json").write_text(json.dumps({"caption": "short", "long": f"a long one {seed}"}))
    subset(small(tmp_path / "photos", tmp_path / "out", count=4, caption_field="long"))
    raw = json.loads((tmp_path / "out" / "2.json").read_text())
    assert (raw["caption"], raw["long"], raw["subset_of"]["caption"]) == (
        "a long one 2",
        "a long one 2",
        "short",
    )
    about = subset(small(tmp_path / "out", tmp_path / "again", count=2)).about
    again = json.loads((tmp_path / "again" / about["chosen"][0]["file"]).with_suffix(".json").read_text())
    assert again["subset_of"]["subset_of"]["folder"] == str(tmp_path / "photos")


def test_at_most_so_many_are_looked_at_and_edited_captions_among_them(tmp_path, draw_photo):
    for n in range(30):
        caption = f"person looking {'left' if n % 2 else 'right'}" if n < 6 else f"thing {n}"
        write_image(tmp_path / "photos" / f"p{n:02}.png", n, caption, draw_photo)
    about = subset(small(tmp_path / "photos", tmp_path / "out", candidates=12)).about
    assert (about["pictures"], about["candidates"]) == (30, 12)
    assert about["couples"]["twins"] == 2


@pytest.mark.parametrize(
    "more, named",
    [
        ({"count": 1}, ["--count", 1, 2]),
        ({"light_share": 1.5}, ["--light-share", 1.5]),
        ({"candidates": 3}, ["--candidates", 3, 8]),
        ({"resolution": 100, "square": True}, ["--resolution", 16, 100]),
        ({"edit": ("left to right",)}, ["--edit", "'left to right'"]),
        ({"images": "/tmp"}, ["--images", "dataset"]),
        ({"input": "/nowhere"}, ["--input", "/nowhere"]),
    ],
)
def test_impossible_options_are_named(photos, tmp_path, more, named):
    with pytest.raises(PreprocessError, match=naming(*named)):
        subset(dataclasses.replace(small(photos, tmp_path / "out"), **more))


def test_vectors_of_real_encoders_survive_an_interruption(photos, tmp_path, tiny_t5_dir, tiny_dino_dir):
    wanted = small(
        photos,
        tmp_path / "out",
        text_encoder=str(tiny_t5_dir),
        vision_encoder=str(tiny_dino_dir),
        device="cpu",
    ).checked()
    cache = tmp_path / "cache"
    cache.mkdir()
    first = gather(wanted, cache, Journal(None)).features
    files = sorted(cache.glob("*.npy"))
    assert len(files) == 28 and first.vision.shape == (14, 32) and first.text.shape == (14, 64)
    assert first.light.shape == (14, 1024)
    marked = next(path for path in files if np.load(path).shape == (32,))
    np.save(marked, np.full(32, 7, np.float32))
    second = gather(wanted, cache, Journal(None)).features
    assert (second.vision == 7).all(1).sum() == 1  # read from there and not made again
    marked.write_bytes(b"cut short")
    third = gather(wanted, cache, Journal(None)).features
    np.testing.assert_array_equal(third.vision, first.vision)


def test_a_killed_run_leaves_the_old_set_and_the_next_makes_the_new_one(photos, tmp_path):
    output, staging = tmp_path / "out", tmp_path / ".out.subset"
    subset(small(photos, output, count=4))
    before = tree(output)
    command = [sys.executable, "-m", "preprocess", "subset", "--input", str(photos), "--output", str(output)]
    command += ["--count", "14", "--resolution", "512"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(staging.glob("next/*/*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (staging / "next").exists()
    assert tree(output) == before
    subset(small(photos, output, count=14, resolution=512))
    subset(small(photos, tmp_path / "fresh", count=14, resolution=512))
    assert tree(output) == tree(tmp_path / "fresh") and not staging.exists()


def test_a_kill_between_the_two_renames_loses_nothing(photos, tmp_path):
    output, staging = tmp_path / "out", tmp_path / ".out.subset"
    subset(small(photos, output))
    staging.mkdir()
    output.rename(staging / "old")
    assert not subset(small(photos, output)).changed
    assert not staging.exists()


def test_it_needs_no_jax(tmp_path):
    code = "import sys, preprocess.subset.subset; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
