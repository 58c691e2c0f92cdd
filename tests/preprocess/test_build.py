"""`build`, end to end: datasets from folders, by the real code with the built-in or tiny real encoders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import assert_as_fresh, contents, index, made, options, read, write_photos
from wording import lines_naming

import preprocess.build.build
from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.manifest import REJECTS, load_manifest, sha256_file
from preprocess.build.build import build
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

    def change(*arguments: object, **named: object) -> None:
        tell(*arguments, **named)
        np.save(tmp_path / "v" / f"{keys[3]}.npy", np.ones(1024, np.float32))

    monkeypatch.setattr(preprocess.build.build, "report_plan", change)
    more = {"vision_embeddings": str(tmp_path / "v"), "max_rejects": 0.5}
    build(options(photos, tmp_path / "data", **more))
    monkeypatch.undo()
    (line,) = [json.loads(line) for line in (tmp_path / "data" / REJECTS).read_text().splitlines()]
    assert (line["key"], line["reason"]) == (keys[3], "changed during the build")
    build(options(photos, tmp_path / "data", **more))
    assert_as_fresh(photos, tmp_path / "data", tmp_path, **more)
