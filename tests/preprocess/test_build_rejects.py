"""What `build` rejects or refuses, with its reason: pictures, encoders' values, impossible wishes, a second build."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import assert_as_fresh, index, options, read, write_image, write_photos
from PIL import Image
from wording import lines_naming, naming

import preprocess.build.build
from fluxdit_jax.dataset.manifest import MANIFEST, REJECTS
from preprocess import PreprocessError
from preprocess.build.build import build
from preprocess.build.lock import locked
from preprocess.inspect.verify import verify


@pytest.fixture
def photos(tmp_path: Path, draw_photo) -> Path:
    return write_photos(tmp_path / "photos", 24, draw_photo)


def test_a_and_a_do_not_collide_and_copies_are_reported(
    photos: Path, tmp_path: Path, draw_photo, capsys: pytest.CaptureFixture
) -> None:
    image = Image.fromarray(draw_photo(160, 160, 500))
    image.save(photos / "a.png")
    image.save(photos / "a.jpg")
    (photos / "a.txt").write_text("the same words for both")
    shutil.copy(photos / "set0" / "p00.png", photos / "copy.png")
    (photos / "copy.txt").write_text("a copy")
    build(options(photos, tmp_path / "data"))
    found = read(tmp_path / "data")
    assert found["a.png"].content_hash != found["a.jpg"].content_hash
    assert found["copy.png"].content_hash == found["set0/p00.png"].content_hash
    rows = {r["key"]: r["split"] for r in index(tmp_path / "data")}
    assert rows["copy.png"] == rows["set0/p00.png"]
    assert lines_naming(capsys.readouterr().out, 1, "copy.png", "set0/p00.png")


def test_bad_inputs_are_rejected_with_their_reason(
    photos: Path, tmp_path: Path, draw_photo, capsys: pytest.CaptureFixture
) -> None:
    before = {p: p.read_bytes() for p in photos.rglob("*") if p.is_file()}
    (photos / "empty.png").write_bytes(b"")
    (photos / "empty.txt").write_text("zero bytes")
    good = (photos / "set0" / "p02.png").read_bytes()
    (photos / "cut.png").write_bytes(good[: len(good) // 2])
    (photos / "cut.txt").write_text("cut in the middle")
    write_image(photos / "mute.png", 51, None, draw_photo)
    result = build(options(photos, tmp_path / "data", max_rejects=0.2))
    lines = [json.loads(line) for line in (tmp_path / "data" / REJECTS).read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [
        ("cut.png", "damaged image"),
        ("empty.png", "zero bytes"),
        ("mute.png", "no caption"),
    ]
    assert all(Path(line["file"]).exists() for line in lines)
    assert result.status == 0 and result.manifest.rejects == 3 and len(read(tmp_path / "data")) == 24
    assert verify(tmp_path / "data") == []
    assert {p: p.read_bytes() for p in before} == before, "sources are never touched"
    assert build(options(photos, tmp_path / "data", max_rejects=0.1)).status == 3
    assert "(--max-rejects 0.1)" in capsys.readouterr().out
    assert_as_fresh(photos, tmp_path / "data", tmp_path)


def test_a_file_that_changes_between_plan_and_encoding(
    photos: Path, tmp_path: Path, draw_photo, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    """It is not stored under the hash of what was there before; the same command again takes it."""
    key, tell = "set1/p03.png", preprocess.build.build.report_plan

    def change(*arguments: object, **named: object) -> None:
        tell(*arguments, **named)
        write_image(photos / key, 103, None, draw_photo)

    monkeypatch.setattr(preprocess.build.build, "report_plan", change)
    result = build(options(photos, tmp_path / "data", max_rejects=0.5))
    monkeypatch.undo()
    (line,) = [json.loads(line) for line in (tmp_path / "data" / REJECTS).read_text().splitlines()]
    assert (line["key"], line["reason"]) == (key, "changed during the build")
    assert result.counts.rejected == 1 and key not in read(tmp_path / "data")
    assert lines_naming(capsys.readouterr().out, 1, str(tmp_path / "data" / REJECTS))
    assert build(options(photos, tmp_path / "data", max_rejects=0.5)).counts.made["latent"] == 1
    assert_as_fresh(photos, tmp_path / "data", tmp_path, max_rejects=0.5)


def test_what_is_cut_copied_or_enlarged_is_counted_and_told(
    photos: Path, tmp_path: Path, draw_photo, capsys: pytest.CaptureFixture
) -> None:
    (photos / "set0" / "p00.json").write_text('{"caption": "six words are more than five"}')
    write_image(photos / "set1" / "tiny.png", 4, "short", lambda h, w, seed: draw_photo(64, 64, seed))
    shutil.copy(photos / "set0" / "p02.png", photos / "copy.jpg")
    (photos / "copy.txt").write_text("a copy")
    Image.fromarray(draw_photo(160, 160, 60)).save(photos / "profile.png", icc_profile=b"no profile" * 40)
    (photos / "profile.txt").write_text("a broken one")
    result = build(options(photos, tmp_path / "data", max_tokens=5))
    told = capsys.readouterr().out
    captions = [record.caption for record in read(tmp_path / "data").values()]
    cut = sum(len(caption.split()) > 4 for caption in captions)
    assert result.counts.truncated == cut == 24
    assert lines_naming(told, cut, 5, "tokens")
    for parts in (
        (1, "copy.jpg", "set0/p02.png"), (1, "build_log.jsonl"), (1, 1.5, "set1/tiny.png"), (1, "extension"),
        (1, "colour profile"),
    ):  # fmt: skip
        assert lines_naming(told, *parts), parts
    log = [json.loads(line) for line in (tmp_path / "data" / "build_log.jsonl").read_text().splitlines()]
    plan, end = (next(e for e in log if e["event"] == name) for name in ("plan", "end"))
    assert (plan["items"], plan["enlarged"], plan["wrong_extension"], len(plan["duplicates"])) == (27, 1, 1, 1)
    assert end["counts"]["truncated"] == cut and end["records"] == 27


def test_an_encoder_that_returns_nan(photos: Path, tmp_path: Path, tiny_dino_dir: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_dino_dir, tmp_path / "dino")
    tensors = load_file(tmp_path / "dino" / "model.safetensors")
    name = next(n for n in tensors if n.endswith("norm.weight"))
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, tmp_path / "dino" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PreprocessError, match=naming("train")):
        build(options(photos, tmp_path / "data", vision_encoder=str(tmp_path / "dino"), device="cpu"))
    log = [json.loads(line) for line in (tmp_path / "data" / "build_log.jsonl").read_text().splitlines()]
    reasons = [line["reason"] for line in log if line["event"] == "reject"]
    assert reasons == ["the vision encoder returned NaN"] * 24
    assert not (tmp_path / "data" / MANIFEST).exists()


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"input": "/nowhere"}, ["--input", "/nowhere"]),
        ({"holdout": 0.999, "limit": 1}, ["--holdout 0"]),
        ({"holdout": 1.5}, ["--holdout", 0.0, 0.999, 1.5]),
        ({"shard_size": 0}, ["--shard-size", 0, 1]),
        ({"fit": "stretch"}, ["--fit", "resize, pad, crop", "stretch"]),
        ({"modulus": 40}, ["--modulus", 16, 40]),
        ({"dtype": "float16"}, ["float16"]),
        ({"vae": "builtin:hash"}, ["builtin:hash", "builtin:dct"]),
    ],
)
def test_impossible_wishes_are_one_line_errors(photos: Path, tmp_path: Path, more: dict, named: list) -> None:
    with pytest.raises(PreprocessError, match=naming(*named)):
        build(dataclasses.replace(options(photos, tmp_path / "data"), **more))
    assert not (tmp_path / "data" / MANIFEST).exists()


def test_an_empty_folder_and_one_with_only_bad_images(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(PreprocessError, match=naming("image", str(folder))):
        build(options(folder, tmp_path / "data"))
    (folder / "a.png").write_bytes(b"nothing")
    (folder / "a.txt").write_text("words")
    with pytest.raises(PreprocessError, match=naming(1, "not an image: 1", str(tmp_path / "data" / REJECTS))):
        build(options(folder, tmp_path / "data"))


def test_a_second_build_is_refused_with_the_owner(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    (output / ".build").mkdir(parents=True)
    with (
        locked(output / ".build" / "lock"),
        pytest.raises(PreprocessError, match=naming(os.getpid(), socket.gethostname())),
    ):
        build(options(photos, output))
    build(options(photos, output))  # the file of a dead owner locks nobody out
