"""A photograph as a reference, and a caption as a prompt, are encoded as they are stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import options, read
from PIL import Image
from truth_scene import write_photos
from wording import naming

from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.sampling.prompts import SampleError, encode_prompts, encode_reference, read_reference
from preprocess.build.build import build
from preprocess.encoders import load_vae


@pytest.mark.parametrize("fit", ["resize", "crop", "pad"])
@pytest.mark.parametrize("real", [False, True], ids=["builtin", "dino"])
def test_a_training_photograph_as_reference_is_its_stored_vector(
    tmp_path: Path, draw_photo, fit: str, real: bool, request: pytest.FixtureRequest
) -> None:
    """So is a caption as a prompt its stored text. One photograph lies on its side, one is small and narrow."""
    write_photos(tmp_path / "photos", draw_photo, 5)
    Image.fromarray(draw_photo(30, 170, 8)).save(tmp_path / "photos" / "narrow.png")
    (tmp_path / "photos" / "narrow.txt").write_text("a narrow one")
    more = {"min_side": 16, "max_aspect": 6.0}
    if real:
        more |= {name: str(request.getfixturevalue(f"tiny_{of}_dir"))
                for name, of in (("vision_encoder", "dino"), ("text_encoder", "t5"))}  # fmt: skip
    build(options(tmp_path / "photos", tmp_path / "ds", resolution=96, holdout=0.0, fit=fit, device="cpu", **more))
    manifest, vae = load_manifest(tmp_path / "ds"), load_vae("builtin:dct")
    for key, record in read(tmp_path / "ds").items():
        seen, sha256 = read_reference(tmp_path / "photos" / key, manifest)
        assert seen.shape == (*record.encoded_size, 3) and sha256 == record.content_hash
        np.testing.assert_array_equal(vae.encode(seen[None])[0], record.latent)
        np.testing.assert_allclose(encode_reference(seen, manifest, None), record.vision, atol=2e-5)
        (made,) = encode_prompts([record.caption], manifest, None)
        np.testing.assert_allclose(made["text"].astype(np.float32), record.text.astype(np.float32), atol=2e-2)


def test_an_encoder_with_other_settings_is_refused_as_a_references(tmp_path: Path, draw_photo, tiny_dino_dir) -> None:
    write_photos(tmp_path / "photos", draw_photo, 1)
    dino = Path(shutil.copytree(tiny_dino_dir, tmp_path / "dino"))
    encoder = {"vision_encoder": str(dino), "device": "cpu"}
    manifest = build(options(tmp_path / "photos", tmp_path / "ds", resolution=96, holdout=0.0, **encoder)).manifest
    seen, _ = read_reference(tmp_path / "photos" / "p00.png", manifest)
    settings = json.loads((dino / "preprocessor_config.json").read_text())
    (dino / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(SampleError, match=naming("--vision-encoder", dino)):
        encode_reference(seen, manifest, None)
