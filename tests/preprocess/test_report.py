"""`inspect`: the printed figures are right and the pictures are drawn."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import options, read, write_image, write_photos
from PIL import Image
from wording import lines_naming, naming, numbers

from fluxdit_jax.dataset.manifest import DatasetError
from preprocess.build.build import build
from preprocess.inspect.report import Dataset, inspect, padding


@pytest.fixture
def data(tmp_path: Path, draw_photo) -> Path:
    photos = write_photos(tmp_path / "photos", 14, draw_photo)
    write_image(photos / "odd.png", 77, "costs $5 & <script>alert(1)</script> a_b^c \\frac {x}", draw_photo)
    (photos / "bad.png").write_bytes(b"")
    (photos / "bad.txt").write_text("no bytes")
    build(options(photos, tmp_path / "data", max_rejects=0.5))
    return tmp_path / "data"


def test_figures_and_pictures(data: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    inspect(data, cells=6)
    told = capsys.readouterr().out
    found = read(data)
    lengths = [len(record.text) for record in found.values()]
    assert f"max {max(lengths)} mean {np.mean(lengths):.1f}" in told
    manifest = Dataset.load(data).manifest
    assert re.search(numbers(manifest.records("train"), len(manifest.shards["train"])), told)
    assert f"{manifest.latent_mean[0]:+9.4f}" in told and f"{manifest.latent_std[15]:+9.4f}" in told
    assert "builtin:dct" in told and "1  zero bytes" in told
    tokens = [record.latent.shape[1] * record.latent.shape[2] // 4 for record in found.values()]
    assert lines_naming(told, "padding", "patch 2", f"{1 - np.mean(tokens) / 64:.2%}")
    for name in ("latents.png", "buckets.png", "contact.png"):
        with Image.open(data / "inspect" / name) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[1] > 600 and pixels.std() > 10
    assert "false colours" not in told and "source" not in told


def test_without_sources_and_without_the_vae(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(tmp_path / "photos" / "set0")
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["vae"]["id"] == "builtin:dct"
    inspect(data, output=tmp_path / "pictures", cells=15)
    told = capsys.readouterr().out
    assert re.search(numbers(7, 15), told)
    assert (tmp_path / "pictures" / "contact.png").is_file() and not (data / "inspect").exists()


def test_padding() -> None:
    assert padding({(128, 128): 10, (112, 144): 0}, factor=8) == 0
    assert padding({(128, 128): 1, (112, 144): 1}, factor=8) == pytest.approx(0.5 / 64)
    assert padding({(128, 128): 0, (112, 144): 1}, factor=8) == pytest.approx(1 / 64), "the table counts, not the use"


def test_what_is_no_dataset(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DatasetError, match=naming(tmp_path / "manifest.json")):
        inspect(tmp_path)
    (data / "index.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DatasetError, match="index.parquet.*damaged"):
        inspect(data)
