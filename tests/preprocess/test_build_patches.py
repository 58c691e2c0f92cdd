"""`build --vision-patches`: pooled patches of the vision encoder, also of a dataset that exists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from build_fixtures import FLAGS, options, read, write_photos
from wording import naming

from fluxdit_jax.dataset import cells
from fluxdit_jax.dataset.manifest import load_manifest
from preprocess import PreprocessError
from preprocess.__main__ import main
from preprocess.build.build import build
from preprocess.build.comparison import WouldLose
from preprocess.encoders import load_vision_encoder
from preprocess.encoders.patches import Cells
from preprocess.inspect.verify import repair, verify

SMALL = [*FLAGS, "--resolution", "128", "--modulus", "16", "--holdout", "0", "--shard-size", "8"]


@pytest.fixture
def photos(tmp_path: Path, draw_photo) -> Path:
    return write_photos(tmp_path / "photos", 12, draw_photo)


def counts(data: Path) -> dict:
    """Of the last build."""
    events = [json.loads(line) for line in (data / "build_log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "end"][-1]["counts"]


@pytest.mark.parametrize("kind", ["tiny_dino_dir", "tiny_dino2_dir"])
def test_cells_are_the_models_own_patches(kind: str, request: pytest.FixtureRequest, draw_photo) -> None:
    directory = request.getfixturevalue(kind)
    vision = load_vision_encoder(str(directory), device="cpu")
    patch = vision.identity.options["patch"]
    picture = draw_photo(6 * patch, 4 * patch, 1)[None]
    model = transformers.AutoModel.from_pretrained(directory).eval()
    mean, std = (np.array(vision.identity.options[name], np.float32) for name in ("mean", "std"))
    pixels = torch.from_numpy(((picture / 255 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        out = model(pixel_values=pixels).last_hidden_state[0].numpy()
    height, width = picture.shape[1] // patch, picture.shape[2] // patch
    expected = out[-height * width :].reshape(height, width, -1)
    np.testing.assert_allclose(vision.encode_patches(picture)[0], expected, atol=1e-4)
    pooled = expected.reshape(height // 2, 2, width // 2, 2, -1).mean(axis=(1, 3))
    grid = cells.grid_of(picture.shape[1:3], 32 * patch, 256)  # cells of two patches a side
    assert grid == (height // 2, width // 2)
    (rows,) = Cells(vision, 32 * patch, 256).encode(picture)
    found = cells.unpacked(rows)
    assert np.abs(found - pooled.reshape(len(found), -1)).max() < 0.02 * np.abs(pooled).max()


def test_the_model_runs_once_for_vector_and_patches(tiny_dino_dir: Path, draw_photo) -> None:
    vision = load_vision_encoder(str(tiny_dino_dir), device="cpu")
    runs = []
    vision._model.register_forward_hook(lambda *_: runs.append(1))
    pictures = np.stack([draw_photo(64, 64, seed) for seed in range(2)])
    alone = vision.encode(pictures)
    rows = Cells(vision, 64, 256).encode(vision.prepare(pictures[0])[None].repeat(2, 0))
    assert len(runs) == 2 and np.array_equal(rows[0], rows[1])
    Cells(vision, 64, 256).encode(pictures)
    np.testing.assert_array_equal(vision.encode(pictures), alone)
    assert len(runs) == 3


def test_patches_are_added_to_a_dataset_and_nothing_else_is_encoded(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert main(["build", "--input", str(photos), "--output", str(data), *SMALL]) == 0
    before = read(data)
    assert main(["build", "--output", str(data), "--vision-patches", "256"]) == 0
    assert counts(data)["made"] == {"patches": 12}
    build(options(photos, tmp_path / "new", holdout=0.0, vision_patches=256))
    fresh, after = read(tmp_path / "new"), read(data)
    for key, record in after.items():
        assert np.array_equal(record.latent, before[key].latent) and np.array_equal(record.vision, before[key].vision)
        assert np.array_equal(record.conditions["patches"], fresh[key].conditions["patches"])
        rows = record.conditions["patches"]
        assert rows.dtype == np.int8 and len(rows) == np.prod(cells.grid_of(record.encoded_size, 128, 256))
    manifest = load_manifest(data)
    assert manifest.conditions == ("text", "vision") and manifest.further() == []
    assert manifest.encoders["patches"].sha256 == manifest.vision.sha256
    assert verify(data) == []


def test_stored_patches_are_not_dropped_silently(photos: Path, tmp_path: Path) -> None:
    build(options(photos, tmp_path / "data", vision_patches=256))
    with pytest.raises(WouldLose, match=naming("12", "--replace")):
        build(options(photos, tmp_path / "data"))


def test_a_number_of_cells_that_is_not_there_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(PreprocessError, match=naming("--vision-patches", "256", "1024", "100")):
        build(options(photos, tmp_path / "data", vision_patches=100))


def test_a_damaged_record_gets_its_patches_back(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    build(options(photos, data, vision_patches=1024))
    (shard, *_) = load_manifest(data).shards["train"]
    whole = (data / shard.file).read_bytes()
    broken = bytearray(whole)
    broken[len(broken) // 2] ^= 0x40
    (data / shard.file).write_bytes(broken)
    findings = verify(data)
    assert findings
    repair(data, {data: findings})
    assert (data / shard.file).read_bytes() == whole and verify(data) == []
