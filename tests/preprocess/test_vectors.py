"""Precomputed vision vectors: accepted, normalised, or refused with the reason."""

from __future__ import annotations

import io
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxdit_jax.dataset.fields import VISION
from preprocess import PreprocessError
from preprocess.decoding.images import Rejected
from preprocess.input.precomputed import VISION_WIDTH, Folder, parse


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


GOOD = np.random.default_rng(0).normal(size=1024).astype(np.float32)


@pytest.mark.parametrize(
    "array", [GOOD, GOOD * 100, GOOD.astype(np.float64), GOOD[None], GOOD[:, None], GOOD.astype("f2")]
)
def test_good_vectors_get_unit_length(array: np.ndarray) -> None:
    vector = parse(npy(array), VISION, VISION_WIDTH)
    assert vector.dtype == np.float32 and vector.shape == (1024,)
    np.testing.assert_allclose(vector, GOOD / np.linalg.norm(GOOD), atol=1e-4)
    assert abs(np.linalg.norm(vector.astype(np.float64)) - 1) < 1e-6


def changed(value: float) -> np.ndarray:
    array = GOOD.copy()
    array[7] = value
    return array


HUGE = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(127) + b"\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(GOOD[:768]), "wrong vector shape"),
        (npy(GOOD.reshape(32, 32)), "wrong vector shape"),
        (npy(np.stack([GOOD, GOOD])), "wrong vector shape"),
        (HUGE, "wrong vector shape"),
        (npy(np.arange(1024)), "wrong vector type"),
        (npy(GOOD)[:-4], "wrong vector type"),
        (npy(np.array([{"a": 1}] * 1024, dtype=object)), "wrong vector type"),
        (npy(changed(np.nan)), "vector is not finite"),
        (npy(changed(np.inf)), "vector is not finite"),
        (npy(np.zeros(1024, np.float32)), "vector without length"),
        (b"", "not a .npy vector"),
        (b"PK\x03\x04 a zip", "not a .npy vector"),
        (b"\x93NUMPY\x01\x00\x10\x00__import__('os')", "not a .npy vector"),
    ],
)
def test_bad_vectors(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse(data, VISION, VISION_WIDTH)
    assert caught.value.reason == reason


@given(
    st.binary(max_size=300) | st.binary(max_size=150).map(lambda b: npy(GOOD)[: len(b)] + b + npy(GOOD)[2 * len(b) :])
)
@settings(deadline=None, max_examples=300)
def test_any_bytes(data: bytes) -> None:
    try:
        vector = parse(data, VISION, VISION_WIDTH)
    except Rejected:
        return
    assert np.isfinite(vector).all() and abs(np.linalg.norm(vector.astype(np.float64)) - 1) < 1e-5


def test_names(tmp_path: Path) -> None:
    for name in ("a.jpg.npy", "b.npy", "sub/c.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(npy(GOOD))
    vectors = Folder(VISION, str(tmp_path), lambda: ["a.jpg", "a.png", "b.jpg", "d.png", "sub/c.jpg", "sub/c.png"])
    for key in ("a.jpg", "b.jpg"):
        assert vectors.read(key)[1].shape == (1024,)
    for key, message in (
        ("a.png", r"\ba\.png\.npy\b.*\ba\.npy\b"),
        ("sub/c.png", r"\bseveral\b.*\bsub/c\b"),
    ):
        with pytest.raises(Rejected, match=message):
            vectors.read(key)
    with pytest.raises(PreprocessError, match=f"--vision-embeddings {tmp_path / 'nowhere'}"):
        Folder(VISION, str(tmp_path / "nowhere"), list)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("suffix", ["", ".jpg"])
def test_a_vector_whose_name_composes_accents_in_another_way(tmp_path: Path, form: str, suffix: str) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    np.save(tmp_path / (unicodedata.normalize(other, "Café") + suffix + ".npy"), GOOD)
    key = unicodedata.normalize(form, "Café") + ".jpg"
    _, vector = Folder(VISION, str(tmp_path), lambda: [key]).read(key)
    np.testing.assert_allclose(vector, GOOD / np.linalg.norm(GOOD), atol=1e-6)
