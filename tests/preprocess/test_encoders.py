"""The torch encoders against the libraries they wrap, on tiny random models of the real classes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from wording import naming

from preprocess import PreprocessError
from preprocess.buckets import bucket_table
from preprocess.encoders import load_text_encoder, load_vae, load_vision_encoder
from preprocess.encoders.vision import input_size

CAPTIONS = [
    "a red dog",
    "portrait of an old man looking left in a green field, 1892",
    "sea",
    "a cat under a tall tree",
]


@pytest.fixture(scope="module")
def images(draw_photo) -> np.ndarray:
    return np.stack([draw_photo(64, 96, seed) for seed in range(3)])


def test_vae_applies_shift_and_scale_to_the_posterior_mean(tiny_vae_dir: Path, images: np.ndarray) -> None:
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(tiny_vae_dir).eval()
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        expected = (model.encode(pixels).latent_dist.mean.numpy() - 0.1159) * 0.3611
    vae = load_vae(str(tiny_vae_dir), device="cpu")
    latents = vae.encode(images)
    assert latents.dtype == ml_dtypes.bfloat16 and latents.shape == (3, 16, 8, 12) and vae.factor == 8
    np.testing.assert_allclose(latents.astype(np.float32), expected, rtol=2**-7, atol=1e-3)
    identity = vae.identity
    assert (identity.id, identity.revision, identity.width) == (str(tiny_vae_dir), "", 16)
    assert identity.dtype == "float32" and len(identity.sha256) == 64
    assert identity.options["factor"] == 8 and identity.options["latent"] == "mean"
    json.dumps(identity.options)


def test_vae_decode_undoes_shift_and_scale(tiny_vae_dir: Path, images: np.ndarray) -> None:
    from diffusers import AutoencoderKL

    latents = np.random.default_rng(0).normal(size=(2, 16, 4, 6)).astype(ml_dtypes.bfloat16)
    model = AutoencoderKL.from_pretrained(tiny_vae_dir).eval()
    with torch.no_grad():
        z = torch.from_numpy(latents.astype(np.float32)) / 0.3611 + 0.1159
        expected = ((model.decode(z).sample.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    decoded = load_vae(str(tiny_vae_dir), device="cpu").decode(latents)
    assert decoded.dtype == np.uint8 and decoded.shape == (2, 32, 48, 3)
    assert np.abs(decoded.astype(int) - expected).max() <= 1


def test_autoencoder_tiny_latents_are_not_scaled_again(tiny_tiny_vae_dir: Path, images: np.ndarray) -> None:
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny.from_pretrained(tiny_tiny_vae_dir).eval()
    with torch.no_grad():
        expected = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latents.numpy()
    vae = load_vae(str(tiny_tiny_vae_dir), device="cpu")
    assert vae.factor == 8 and vae.identity.options["class"] == "AutoencoderTiny"
    np.testing.assert_allclose(vae.encode(images).astype(np.float32), expected, rtol=2**-7, atol=1e-3)
    assert vae.decode(vae.encode(images)).shape == images.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flux2_latents_have_its_statistics_taken_out(tmp_path: Path, images: np.ndarray, dtype: str) -> None:
    from diffusers import AutoencoderKLFlux2, Flux2Pipeline

    torch.manual_seed(5)
    model = AutoencoderKLFlux2(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4).eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.25, 4)
    model.save_pretrained(tmp_path)
    vae = load_vae(str(tmp_path), device="cpu", dtype=dtype)
    assert (vae.identity.width, vae.factor, vae.identity.options["class"]) == (32, 8, "AutoencoderKLFlux2")
    model = model.to(getattr(torch, dtype))
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(model.dtype) / 127.5 - 1
        raw = Flux2Pipeline._patchify_latents(model.encode(pixels).latent_dist.mean.float())
    statistics = load_file(tmp_path / "diffusion_pytorch_model.safetensors")  # f32, whatever the network is in
    mean, variance = (statistics[f"bn.running_{name}"][:, None, None] for name in ("mean", "var"))
    expected = Flux2Pipeline._unpatchify_latents((raw - mean) / torch.sqrt(variance + 1e-4)).numpy()
    latents = vae.encode(images)
    np.testing.assert_allclose(latents.astype(np.float32), expected, rtol=2**-7, atol=1e-3)
    with pytest.raises(PreprocessError, match=naming("--vae", "64x56", 16)):
        vae.encode(np.zeros((1, 56, 64, 3), np.uint8))
    if dtype == "bfloat16":
        return  # one step of bfloat16 apart, a random network's pictures are levels apart
    back = Flux2Pipeline._patchify_latents(torch.from_numpy(latents.astype(np.float32)))
    back = Flux2Pipeline._unpatchify_latents(back * torch.sqrt(variance + 1e-4) + mean).to(model.dtype)
    with torch.no_grad():
        pixels = model.decode(back).sample.float().permute(0, 2, 3, 1).numpy()
    expected = np.clip(pixels * 127.5 + 127.5, 0, 255)
    assert np.abs(vae.decode(latents) - expected).max() <= 1


def test_vae_in_a_vae_folder_and_in_bfloat16(tiny_vae_dir: Path, images: np.ndarray, tmp_path: Path) -> None:
    shutil.copytree(tiny_vae_dir, tmp_path / "repo" / "vae")
    plain, nested = load_vae(str(tiny_vae_dir), device="cpu"), load_vae(str(tmp_path / "repo"), device="cpu")
    assert plain.identity.sha256 == nested.identity.sha256
    half = load_vae(str(tiny_vae_dir), device="cpu", dtype="bfloat16")
    assert half.identity.dtype == "bfloat16"
    error = np.abs(half.encode(images).astype(np.float32) - plain.encode(images).astype(np.float32))
    assert 0 < error.max() < 0.2


def test_sampled_latents_depend_on_seed_and_image_only(tiny_vae_dir: Path, images: np.ndarray) -> None:
    vae = load_vae(str(tiny_vae_dir), device="cpu", latent="sample", seed=7)
    both, last = vae.encode(images), vae.encode(images[2:])
    np.testing.assert_allclose(both[2].astype(np.float32), last[0].astype(np.float32), rtol=2**-7, atol=1e-3)
    mean = load_vae(str(tiny_vae_dir), device="cpu").encode(images).astype(np.float32)
    other = load_vae(str(tiny_vae_dir), device="cpu", latent="sample", seed=8).encode(images)
    spread = (both.astype(np.float32) - mean).std()
    assert spread > 0.05 and (other.astype(np.float32) - both.astype(np.float32)).std() > spread
    assert vae.identity.options["latent"] == "sample, seed 7"


def test_vae_refuses_sides_it_would_floor(tiny_vae_dir: Path) -> None:
    with pytest.raises(PreprocessError, match=naming("--vae", "64x60", 8)):
        load_vae(str(tiny_vae_dir), device="cpu").encode(np.zeros((1, 60, 64, 3), np.uint8))


def test_text_is_cut_to_its_own_tokens(tiny_t5_dir: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    encoder = load_text_encoder(str(tiny_t5_dir), device="cpu")
    encoded = encoder.encode(CAPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5_dir)
    model = T5EncoderModel.from_pretrained(tiny_t5_dir).eval()
    for caption, array in zip(CAPTIONS, encoded):
        ids = tokenizer(caption, return_tensors="pt").input_ids
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            expected = model(ids).last_hidden_state[0].numpy()
        assert array.dtype == ml_dtypes.bfloat16 and array.shape == expected.shape
        np.testing.assert_allclose(array.astype(np.float32), expected, rtol=2**-7, atol=1e-2)
    assert encoder.truncated == 0 and encoder.identity.width == 64
    assert encoder.identity.options["max_tokens"] == 512


def test_long_captions_keep_the_end_token_and_are_counted(tiny_t5_dir: Path) -> None:
    encoder = load_text_encoder(str(tiny_t5_dir), device="cpu", max_tokens=8)
    long, exact, empty = encoder.encode([" ".join(["dog"] * n) for n in (600, 7, 0)])
    assert len(long) == len(exact) == 8 and len(empty) == 1 and encoder.truncated == 1
    np.testing.assert_array_equal(long, exact)
    assert encoder.encode([]) == []


def test_many_captions_of_mixed_length_come_back_in_order(tiny_t5_dir: Path) -> None:
    encoder = load_text_encoder(str(tiny_t5_dir), device="cpu")
    captions = [" ".join(["dog"] * n) for n in [1, 400, 3, 90, 7, 250, 2] * 30]
    lengths = [len(array) for array in encoder.encode(captions)]
    assert lengths == [n + 1 for n in [1, 400, 3, 90, 7, 250, 2] * 30]


@pytest.mark.parametrize("kind", ["tiny_dino_dir", "tiny_dino2_dir"])
def test_vision_is_the_normed_class_token_of_the_whole_picture(
    kind: str, request: pytest.FixtureRequest, draw_photo
) -> None:
    from transformers import AutoModel

    directory = request.getfixturevalue(kind)
    encoder = load_vision_encoder(str(directory), device="cpu")
    image = draw_photo(112, 224, 5)  # sides fit patches of 14 and 16: no resize
    model = AutoModel.from_pretrained(directory).eval()
    pixels = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        pixels = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
        expected = model(pixels).last_hidden_state[0, 0].numpy()
    vector = encoder.encode(image[None])
    assert vector.dtype == np.float32 and vector.shape == (1, 32)
    np.testing.assert_allclose(vector[0], expected / np.linalg.norm(expected), atol=1e-4)
    assert abs(np.linalg.norm(vector.astype(np.float64)) - 1) < 1e-6
    assert encoder.identity.options["patch"] == (16 if kind == "tiny_dino_dir" else 14)


def test_vision_takes_the_mean_and_std_of_its_file(tiny_dino_dir: Path, draw_photo, tmp_path: Path) -> None:
    """(x - m) / s of [0, 1] pixels: a picture in other units under as much other a mean and std gives the same."""
    import json

    other = Path(shutil.copytree(tiny_dino_dir, tmp_path / "dino"))
    raw = json.loads((other / "preprocessor_config.json").read_text())
    half = {name: [value / 2 for value in raw[name]] for name in ("image_mean", "image_std")}
    (other / "preprocessor_config.json").write_text(json.dumps(raw | half))
    image = draw_photo(96, 160, 0) // 2 * 2
    usual, own = (load_vision_encoder(str(folder), device="cpu") for folder in (tiny_dino_dir, other))
    expected = usual.encode(image[None])
    np.testing.assert_allclose(own.encode((image // 2)[None]), expected, atol=1e-5)
    assert np.abs(own.encode(image[None]) - expected).max() > 1e-3
    assert own.identity.options["mean"] == half["image_mean"] and own.identity.options["std"] == half["image_std"]
    assert own.identity.sha256 != usual.identity.sha256


def test_vision_prepare_is_what_encode_would_do(tiny_dino_dir: Path, draw_photo) -> None:
    encoder = load_vision_encoder(str(tiny_dino_dir), device="cpu")
    image = draw_photo(600, 900, 1)
    prepared = encoder.prepare(image)
    assert prepared.shape == (416, 624, 3)
    np.testing.assert_array_equal(encoder.encode(image[None]), encoder.encode(prepared[None]))


@pytest.mark.parametrize(
    ("size", "patch", "expected"),
    [
        ((1024, 1024), 16, (512, 512)),
        ((1024, 1024), 14, (518, 518)),
        ((512, 2048), 16, (256, 1024)),
        ((128, 128), 14, (126, 126)),
        ((8, 64), 16, (16, 64)),
    ],
)
def test_input_size(size: tuple[int, int], patch: int, expected: tuple[int, int]) -> None:
    assert input_size(*size, patch) == expected


@pytest.mark.parametrize("patch", [14, 16])
def test_a_prepared_picture_is_not_resized_again(patch: int) -> None:
    """Threads prepare ahead of the encoder, which prepares what it is given."""
    for resolution, modulus in ((1024, 64), (768, 32), (512, 64), (256, 64)):
        for size in bucket_table(resolution, modulus):
            shown = input_size(*size, patch)
            assert input_size(*shown, patch) == shown, size


@pytest.mark.parametrize("load", [load_vae, load_text_encoder, load_vision_encoder])
def test_float16_is_refused_with_the_reason(load) -> None:
    with pytest.raises(PreprocessError, match=naming("float16", "bfloat16", "float32")):
        load("builtin:dct", dtype="float16")


def test_a_tokenizer_that_is_only_a_sentencepiece_model(tiny_t5_dir: Path, tmp_path: Path) -> None:
    """As google/t5-v1_1-large ships it: spiece.model and no tokenizer.json."""
    import sentencepiece

    directory = tmp_path / "t5"
    shutil.copytree(tiny_t5_dir, directory)
    (directory / "tokenizer.json").unlink()
    (tmp_path / "words.txt").write_text("\n".join(CAPTIONS * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"),
        model_prefix=str(tmp_path / "words"),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    shutil.copy(tmp_path / "words.model", directory / "spiece.model")
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"extra_ids": 100}))
    encoder = load_text_encoder(str(directory), device="cpu")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "words.model"))
    for caption, array in zip(CAPTIONS, encoder.encode(CAPTIONS)):
        assert len(array) == len(pieces.encode(caption)) + 1
    plain = load_text_encoder(str(tiny_t5_dir), device="cpu").identity
    assert encoder.identity.sha256 != plain.sha256, "the tokenizer is part of the identity"


def test_built_in_encoders_need_no_torch() -> None:
    code = (
        "import sys, numpy as np; from preprocess.encoders import *\n"
        "vae, text = load_vae('builtin:dct'), load_text_encoder('builtin:hash')\n"
        "vision = load_vision_encoder('builtin:tone')\n"
        "image = np.zeros((1, 32, 48, 3), np.uint8)\n"
        "assert vae.encode(image).shape == (1, 16, 4, 6) and vae.factor == vae.identity.options['factor'] == 8\n"
        "assert text.encode(['a dog'])[0].shape == (3, 1024) and vision.encode(image).shape == (1, 1024)\n"
        "print([m for m in ('torch', 'transformers', 'diffusers', 'jax', 'tensorflow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
