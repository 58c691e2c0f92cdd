"""Export to WebDataset tars, and back in again."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from build_fixtures import contents, options, read, write_photos
from PIL import Image
from safetensors.torch import load
from wording import naming

from fluxdit_jax.dataset.manifest import DatasetError, load_manifest
from preprocess import PreprocessError
from preprocess.build.build import build
from preprocess.inspect.export import export


def test_every_record_is_there_bit_for_bit(tmp_path: Path, draw_photo) -> None:
    write_photos(tmp_path / "photos", 20, draw_photo)
    build(options(tmp_path / "photos", tmp_path / "data"))
    paths = export(tmp_path / "data", tmp_path / "tars")
    manifest = load_manifest(tmp_path / "data")
    assert [p.name for p in paths][:1] == ["data-train-000000.tar"]
    assert len(paths) == sum(len(shards) for shards in manifest.shards.values())
    found, expected = {}, read(tmp_path / "data")
    for path in paths:
        with tarfile.open(path) as archive:
            members = {m.name: archive.extractfile(m).read() for m in archive}
        for name in sorted(members):
            stem, _, suffix = name.partition(".")
            assert stem.isdigit() and len(stem) == 9 and suffix in ("json", "safetensors")
            if suffix == "json":
                about = json.loads(members[name])
                found[about["key"]] = about, load(members[f"{stem}.safetensors"])
    assert sorted(found) == sorted(expected)
    for key, (about, tensors) in found.items():
        record = expected[key]
        assert about["caption"] == record.caption and about["content_hash"] == record.content_hash
        assert tuple(about["original_size"]) == record.original_size
        for name in ("latent", "text"):
            bits = tensors[name].view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(bits, getattr(record, name))
        np.testing.assert_array_equal(tensors["vision"].numpy(), record.vision)
    again = {p.name: p.read_bytes() for p in paths}
    assert {p.name: p.read_bytes() for p in export(tmp_path / "data", tmp_path / "tars")} == again


def test_an_export_again_leaves_no_tar_of_the_larger_dataset(tmp_path: Path, draw_photo) -> None:
    write_photos(tmp_path / "photos", 12, draw_photo)
    build(options(tmp_path / "photos", tmp_path / "data", shard_size=3, holdout=0.3))
    assert len(export(tmp_path / "data", tmp_path / "tars")) > 3
    (tmp_path / "tars" / "data-train-mine.tar").write_text("mine")
    build(options(tmp_path / "photos", tmp_path / "data", shard_size=100, holdout=0.0), replace=True)
    written = export(tmp_path / "data", tmp_path / "tars")
    assert sorted((tmp_path / "tars").iterdir()) == [*written, tmp_path / "tars" / "data-train-mine.tar"]


@pytest.mark.parametrize("name", ["manifest.json", "a.jpg"])
def test_it_is_not_written_among_pictures_or_into_a_dataset(tmp_path: Path, draw_photo, name: str) -> None:
    build(options(write_photos(tmp_path / "photos", 4, draw_photo), tmp_path / "ds", holdout=0.0))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).touch()
    with pytest.raises(PreprocessError, match=naming("--output", tmp_path / "out", name)):
        export(tmp_path / "ds", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_damaged_record_stops_it_and_is_named(tmp_path: Path, draw_photo) -> None:
    write_photos(tmp_path / "photos", 6, draw_photo)
    build(options(tmp_path / "photos", tmp_path / "data", holdout=0.0))
    shard = next((tmp_path / "data").glob("*.array_record*"))
    data = bytearray(shard.read_bytes())
    data[data.index(b"photo number 3")] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"{shard.name} row \d: .*damaged"):
        export(tmp_path / "data", tmp_path / "tars")
    assert list((tmp_path / "tars").iterdir()) == []
    with pytest.raises(PreprocessError, match=naming("--format", "webdataset", "mds")):
        export(tmp_path / "data", tmp_path / "tars", "mds")


def test_a_tar_of_images_builds_what_the_folder_builds(tmp_path: Path, draw_photo) -> None:
    folder = tmp_path / "in" / "s.tar"  # a folder of that name, so that the keys are the same
    folder.mkdir(parents=True)
    for number in range(12):
        Image.fromarray(draw_photo(100 + number, 120, number)).save(folder / f"{number:04}.png")
        (folder / f"{number:04}.json").write_text(json.dumps({"caption": f"picture {number}"}))
    build(options(tmp_path / "in", tmp_path / "a" / "data", holdout=0.1))
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for path in sorted(folder.iterdir()):
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            archive.addfile(member, io.BytesIO(path.read_bytes()))
    build(options(tmp_path / "s.tar", tmp_path / "b" / "data", holdout=0.1))
    a, b = contents(tmp_path / "a" / "data"), contents(tmp_path / "b" / "data")
    a.pop("index.parquet"), b.pop("index.parquet")  # its column `source` names the tar
    assert a == b
