"""`subset`: from a folder or a dataset to a grid of pictures that `build` takes whole, with what each is."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import FLAGS, index, options, read, write_image, write_photos
from PIL import Image
from subset_fixtures import about, keys, left_out, pixels, sidecar, small, tree

from fluxdit_jax.dataset.grid import GRID_FILE, INPUT_GRID, Place, read_grid
from preprocess import PreprocessError
from preprocess.__main__ import main
from preprocess.build.build import build
from preprocess.inspect.verify import verify
from preprocess.subset.lights import LIGHTS, lit
from preprocess.subset.subset import ABOUT, SHEET, subset
from preprocess.subset.views import MIRRORED, ORIGINAL


@pytest.fixture
def photos(tmp_path: Path, draw_photo) -> Path:
    return write_photos(tmp_path / "photos", 14, draw_photo)


def test_from_a_folder_to_a_dataset(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = tree(photos)
    output = tmp_path / "gate"
    arguments = ["--input", str(photos), "--output", str(output), "--resolution", "128", "--square"]
    assert main(["subset", *arguments, "--count", "6", "--lights", "3"]) == 0
    printed = capsys.readouterr().out
    assert tree(photos) == before
    grid = read_grid(output / INPUT_GRID)
    assert len(grid) == 6 * 2 * 3
    chosen = keys(about(output))
    places = [
        Place(key.removesuffix(".png"), view, light.name)
        for key in chosen
        for view in (ORIGINAL, MIRRORED)
        for light in LIGHTS[:3]
    ]
    assert sorted(grid.values()) == sorted(places)
    files = {name.removesuffix(".png") + end for name in grid for end in (".png", ".json")}
    assert set(tree(output)) == files | {INPUT_GRID, ABOUT, SHEET}
    for name, place in grid.items():
        with Image.open(output / name) as image:
            assert (image.format, image.size, image.mode) == ("PNG", (128, 128), "RGB")
        number = int(place.photograph[-2:])
        side = "right" if place.view == MIRRORED else "left"
        assert sidecar(output, name) == {
            "caption": f"photo number {number} of a dog, looking {side}",
            "subset_of": {
                "folder": str(photos),
                "key": f"{place.photograph}.png",
                "sha256": hashlib.sha256((photos / f"{place.photograph}.png").read_bytes()).hexdigest(),
                "caption": f"photo number {number} of a dog",
            },
        }
    with Image.open(output / SHEET) as sheet:
        assert sheet.width > 6 * 112 and sheet.height > 6 * 112

    (command,) = (line for line in printed.splitlines() if line.startswith("python -m preprocess build"))
    assert main(shlex.split(command, comments=True)[3:] + FLAGS) == 0
    data = tmp_path / "gate-dataset"
    found = read(data)
    assert read_grid(data / GRID_FILE) == grid and found.keys() == grid.keys()
    assert {record.latent.shape for record in found.values()} == {(16, 16, 16)}
    assert (data / "rejects.jsonl").read_text() == "" and verify(data) == []


def test_every_picture_is_the_first_one_mirrored_and_lit(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "gate"
    subset(small(photos, output, count=3, lights=len(LIGHTS)))
    grid = read_grid(output / INPUT_GRID)
    assert len(grid) == 3 * 2 * len(LIGHTS)
    names = {place: name for name, place in grid.items()}
    for place, name in names.items():
        plain = pixels(output / names[Place(place.photograph, ORIGINAL, "none")])
        light = next(light for light in LIGHTS if light.name == place.light)
        wanted = lit(plain[:, ::-1] if place.view == MIRRORED else plain, light)
        np.testing.assert_array_equal(pixels(output / name), wanted)


def test_captions_name_no_light_and_differ_between_views_only(tmp_path: Path, draw_photo) -> None:
    for seed, caption in enumerate(("A man on the Left.", "a cat looking right", "A dog.", "a bright house")):
        write_image(tmp_path / "photos" / f"{seed}.png", seed, caption, draw_photo)
    output = tmp_path / "gate"
    subset(small(tmp_path / "photos", output, lights=5))
    captions: dict[tuple[str, str], set[str]] = {}
    for name, place in read_grid(output / INPUT_GRID).items():
        captions.setdefault(place.row, set()).add(sidecar(output, name)["caption"])
    assert captions == {
        ("0", ORIGINAL): {"A man on the Left."},
        ("0", MIRRORED): {"A man on the Right."},
        ("1", ORIGINAL): {"a cat looking right"},
        ("1", MIRRORED): {"a cat looking left"},
        ("2", ORIGINAL): {"A dog, looking left."},
        ("2", MIRRORED): {"A dog, looking right."},
        ("3", ORIGINAL): {"a bright house, looking left"},
        ("3", MIRRORED): {"a bright house, looking right"},
    }
    told = {one["photograph"]: one["captions"] for one in about(output)["chosen"]}
    assert told["2"] == {ORIGINAL: "A dog, looking left.", MIRRORED: "A dog, looking right."}


def test_the_edits_of_the_command_line_are_the_words(tmp_path: Path, draw_photo) -> None:
    for seed, caption in enumerate(("a man going uphill", "a barn facing the sea, left of a tree")):
        write_image(tmp_path / "photos" / f"{seed}.png", seed, caption, draw_photo)
    output = tmp_path / "gate"
    arguments = ["--input", str(tmp_path / "photos"), "--output", str(output), "--resolution", "128", "--count", "2"]
    edits = ["--edit", "walking east=>walking west", "--edit", "facing the sea=>facing the hills"]
    assert main(["subset", *arguments, "--lights", "2", *edits]) == 0
    told = {one["photograph"]: list(one["captions"].values()) for one in about(output)["chosen"]}
    assert told == {
        "0": ["a man going uphill, walking east", "a man going uphill, walking west"],
        "1": ["a barn facing the sea, left of a tree", "a barn facing the hills, right of a tree"],
    }


def test_without_mirrored_pictures_captions_stay(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "gate"
    arguments = ["--input", str(photos), "--output", str(output), "--resolution", "128", "--count", "4"]
    assert main(["subset", *arguments, "--no-mirror"]) == 0
    grid = read_grid(output / INPUT_GRID)
    assert len(grid) == 4 * 5 and {place.view for place in grid.values()} == {ORIGINAL}
    assert not [name for name in tree(output) if "mirrored" in name]
    for name, place in grid.items():
        assert sidecar(output, name)["caption"] == f"photo number {int(place.photograph[-2:])} of a dog"


def test_one_light_is_none(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "gate"
    subset(small(photos, output, lights=1))
    grid = read_grid(output / INPUT_GRID)
    assert len(grid) == 8 and {place.light for place in grid.values()} == {"none"}
    assert about(output)["lights_seen"] is None and about(output)["made"] == 8


def test_the_pixels_are_those_of_the_build_of_the_source(photos: Path, tmp_path: Path) -> None:
    subset(small(photos, tmp_path / "gate", count=8))
    build(options(photos, tmp_path / "direct", holdout=0.0))
    build(options(tmp_path / "gate", tmp_path / "ds", holdout=0.0))
    direct, through = read(tmp_path / "direct"), read(tmp_path / "ds")
    for key, place in read_grid(tmp_path / "ds" / GRID_FILE).items():
        record = through[key]
        assert record.original_size == record.encoded_size, "build resizes nothing any more"
        if (place.view, place.light) == (ORIGINAL, "none"):
            source = direct[f"{place.photograph}.png"]
            np.testing.assert_array_equal(record.latent, source.latent)
            np.testing.assert_array_equal(record.vision, source.vision)
    assert len({record.encoded_size for record in through.values()}) > 1


def test_a_dataset_gives_what_its_folder_gives_and_its_own_encoders(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    build(options(photos, tmp_path / "ds"))
    capsys.readouterr()
    subset(small(tmp_path / "ds", tmp_path / "a"))
    command = next(line for line in capsys.readouterr().out.splitlines() if "preprocess build" in line)
    for flag, value in zip(FLAGS[::2], FLAGS[1::2]):
        assert f"{flag} {value}" in command
    subset(small(photos, tmp_path / "b"))
    a, b = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert a.keys() == b.keys()
    assert {name for name in a if a[name] != b[name]} == {ABOUT}  # which names the input


def test_the_dataset_decides_what_is_chosen_from(photos: Path, tmp_path: Path, draw_photo) -> None:
    """Pictures that were not taken into it are not looked at, and what has changed since is left out and told."""
    (photos / "set1" / "p13.json").unlink()
    build(options(photos, tmp_path / "ds", max_rejects=0.5))
    write_image(photos / "set0" / "p00.png", 99, "photo number 0 of a dog", draw_photo)
    (photos / "set1" / "p01.json").write_text('{"caption": "another caption"}')
    (photos / "set1" / "p13.json").write_text('{"caption": "has one now"}')
    (photos / "set0" / "p02.png").unlink()
    write_image(photos / "set0" / "new.png", 50, "not in the dataset", draw_photo)
    told = subset(small(tmp_path / "ds", tmp_path / "out", count=11)).about
    assert left_out(told) == {
        "set0/p00.png": "picture changed since the dataset was built",
        "set0/p02.png": "not in the input folder any more",
    }
    assert (told["pictures"], told["candidates"]) == (13, 11)
    captions = {one["key"]: one["captions"][ORIGINAL] for one in told["chosen"]}
    assert captions["set1/p01.png"] == "another caption, looking left", "of the folder as it is"


def test_a_dataset_of_several_resolutions_at_another_one(photos: Path, tmp_path: Path) -> None:
    """Its vision encoder saw another size, which is of no matter here."""
    build(options(photos, tmp_path / "data", resolutions=(128, 256), resolution=256, modulus=32))
    told = about(subset(small(tmp_path / "data" / "128", tmp_path / "out", resolution=192, square=True)).output)
    assert told["pictures"] == 14


def test_pictures_that_moved(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "ds"))
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(PreprocessError, match="--images DIR"):
        subset(small(tmp_path / "ds", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    told = subset(small(tmp_path / "ds", tmp_path / "out", images=str(tmp_path / "elsewhere"))).about
    assert told["images"] == str(tmp_path / "elsewhere") and len(told["chosen"]) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(PreprocessError, match="--images DIR"):
        subset(small(tmp_path / "ds", tmp_path / "out", images=str(tmp_path / "empty")))


def test_vectors_of_a_dataset_that_came_from_files(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Pictures under a light have none, so that the lights are not measured unless an encoder is named."""
    rng = np.random.default_rng(0)
    for image in photos.rglob("*.png"):
        path = tmp_path / "vectors" / f"{image.relative_to(photos)}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rng.normal(size=1024).astype(np.float32))
    build(options(photos, tmp_path / "ds", vision_encoder="", vision_embeddings=str(tmp_path / "vectors")))
    capsys.readouterr()
    told = subset(small(tmp_path / "ds", tmp_path / "out")).about
    assert told["lights_seen"] is None and told["vision_encoder"] == ""
    said = capsys.readouterr().out
    assert "lights: not measured" in said and "--vision-encoder" not in said.partition("preprocess build")[2]
    told = subset(small(tmp_path / "ds", tmp_path / "out", vision_encoder="builtin:tone")).about
    assert told["lights_seen"]["chance"] == 0.5 and told["vision_encoder"] == "builtin:tone"


def test_captions_of_a_named_field_an_archive_and_a_table(tmp_path: Path, draw_photo) -> None:
    folder = tmp_path / "photos"
    for seed in range(2):
        write_image(folder / f"{seed}.png", seed, None, draw_photo)
        fields = {"caption": "short", "long": f"a long one {seed}"}
        (folder / f"{seed}.json").write_text(json.dumps(fields))
    write_image(tmp_path / "member.png", 2, None, draw_photo)
    (tmp_path / "member.txt").write_text("from an archive")
    with tarfile.open(folder / "more.tar", "w") as archive:
        for end in (".png", ".txt"):
            archive.add(tmp_path / f"member{end}", f"deep/c{end}")
    write_image(folder / "d.png", 3, None, draw_photo)
    (folder / "metadata.jsonl").write_text('{"file_name": "d.png", "long": "from a table"}\n')
    output = tmp_path / "out"
    told = subset(small(folder, output, caption_field="long", mirror=False)).about
    assert {one["photograph"]: one["captions"][ORIGINAL] for one in told["chosen"]} == {
        "0": "a long one 0",
        "1": "a long one 1",
        "more.tar/deep/c": "from an archive",
        "d": "from a table",
    }
    build(options(output, tmp_path / "ds", holdout=0.0))
    assert read_grid(tmp_path / "ds" / GRID_FILE).keys() == read(tmp_path / "ds").keys()
    assert read(tmp_path / "ds")["more.tar/deep/c.warm.png"].caption == "from an archive"


def test_a_set_of_a_set_and_of_several_captions(photos: Path, tmp_path: Path) -> None:
    (photos / "set0" / "p00.json").write_text(json.dumps({"caption": ["first", "second"]}))
    told = subset(small(photos, tmp_path / "a", count=14, mirror=False, lights=1)).about
    assert told["several_captions"] == 1
    again = subset(small(tmp_path / "a", tmp_path / "b", count=2, mirror=False)).about
    name = again["chosen"][0]["photograph"]
    source = sidecar(tmp_path / "b", f"{name}.warm.png")["subset_of"]
    assert source["folder"] == str(tmp_path / "a") and source["key"] == f"{name}.png"
    build(options(tmp_path / "a", tmp_path / "ds", holdout=0.0))
    captions = {row["key"]: row["caption"] for row in index(tmp_path / "ds")}
    assert captions["set0/p00.none.png"] == "first"


def test_at_most_so_many_are_looked_at_and_captions_with_words_among_them(
    tmp_path: Path, draw_photo, capsys: pytest.CaptureFixture
) -> None:
    for n in range(30):
        caption = f"person {n} looking {'left' if n % 2 else 'right'}" if n < 6 else f"thing {n}"
        write_image(tmp_path / "photos" / f"p{n:02}.png", n, caption, draw_photo)
    told = subset(small(tmp_path / "photos", tmp_path / "out", count=12, lights=1, candidates=12)).about
    assert (told["pictures"], told["candidates"], told["own_words"]) == (30, 12, 6)
    assert "(--candidates)" in capsys.readouterr().out
    told = subset(small(tmp_path / "photos", tmp_path / "out", count=8, lights=1, candidates=8)).about
    assert told["own_words"] >= 4, "half of those that are looked at"


def test_a_real_vision_encoder_is_asked(photos: Path, tmp_path: Path, tiny_dino_dir: Path) -> None:
    told = subset(small(photos, tmp_path / "out", vision_encoder=str(tiny_dino_dir), device="cpu")).about
    assert told["vision_encoder"].endswith(tiny_dino_dir.name)
    assert set(told["lights_seen"]["retrieved"]) == {"none", "warm"} and told["lights_seen"]["strength"] > 0


def test_it_needs_no_jax() -> None:
    code = "import sys, preprocess.subset.subset; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
