"""The weight-free encoders, on real photographs where it matters."""

import ml_dtypes
import numpy as np
import pytest
import skimage.data
from PIL import Image
from wording import naming

from fluxdit_jax.dataset.manifest import EncoderIdentity
from preprocess.encoders.builtin import DctVae, HashText, ToneVision


def photo(name: str, height: int, width: int) -> np.ndarray:
    image = Image.fromarray(getattr(skimage.data, name)()[..., :3])
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    return np.stack([photo(name, 256, 384) for name in ("astronaut", "chelsea", "coffee", "rocket")])


def test_identities_are_complete_and_tell_definitions_apart():
    identities = [DctVae().identity, HashText().identity, ToneVision().identity]
    assert all(isinstance(identity, EncoderIdentity) for identity in identities)
    assert [i.id for i in identities] == ["builtin:dct", "builtin:hash", "builtin:tone"]
    assert [i.width for i in identities] == [16, 1024, 1024]
    assert all(len(i.sha256) == 64 and i.revision == "1" and i.dtype == "float32" for i in identities)
    assert identities[0].options["factor"] == 8
    assert HashText(64).identity.sha256 != HashText(128).identity.sha256
    assert HashText(64).identity == HashText(64).identity


def test_dct_layout_and_photographs(photos):
    vae = DctVae()
    latents = vae.encode(photos)
    assert latents.shape == (4, 16, 32, 48) and latents.dtype == ml_dtypes.bfloat16
    decoded = vae.decode(latents)
    assert decoded.shape == photos.shape and decoded.dtype == np.uint8
    values = [psnr(a, b) for a, b in zip(photos, decoded)]
    assert min(values) > 25 and np.median(values) > 27, values
    # What decoding invents lies outside the kept coefficients (clipping aside): encoding it changes little.
    again = vae.encode(decoded).astype(np.float32)
    drift = np.sqrt(np.mean((again - latents.astype(np.float32)) ** 2))
    assert drift < 0.02 * latents.astype(np.float32).std()


def test_dct_decode_matches_the_plain_inverse_with_fewer_block_edges(photos):
    """Against scipy's DCT with the dropped coefficients at zero."""
    from scipy.fft import dctn, idctn

    vae = DctVae()
    grey = np.repeat(photos.mean(-1, keepdims=True), 3, axis=-1).astype(np.uint8)
    zigzag = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)]
    blocks = (grey[..., 0] / 127.5 - 1).reshape(4, 32, 8, 48, 8)
    spectrum = dctn(blocks, axes=(2, 4), norm="ortho")
    latents = vae.encode(grey).astype(np.float32)
    for channel, (u, v) in enumerate(zigzag):
        np.testing.assert_allclose(latents[:, channel], 0.25 * spectrum[:, :, u, :, v], rtol=0.005, atol=1e-5)
    assert np.abs(latents[:, 10:]).max() < 0.01  # grey has no chroma

    mask = np.zeros((8, 8))
    mask[tuple(zip(*zigzag))] = 1
    plain = idctn(spectrum * mask[:, None], axes=(2, 4), norm="ortho").reshape(4, 256, 384)
    plain = np.clip(np.rint((plain + 1) * 127.5), 0, 255)
    smooth = vae.decode(latents)[..., 0].astype(np.float64)
    original = grey[..., 0].astype(np.float64)
    gains = [psnr(o, s) - psnr(o, p) for o, s, p in zip(original, smooth, plain)]
    assert min(gains) > 0.1 and np.mean(gains) > 0.3, gains


def test_dct_flat_colours_survive():
    colours = np.array([[0, 0, 0], [255, 255, 255], [200, 30, 60], [10, 90, 240]], np.uint8)
    images = np.tile(colours[:, None, None], (1, 16, 24, 1))
    latents = DctVae().encode(images).astype(np.float32)
    assert latents[1, 0, 0, 0] == pytest.approx(2) and latents[0, 0, 0, 0] == pytest.approx(-2)
    assert np.abs(DctVae().decode(latents).astype(int) - images).max() <= 2


def test_dct_refuses_what_it_would_have_to_floor():
    with pytest.raises(ValueError, match=naming(8, "32x20")):
        DctVae().encode(np.zeros((1, 20, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="float32"):
        DctVae().encode(np.zeros((1, 16, 32, 3), np.float32))
    with pytest.raises(ValueError, match="16, h, w"):
        DctVae().decode(np.zeros((1, 4, 8, 8), np.float32))


def test_hash_text_words_and_lengths():
    text = HashText()
    empty, upper, lower, other = text.encode(["", "A woman, LEFT", "a woman, left", "a woman, right"])
    assert empty.shape == (1, 1024) and upper.shape == (5, 1024) and upper.dtype == ml_dtypes.bfloat16
    assert (upper == lower).all()
    same = (lower == other).all(axis=1)
    assert same.tolist() == [True, True, True, False, True]
    assert all(abs(part.astype(np.float32).var() - 1) < 0.1 for part in (empty, upper, other))


def test_hash_text_is_the_same_everywhere():
    """The first signs of two words and the pull of position, written down once."""
    token = HashText().encode(["left left"])[0].astype(np.float32)
    bits = "".join("1" if v > 0 else "0" for v in token[0, :32])
    assert bits == "01011110001010101101000010100000"
    cosine = token[0] @ token[1] / np.linalg.norm(token[0]) / np.linalg.norm(token[1])
    assert 0.95 < cosine < 0.9999


def test_hash_text_vectors_of_words_are_nearly_orthogonal():
    words = [f"word{i}" for i in range(200)]
    text = HashText()
    vectors = np.stack([v[0].astype(np.float32) for v in text.encode(words)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = vectors @ vectors.T - np.eye(200)
    assert np.abs(cosine).max() < 0.25


def test_hash_text_counts_truncations():
    text = HashText(max_tokens=4)
    short, exact, cut = text.encode(["one two", "one two three", "one two three four"])
    assert [len(short), len(exact), len(cut)] == [3, 4, 4]
    assert text.truncated == 1
    assert (exact == cut).all()


def test_an_image_does_not_depend_on_its_batch(photos):
    """Bitwise, or a record would change with the neighbours it was encoded with."""
    many = np.concatenate([photos[:, :104, :136], photos[:, 104:208, 136:272], photos[:, ::2, ::2][:, :104, :136]])
    vae, tone = DctVae(), ToneVision()
    latents, vectors = vae.encode(many), tone.encode(many)
    decoded = vae.decode(latents)
    for i in range(len(many)):
        one = slice(i, i + 1)
        assert vae.encode(many[one]).tobytes() == latents[one].tobytes()
        assert tone.encode(many[one]).tobytes() == vectors[one].tobytes()
        assert vae.decode(latents[one]).tobytes() == decoded[one].tobytes()


def test_tone_is_unit_and_independent_of_size_and_batch(photos):
    tone = ToneVision()
    vectors = tone.encode(photos)
    assert vectors.shape == (4, 1024) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(tone.encode(photos[2:3])[0], vectors[2], atol=1e-6)
    half = [Image.fromarray(p).resize((192, 128), Image.Resampling.BOX) for p in photos]
    smaller = tone.encode(np.stack([np.asarray(p) for p in half]))
    assert (vectors * smaller).sum(1).min() > 0.995
    others = vectors @ vectors.T - 2 * np.eye(4)
    assert others.max() < (vectors * smaller).sum(1).min()


def test_tone_features_say_what_they_are_called(photos):
    tone = ToneVision()
    ramp = np.linspace(0.3, 1.0, 384)[None, :, None]
    right = tone.features((photos * ramp).astype(np.uint8))
    left = tone.features((photos * ramp[:, ::-1]).astype(np.uint8))
    down = tone.features((photos * np.linspace(0.3, 1.0, 256)[:, None, None]).astype(np.uint8))
    warm = tone.features((photos * np.array([1.0, 0.85, 0.6])).astype(np.uint8))
    base = tone.features(photos)
    index = {name: i for i, name in enumerate(tone.names)}
    assert (right[:, index["luma_x"]] > base[:, index["luma_x"]] + 0.5).all()
    assert (left[:, index["luma_x"]] < base[:, index["luma_x"]] - 0.5).all()
    assert (down[:, index["luma_y"]] < base[:, index["luma_y"]] - 0.5).all()
    assert (warm[:, index["warmth_mean"]] > base[:, index["warmth_mean"]] + 0.3).all()
    assert (warm[:, index["luma_mean"]] < base[:, index["luma_mean"]]).all()


def test_tone_embedding_keeps_angles():
    """Angles between vectors are angles between features, and black has a vector too."""
    tone = ToneVision()
    assert np.abs(tone._rows @ tone._rows.T - np.eye(len(tone._rows))).max() < 1e-6
    black = tone.encode(np.zeros((1, 8, 8, 3), np.uint8))
    assert np.isfinite(black).all()
    with pytest.raises(ValueError, match="uint8"):
        tone.encode(np.zeros((8, 8, 3), np.uint8))
