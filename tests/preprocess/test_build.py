"""`build`, end to end: datasets from folders, by the real code with the built-in or tiny real encoders."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import (
    FLAGS,
    assert_as_fresh,
    contents,
    index,
    killed_before,
    made,
    options,
    read,
    write_image,
    write_photos,
)
from PIL import Image
from wording import lines_naming, naming

import preprocess.build.build
from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.manifest import INDEX, MANIFEST, REJECTS, load_manifest, sha256_file
from preprocess import PreprocessError
from preprocess.build.build import build
from preprocess.build.comparison import WouldLose
from preprocess.build.lock import locked
from preprocess.build.units import read_rows
from preprocess.decoding.images import Limits, decode, read_header
from preprocess.encoders import load_text_encoder, load_vae, load_vision_encoder
from preprocess.inspect.forecast import dry_run
from preprocess.inspect.verify import verify


@pytest.fixture
def photos(tmp_path: Path, draw_photo) -> Path:
    return write_photos(tmp_path / "photos", 24, draw_photo)


def test_records_are_what_the_encoders_say(photos: Path, tmp_path: Path) -> None:
    result = build(options(photos, tmp_path / "My Data-set"))
    assert result.status == 0 and result.manifest.name == "my_data_set"
    directory = tmp_path / "My Data-set"
    found = read(directory)
    assert sorted(found) == sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    vae, text = load_vae("builtin:dct"), load_text_encoder("builtin:hash")
    vision = load_vision_encoder("builtin:tone")
    for key, record in found.items():
        data = (photos / key).read_bytes()
        header = read_header(data, Limits())
        pixels = decode(data, header, record.encoded_size, "resize").pixels
        assert record.encoded_size in result.manifest.buckets
        assert record.original_size == (header.height, header.width)
        assert record.caption == json.loads((photos / key).with_suffix(".json").read_text())["caption"]
        np.testing.assert_array_equal(record.latent, vae.encode(pixels[None])[0])
        np.testing.assert_array_equal(record.text, text.encode([record.caption])[0])
        np.testing.assert_allclose(record.vision, vision.encode(pixels[None])[0], atol=1e-6)
    assert verify(directory) == []


def test_manifest_index_and_statistics(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "data"))
    directory = tmp_path / "data"
    manifest = load_manifest(directory)
    found = read(directory)
    train, holdout = manifest.shards["train"], manifest.shards["holdout"]
    assert manifest.records("train") + manifest.records("holdout") == 24 and manifest.records("holdout") > 0
    assert all(shard.records <= 8 for shard in train + holdout) and len(train) > 1
    rows = index(directory)
    assert len(rows) == 24
    for row in rows:
        record = found[row["key"]]
        ((_, data),) = read_rows(directory / row["shard"], [row["row"]])
        assert records.decode_record(data, {"text": 1024, "vision": None}).key == row["key"]
        assert row["split"] in row["shard"] and row["source"] == row["key"]
        assert (row["bucket_height"], row["bucket_width"]) == record.encoded_size
        assert (row["height"], row["width"]) == record.original_size
        assert (row["tokens"], row["content_hash"]) == (len(record.text), record.content_hash)
    in_train = [found[row["key"]].latent for row in rows if row["split"] == "train"]
    values = np.concatenate([latent.astype(np.float64).reshape(16, -1) for latent in in_train], axis=1)
    assert manifest.latent_count == values.shape[1]
    assert np.abs(np.array(manifest.latent_mean) - values.mean(axis=1)).max() < 1e-10
    assert np.abs(np.array(manifest.latent_std) - values.std(axis=1)).max() < 1e-10
    assert manifest.text_tokens == max(len(record.text) for record in found.values())
    for shard in train + holdout:
        assert sha256_file(directory / shard.file) == shard.sha256
        assert sum(shard.buckets.values()) == shard.records
    assert not (directory / ".build").exists() and (directory / REJECTS).read_text() == ""


def test_the_same_input_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "a" / "data"))
    build(options(photos, tmp_path / "b" / "data", workers=1))
    assert contents(tmp_path / "a" / "data") == contents(tmp_path / "b" / "data")


def test_plain_tfds_reads_it_without_tensorflow_torch_or_jax(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "data"))
    code = (
        "import sys, json, ml_dtypes\n"
        "import tensorflow_datasets as tfds\n"
        "builder = tfds.builder_from_directory(sys.argv[1])\n"
        "for split in ('train', 'holdout'):\n"
        "    for example in builder.as_data_source(split):\n"
        "        print(json.dumps([split, example['key'].decode(), example['caption'].decode(),\n"
        "            str(example['latent'].dtype), list(example['latent'].shape), list(example['text'].shape),\n"
        "            float(example['latent'].astype('f4').sum()), float((example['vision'] ** 2).sum()),\n"
        "            example['encoded_size'].tolist()]))\n"
        "assert not {'tensorflow', 'torch', 'jax'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data")], capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    found = read(tmp_path / "data")
    assert len(rows) == len(found) == 24 and {row[0] for row in rows} == {"train", "holdout"}
    for _, key, caption, dtype, latent, text, total, norm, size in rows:
        record = found[key]
        assert caption == record.caption and dtype == "bfloat16"
        assert tuple(latent) == record.latent.shape and tuple(text) == record.text.shape
        assert total == pytest.approx(float(record.latent.astype(np.float32).sum()), rel=1e-4, abs=1e-3)
        assert norm == pytest.approx(1, abs=1e-4) and tuple(size) == record.encoded_size


def test_real_encoders_from_directories(
    photos: Path, tmp_path: Path, tiny_vae_dir: Path, tiny_t5_dir: Path, tiny_dino_dir: Path
) -> None:
    build(
        options(
            photos,
            tmp_path / "data",
            vae=str(tiny_vae_dir),
            text_encoder=str(tiny_t5_dir),
            vision_encoder=str(tiny_dino_dir),
            device="cpu",
            limit=9,
        )
    )
    manifest = load_manifest(tmp_path / "data")
    assert (manifest.vae.width, manifest.text.width, manifest.vision.width) == (16, 64, 32)
    assert manifest.vae.id == str(tiny_vae_dir) and manifest.vae.dtype == "float32"
    found = read(tmp_path / "data")
    assert len(found) == 9
    vae = load_vae(str(tiny_vae_dir), "cpu")
    for key, record in found.items():
        data = (photos / key).read_bytes()
        pixels = decode(data, read_header(data, Limits()), record.encoded_size, "resize").pixels
        latent = vae.encode(pixels[None])[0].astype(np.float32)
        np.testing.assert_allclose(record.latent.astype(np.float32), latent, rtol=2**-7, atol=1e-3)
    assert verify(tmp_path / "data") == []


# ------------------------------------------------------------------------------------------------ incremental


def test_nothing_changed_means_nothing_done(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "data"))
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "data").iterdir()}
    result = build(options(photos, tmp_path / "data"))
    assert not result.changed and result.counts.pictures == made(result.counts)[1] == 0
    for path, (stamp, data) in before.items():
        if path.name != "build_log.jsonl":
            assert (path.stat().st_mtime_ns, path.read_bytes()) == (stamp, data)


def test_one_more_image_is_one_image_encoded(photos: Path, tmp_path: Path, draw_photo) -> None:
    build(options(photos, tmp_path / "data"))
    untouched = {p.name: p.stat().st_ino for p in (tmp_path / "data").glob("*array_record*")}
    write_image(photos / "set0" / "another.png", 99, "one more dog", draw_photo)
    result = build(options(photos, tmp_path / "data"))
    counts = result.counts
    assert (counts.pictures, *made(counts)) == (1, 1, 1, 1)
    after = {p.name: p.stat().st_ino for p in (tmp_path / "data").glob("*array_record*")}
    assert len(set(untouched.values()) - set(after.values())) == 1, "one shard was written again, the others kept"
    assert_as_fresh(photos, tmp_path / "data", tmp_path)


def test_one_image_less(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    build(options(photos, tmp_path / "data"))
    (photos / "set0" / "p04.png").unlink()
    (photos / "set0" / "p04.json").unlink()
    result = build(options(photos, tmp_path / "data"))
    assert result.counts.pictures == made(result.counts)[1] == 0
    assert lines_naming(capsys.readouterr().out, 1, 24, "set0/p04.png")
    assert_as_fresh(photos, tmp_path / "data", tmp_path)


def test_an_edited_caption_is_one_caption_encoded(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "data"))
    path = photos / "set1" / "p03.json"
    stat = path.stat()
    path.write_text(path.read_text().replace("dog", "cat"))  # as long as before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # nor does the time tell
    counts = build(options(photos, tmp_path / "data")).counts
    assert (counts.pictures, *made(counts)) == (0, 0, 1, 0)
    assert read(tmp_path / "data")["set1/p03.png"].caption == "photo number 3 of a cat"
    assert_as_fresh(photos, tmp_path / "data", tmp_path)


def test_an_edited_image_is_one_image_encoded(photos: Path, tmp_path: Path, draw_photo) -> None:
    build(options(photos, tmp_path / "data"))
    write_image(photos / "set1" / "p03.png", 103, None, draw_photo)
    counts = build(options(photos, tmp_path / "data")).counts
    assert (counts.pictures, *made(counts)) == (1, 1, 0, 1)
    assert_as_fresh(photos, tmp_path / "data", tmp_path)


def test_a_renamed_image_is_not_encoded_again(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "data"))
    (photos / "set1" / "p03.png").rename(photos / "renamed.png")
    (photos / "set1" / "p03.json").rename(photos / "renamed.json")
    counts = build(options(photos, tmp_path / "data")).counts
    assert (counts.pictures, *made(counts)) == (0, 0, 0, 0)
    assert_as_fresh(photos, tmp_path / "data", tmp_path)


def test_another_resolution_keeps_the_captions(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "data"))
    counts = build(options(photos, tmp_path / "data", resolution=96), replace=True).counts
    assert made(counts) == (24, 0, 24)
    assert_as_fresh(photos, tmp_path / "data", tmp_path, resolution=96)


def test_other_weights_are_noticed_by_content(photos: Path, tmp_path: Path, tiny_t5_dir: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = tmp_path / "t5"
    shutil.copytree(tiny_t5_dir, model)
    text = {"text_encoder": str(model), "device": "cpu", "limit": 6, "holdout": 0.0}
    build(options(photos, tmp_path / "data", **text))
    moved = tmp_path / "elsewhere"
    model.rename(moved)
    text["text_encoder"] = str(moved)
    counts = build(options(photos, tmp_path / "data", **text)).counts
    assert made(counts) == (0, 0, 0)
    tensors = load_file(moved / "model.safetensors")
    tensors["shared.weight"] = tensors["shared.weight"] * 1.5
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WouldLose, match=naming(6, "text encoder", "set0/p00.png")):
        build(options(photos, tmp_path / "data", **text))
    counts = build(options(photos, tmp_path / "data", **text), replace=True).counts
    assert made(counts) == (0, 6, 0)


def test_an_image_never_changes_its_split(photos: Path, tmp_path: Path, draw_photo) -> None:
    def splits() -> dict[str, str]:
        rows = index(tmp_path / "data")
        return {row["key"]: row["split"] for row in rows}

    build(options(photos, tmp_path / "data"))
    before = splits()
    for seed in range(100, 120):
        write_image(photos / f"new{seed}.png", seed, "a new one", draw_photo)
    build(options(photos, tmp_path / "data"))
    after = splits()
    assert len(after) == 44 and {key: after[key] for key in before} == before


def test_a_damaged_record_is_not_taken_over(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "data"))
    manifest = load_manifest(tmp_path / "data")
    shard = tmp_path / "data" / manifest.shards["train"][0].file
    row = next(r for r in index(tmp_path / "data") if r["shard"] == shard.name)
    data = bytearray(shard.read_bytes())
    position = data.index(row["caption"].encode())
    data[position] ^= 1
    shard.write_bytes(data)
    other = next(r for r in index(tmp_path / "data") if r["shard"] == shard.name and r["key"] != row["key"])
    (photos / other["key"]).with_suffix(".json").write_text('{"caption": "edited, so the shard is made again"}')
    counts = build(options(photos, tmp_path / "data")).counts
    assert made(counts)[:2] == (1, 2)
    assert_as_fresh(photos, tmp_path / "data", tmp_path)


# ------------------------------------------------------------------------------------------------ bad input


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

    def change(*arguments: object) -> None:
        tell(*arguments)
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


@pytest.mark.parametrize("name", [INDEX, REJECTS, "build.json", MANIFEST])
def test_killed_while_it_publishes_there_is_no_manifest(photos: Path, tmp_path: Path, draw_photo, name: str) -> None:
    """Nobody takes for a data set what is half of one; the next build completes it."""
    data = tmp_path / "data"
    build(options(photos, data, limit=6, holdout=0.0))
    write_image(photos / "a.png", 99, "one more dog", draw_photo)
    with killed_before(data / name):
        build(options(photos, data, limit=6, holdout=0.0), replace=True)
    assert not (data / MANIFEST).exists()
    build(options(photos, data, limit=6, holdout=0.0))
    assert_as_fresh(photos, data, tmp_path, limit=6, holdout=0.0)


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


def run(*arguments: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "preprocess", *arguments], capture_output=True, text=True, **more)


def test_command_line(photos: Path, tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    done = run("build", "--input", str(photos), "--output", data, "--resolution", "128", "--holdout", "0", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert lines_naming(done.stdout, 24, "train 24", data)
    assert f"python -m fluxdit_jax.train --config=configs/demo.py --config.data.path={data}" in done.stdout
    assert run("verify", data).returncode == 0
    failed = run("build", "--input", "/nowhere", "--output", str(tmp_path / "x"), *FLAGS)
    assert failed.returncode == 1
    assert (
        failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1 and "--input /nowhere" in failed.stderr
    )
    assert run("build", "--input", "x").returncode == 2


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from preprocess.__main__ import main\n"
        "try: main(['build', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('numpy', 'PIL', 'torch', 'pyarrow', 'tensorflow_datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--text-encoder" in result.stdout and result.stdout.strip().endswith("[]")


def test_a_reader_that_goes_away_stops_nothing(photos: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m preprocess build --input {photos} --output {tmp_path / 'data'} --resolution 128"
    result = subprocess.run(["bash", "-c", f"{command} {' '.join(FLAGS)} | true"], capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    assert load_manifest(tmp_path / "data").records("train") > 0


def test_a_signal_inside_a_garbage_collection_stops_it_too(tmp_path: Path, draw_photo) -> None:
    """What a signal's handler raises there is swallowed."""
    photos = write_photos(tmp_path / "photos", 30, draw_photo)
    code = """
import gc, os, signal, sys
from pathlib import Path
from preprocess.__main__ import main

work, sent = Path(sys.argv.pop(1)), []
def collected(phase, info):
    if not sent and work.exists():
        sent.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

gc.callbacks.append(collected)
sys.exit(main(sys.argv[1:]))
"""
    output = tmp_path / "data"
    arguments = ["build", "--input", str(photos), "--output", str(output), "--resolution", "512", *FLAGS]
    result = subprocess.run(
        [sys.executable, "-c", code, str(output / ".build"), *arguments], capture_output=True, text=True
    )
    assert result.returncode == 143 and "Traceback" not in result.stderr
    assert "stopped" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_it_cleanly(number: signal.Signals, tmp_path: Path, draw_photo) -> None:
    photos = write_photos(tmp_path / "photos", 60, draw_photo)
    for copy in range(15):  # enough work that the signal comes before the end, also on a fast machine
        shutil.copytree(photos, tmp_path / "photos" / f"copy{copy}", ignore=shutil.ignore_patterns("copy*"))
    arguments = ["build", "--input", str(photos), "--output", str(tmp_path / "data"), "--shard-size", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "preprocess", *arguments, "--resolution", "512", *FLAGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run started in the background has SIGINT ignored, under nohup SIGHUP; the build respects that
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "data").glob(".build/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert "stopped" in errors
    assert not list((tmp_path / "data").glob(".build/*.tmp"))
    assert list((tmp_path / "data").glob(".build/*.parquet"))


# ------------------------------------------------------------------------------------------------- dry run


def test_dry_run_tells_and_writes_no_dataset(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (photos / "bad.png").write_bytes(b"")
    (photos / "bad.txt").write_text("a zero-byte file")
    dry_run(options(photos, tmp_path / "data"))
    told = capsys.readouterr().out
    assert not (tmp_path / "data").exists()
    counts = {}
    for line in told.splitlines():
        words = line.split()
        if len(words) == 8 and words[1] == "x":
            counts[int(words[2]), int(words[0])] = int(words[6])  # printed as width x height
    result = build(options(photos, tmp_path / "data"))
    built = {}
    for shards in result.manifest.shards.values():
        for shard in shards:
            for name, count in shard.buckets.items():
                size = tuple(int(side) for side in name.split("x"))
                built[size] = built.get(size, 0) + count
    assert counts == built
    assert lines_naming(told, 1, "zero bytes", "bad.png")
    assert lines_naming(told, "fit resize", "p99") and lines_naming(told, "patch 2", "%")
    assert lines_naming(told, 24, "time:", "trial")


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_other_fits(fit: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dry_run(options(photos, tmp_path / "data", fit=fit))
    assert lines_naming(capsys.readouterr().out, f"fit {fit}", "cut" if fit == "crop" else "noise", "p99")
    build(options(photos, tmp_path / "data", fit=fit))
    found = read(tmp_path / "data")
    vae = load_vae("builtin:dct")
    for key, record in found.items():
        data = (photos / key).read_bytes()
        pixels = decode(data, read_header(data, Limits()), record.encoded_size, fit, record.content_hash).pixels
        np.testing.assert_array_equal(record.latent, vae.encode(pixels[None])[0])
    assert_as_fresh(photos, tmp_path / "data", tmp_path, fit=fit)


def test_limit_takes_the_first_by_name(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "data", limit=5, holdout=0.0))
    names = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    assert sorted(read(tmp_path / "data")) == names[:5]


def test_a_dataset_inside_its_input_is_not_read_as_input(photos: Path, tmp_path: Path) -> None:
    build(options(photos, photos / "out"))
    before = contents(photos / "out")
    (photos / "out" / "inspect").mkdir()
    shutil.copy(photos / "set0" / "p00.png", photos / "out" / "inspect" / "x.png")
    build(options(photos, photos / "out"))
    assert contents(photos / "out") == before


# ---------------------------------------------------------------------------------------- precomputed vectors


def test_precomputed_vectors(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vectors"
    rng = np.random.default_rng(0)
    vectors = {p.relative_to(photos).as_posix(): rng.normal(size=1024) * 7 for p in sorted(photos.rglob("*.png"))}
    for key, vector in vectors.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{key}.npy", vector.astype(np.float32))
    more = {"vision_embeddings": str(folder), "vision_encoder": "owner/dino"}
    result = build(options(photos, tmp_path / "data", **more))
    assert made(result.counts)[2] == 0 and result.manifest.vision.id == "precomputed:owner/dino"
    for key, record in read(tmp_path / "data").items():
        expected = vectors[key].astype(np.float32)
        np.testing.assert_allclose(record.vision, expected / np.linalg.norm(expected), atol=1e-6)
    changed = sorted(vectors)[3]
    np.save(folder / f"{changed}.npy", -vectors[changed].astype(np.float32))
    (folder / f"{sorted(vectors)[4]}.npy").unlink()
    np.save(folder / f"{sorted(vectors)[5]}.npy", np.full(1024, np.nan, np.float32))
    result = build(options(photos, tmp_path / "data", max_rejects=0.5, **more))
    assert made(result.counts)[:2] == (0, 0)
    found = read(tmp_path / "data")
    assert len(found) == 22 and found[changed].vision @ vectors[changed] < 0
    lines = [json.loads(line) for line in (tmp_path / "data" / REJECTS).read_text().splitlines()]
    assert [line["reason"] for line in lines] == ["no vector", "vector is not finite"]
    assert_as_fresh(photos, tmp_path / "data", tmp_path, max_rejects=0.5, **more)


def test_a_vector_that_changes_between_plan_and_encoding(photos: Path, tmp_path: Path, monkeypatch) -> None:
    keys, tell = (
        sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png")),
        preprocess.build.build.report_plan,
    )
    for number, key in enumerate(keys):
        (tmp_path / "v" / key).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "v" / f"{key}.npy", np.random.default_rng(number).normal(size=1024).astype(np.float32))

    def change(*arguments: object) -> None:
        tell(*arguments)
        np.save(tmp_path / "v" / f"{keys[3]}.npy", np.ones(1024, np.float32))

    monkeypatch.setattr(preprocess.build.build, "report_plan", change)
    more = {"vision_embeddings": str(tmp_path / "v"), "max_rejects": 0.5}
    build(options(photos, tmp_path / "data", **more))
    monkeypatch.undo()
    (line,) = [json.loads(line) for line in (tmp_path / "data" / REJECTS).read_text().splitlines()]
    assert (line["key"], line["reason"]) == (keys[3], "changed during the build")
    build(options(photos, tmp_path / "data", **more))
    assert_as_fresh(photos, tmp_path / "data", tmp_path, **more)
