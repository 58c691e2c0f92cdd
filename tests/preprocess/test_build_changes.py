"""`build` once more after its input, its options or its encoders changed: as little as possible is encoded again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from build_fixtures import assert_as_fresh, index, killed_before, made, options, read, write_image, write_photos
from wording import lines_naming, naming

from fluxdit_jax.dataset.manifest import INDEX, MANIFEST, REJECTS, load_manifest
from preprocess.build.build import build
from preprocess.build.comparison import WouldLose
from preprocess.inspect.verify import verify


@pytest.fixture
def photos(tmp_path: Path, draw_photo) -> Path:
    return write_photos(tmp_path / "photos", 24, draw_photo)


def test_nothing_changed_means_nothing_done(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "data"))
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "data").iterdir()}
    result = build(options(photos, tmp_path / "data"))
    assert not result.changed and result.counts.pictures == made(result.counts)[1] == 0
    for path, (stamp, data) in before.items():
        if path.name != "build_log.jsonl":
            assert (path.stat().st_mtime_ns, path.read_bytes()) == (stamp, data)


def test_an_index_of_earlier_versions_is_written_once_more(photos: Path, tmp_path: Path) -> None:
    """They wrote the rows of all shards as one group, with statistics."""
    build(options(photos, tmp_path / "data"))
    path = tmp_path / "data" / INDEX
    now = path.read_bytes()
    pq.write_table(pq.read_table(path), path, compression="zstd", write_page_checksum=True)
    assert path.read_bytes() != now and verify(tmp_path / "data") == []
    result = build(options(photos, tmp_path / "data"))
    assert result.changed and made(result.counts) == (0, 0, 0) and path.read_bytes() == now
    assert not build(options(photos, tmp_path / "data")).changed


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
