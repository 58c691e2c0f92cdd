"""Weight-free stand-ins for the VAE, the text encoder and the vision encoder.

They need no download, so that the whole system runs on a fresh machine. They are for demonstrations and
tests and know nothing of the world: `DctVae` is a block transform and blurs fine detail, `HashText` gives
every word an arbitrary direction ("red" is no nearer to "crimson" than to "boat"), `ToneVision` sees colour
and light and no objects. numpy only, deterministic on every platform. `preprocess.encoders.builtin` gives each its
identity, and bfloat16 where a record has it.

Attributes of all three: `options`, what decides the output besides the input; `constants`, arrays that do.

Shapes are named in suffixes: B images, H x W pixels, h x w blocks, C latent channels, F features.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable

import numpy as np


def _one_by_one(function: Callable[[np.ndarray], np.ndarray], batch: np.ndarray) -> np.ndarray:
    """`function` on batches of one: a matrix product may round differently in a batch of another size, and an
    image's record must not depend on its neighbours. Faster as well: an image fits the cache."""
    return np.concatenate([function(batch[i : i + 1]) for i in range(len(batch))])


def _check_images(images: np.ndarray, name: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"{name} takes uint8 [B, H, W, 3] images, got {images.dtype} {list(images.shape)}")


def area_weights(size: int, count: int) -> np.ndarray:
    """f32 [count, size], of exact area averaging: each row averages `size / count` neighbours, at its ends in part."""
    edges = np.linspace(0, size, count + 1)
    place = np.arange(size)
    overlap = np.minimum(edges[1:, None], place + 1) - np.maximum(edges[:-1, None], place)
    return (np.clip(overlap, 0, None) * count / size).astype(np.float32)


# ---------------------------------------------------------------------------------------------- image codec

_BLOCK = 8
_KEPT = (10, 3, 3)  # coefficients of Y, Cb, Cr: 16 channels of a latent
_SCALE = 0.25  # latents = this x orthonormal coefficients of [-1, 1] images
_SMOOTHING = 4  # decoder iterations, +0.3 to +1.3 dB on photographs; 8 add 0.03 dB more
# Full-range BT.601, as in JPEG.
_RGB_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def _dct_rows(count: int) -> np.ndarray:
    """The first `count` functions of the orthonormal 8x8 DCT-II in JPEG's zig-zag order, [count, 64]."""
    k = np.arange(_BLOCK)
    waves = np.sqrt(2 / _BLOCK) * np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / (2 * _BLOCK))
    waves[0] /= np.sqrt(2)
    # Along anti-diagonals; the direction alternates.
    order = sorted(((u, v) for u in k for v in k), key=lambda p: (p[0] + p[1], p[(p[0] + p[1] + 1) % 2]))
    return np.stack([np.outer(waves[u], waves[v]).ravel() for u, v in order[:count]])


def _to_blocks(plane_BHW: np.ndarray) -> np.ndarray:
    """[B, H, W] to [B, h, w, 64]."""
    B, H, W = plane_BHW.shape
    split = plane_BHW.reshape(B, H // _BLOCK, _BLOCK, W // _BLOCK, _BLOCK)
    return split.transpose(0, 1, 3, 2, 4).reshape(B, H // _BLOCK, W // _BLOCK, _BLOCK * _BLOCK)


def _from_blocks(blocks_Bhw64: np.ndarray) -> np.ndarray:
    """The inverse of `_to_blocks`."""
    B, h, w, _ = blocks_Bhw64.shape
    split = blocks_Bhw64.reshape(B, h, w, _BLOCK, _BLOCK)
    return split.transpose(0, 1, 3, 2, 4).reshape(B, h * _BLOCK, w * _BLOCK)


def _blur(plane_BHW: np.ndarray) -> np.ndarray:
    """Binomial 3x3 filter, edges repeated."""
    p = np.pad(plane_BHW, ((0, 0), (1, 1), (1, 1)), mode="edge")
    p = 0.25 * (p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:])
    return 0.25 * (p[:, :, :-2] + 2 * p[:, :, 1:-1] + p[:, :, 2:])


class DctVae:
    """`builtin:dct`: an orthonormal 8x8 DCT of YCbCr, 10 luma + 3 + 3 chroma of its 192 coefficients.

    Attributes:
      factor: 8 pixels per latent side.
    """

    name, width, factor = "builtin:dct", 16, _BLOCK

    def __init__(self) -> None:
        self._to_ycc = _RGB_TO_YCC.T.astype(np.float32)
        self._to_rgb = np.linalg.inv(_RGB_TO_YCC).T.astype(np.float32)
        self._rows = [_dct_rows(count).astype(np.float32) for count in _KEPT]
        self.options = {"factor": _BLOCK, "kept": list(_KEPT), "scale": _SCALE, "smoothing": _SMOOTHING}
        self.constants = [_RGB_TO_YCC, *self._rows]

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] to float32 [B, 16, H/8, W/8]; the DC of a white block is 2.

        Raises:
          ValueError: not uint8 RGB, or a side is not a multiple of 8.
        """
        _check_images(images, "builtin:dct")
        if images.shape[1] % _BLOCK or images.shape[2] % _BLOCK:
            raise ValueError(
                f"builtin:dct: image sides must be multiples of {_BLOCK}, got {images.shape[2]}x"
                f"{images.shape[1]} (width x height); resize or crop first"
            )
        return _one_by_one(self._encode_one, images)

    def _encode_one(self, images: np.ndarray) -> np.ndarray:
        ycc = (images.astype(np.float32) / 127.5 - 1) @ self._to_ycc
        parts = [_to_blocks(ycc[..., c]) @ rows.T for c, rows in enumerate(self._rows)]
        latents = _SCALE * np.concatenate(parts, axis=-1)
        return np.ascontiguousarray(latents.transpose(0, 3, 1, 2))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Any float [B, 16, h, w] to uint8 [B, 8h, 8w, 3].

        The dropped coefficients are not set to zero but to what makes the picture smoothest: blur, put the
        kept coefficients back, repeat. That removes most block edges, and encoding the result again still
        gives the same latents (up to rounding and clipping).

        Raises:
          ValueError: not a float array of 16 channels.
        """
        latents = np.asarray(latents)
        if latents.ndim != 4 or latents.shape[1] != sum(_KEPT) or latents.dtype.kind in "iub" or not latents.size:
            raise ValueError(
                f"builtin:dct decodes float [B, {sum(_KEPT)}, h, w], got {latents.dtype} {list(latents.shape)}"
            )
        return _one_by_one(self._decode_one, latents)

    def _decode_one(self, latents: np.ndarray) -> np.ndarray:
        coefficients = latents.astype(np.float32).transpose(0, 2, 3, 1) / _SCALE
        planes = []
        for rows in self._rows:
            kept, coefficients = np.split(coefficients, [len(rows)], axis=-1)
            plane = _from_blocks(kept @ rows)
            for _ in range(_SMOOTHING):
                blocks = _to_blocks(_blur(plane))
                plane = _from_blocks(blocks + (kept - blocks @ rows.T) @ rows)
            planes.append(plane)
        rgb = (np.stack(planes, axis=-1) @ self._to_rgb + 1) * 127.5
        return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------ text

_TEXT_WIDTH = 1024
_POSITION_WEIGHT = 0.25  # amplitude of the position against the word's ±1
_WORD = re.compile(r"\w+|[^\w\s]")
_END = "<end>"  # no token of the regular expression looks like this


def _word_vector(word: str) -> np.ndarray:
    """1,024 signs, ±1 float32, from SHAKE-256 of the word: nearly orthogonal for different words."""
    digest = hashlib.shake_256(b"fluxdit word " + word.encode("utf-8", "replace")).digest(_TEXT_WIDTH // 8)
    return np.unpackbits(np.frombuffer(digest, np.uint8)).astype(np.float32) * 2 - 1


def _positions(count: int) -> np.ndarray:
    """Sinusoids of the token index (Vaswani et al. 2017, eq. 5.1), float32 [count, 1024]."""
    half = _TEXT_WIDTH // 2
    angle = np.arange(count)[:, None] * 10_000.0 ** (-np.arange(half) / half)[None]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


class HashText:
    """`builtin:hash`: a fixed pseudo-random vector per word and punctuation mark, plus position.

    Attributes:
      truncated: captions cut to `max_tokens` since construction.
    """

    name, width = "builtin:hash", _TEXT_WIDTH

    def __init__(self, max_tokens: int = 512) -> None:
        if max_tokens < 1:
            raise ValueError(f"builtin:hash: max_tokens must be at least 1, got {max_tokens}")
        self.max_tokens = max_tokens
        self.truncated = 0
        self._position_table = _positions(max_tokens)
        self._vectors: dict[str, np.ndarray] = {}
        self.options = {"max_tokens": max_tokens, "position_weight": _POSITION_WEIGHT, "pattern": _WORD.pattern}
        self.constants = [_word_vector(_END), self._position_table[-1]]

    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """One float32 [n, 1024] per caption, variance about 1; n counts an end token, so n >= 1.

        Case does not matter. A caption of more than `max_tokens` - 1 words is cut before the end token, and
        `truncated` counts it.
        """
        return [self._encode_one(caption) for caption in captions]

    def count(self, captions: list[str]) -> list[int]:
        """Tokens of each caption with the end token, before any is cut."""
        return [len(self._words(caption)) + 1 for caption in captions]

    @staticmethod
    def _words(caption: str) -> list[str]:
        return _WORD.findall(unicodedata.normalize("NFKC", caption).lower())

    def _encode_one(self, caption: str) -> np.ndarray:
        words = self._words(caption)
        if len(words) > self.max_tokens - 1:
            self.truncated += 1
            words = words[: self.max_tokens - 1]
        tokens = np.stack([self._vector(word) for word in [*words, _END]])
        tokens += _POSITION_WEIGHT * self._position_table[: len(tokens)]
        return tokens / np.sqrt(1 + _POSITION_WEIGHT**2 / 2)

    def _vector(self, word: str) -> np.ndarray:
        if word not in self._vectors:
            if len(self._vectors) >= 50_000:  # 200 MB: a bound on memory, not a limit of the vocabulary
                self._vectors.clear()
            self._vectors[word] = _word_vector(word)
        return self._vectors[word]


# ---------------------------------------------------------------------------------------------------- vision

_VISION_WIDTH = 1024
_GRID = 32
_PATCH = 16  # pixels, as of DINOv3
_FLOOR = 0.004  # linear light added before a logarithm: about the darkest grey that a screen shows
_CONSTANT = 2.0  # a feature that never changes, so that the unit norm does not hide how strong the others are
# Name, typical value, spread: stops (log2). The spread is the unit in which a feature counts, about how much
# scenes under one light differ in it (measured on the demonstration set); it is twice that or more for the
# features that say more of the scene than of its light, so that paint does not drown light.
_FEATURES = (
    ("luma_mean", -2.5, 0.4),
    ("luma_contrast", 0.9, 0.4),
    ("luma_p05", -3.9, 0.8),
    ("luma_p95", -1.4, 0.3),
    ("redness_mean", 0.0, 0.6),
    ("warmth_mean", 0.3, 0.7),
    ("redness_lights", 0.2, 0.3),
    ("warmth_lights", 0.3, 0.4),
    ("redness_darks", 0.0, 0.9),
    ("warmth_darks", 0.2, 0.9),
    ("redness_edges", 0.2, 0.25),
    ("warmth_edges", 0.2, 0.25),
    ("luma_x", 0.0, 0.3),
    ("luma_y", 0.2, 0.6),
    ("redness_x", 0.0, 0.4),
    ("redness_y", 0.0, 1.2),
    ("warmth_x", 0.0, 0.4),
    ("warmth_y", -0.2, 1.3),
)


def _hadamard_rows(count: int, width: int) -> np.ndarray:
    """`count` orthonormal rows of length `width`, entries ±1/sqrt(width), chosen by a hash. float32."""
    if width & (width - 1):
        raise ValueError(f"a Hadamard matrix needs a power of two, got {width}")
    seed = hashlib.shake_256(b"fluxdit tone").digest(width // 8 + 8 * width)
    signs = np.unpackbits(np.frombuffer(seed[: width // 8], np.uint8)).astype(np.float32) * 2 - 1
    order = np.argsort(np.frombuffer(seed[width // 8 :], "<u8"), kind="stable")
    overlap = order[:count, None] & np.arange(width)[None]
    parity = np.bitwise_count(overlap) % 2
    return ((1 - 2 * parity.astype(np.float32)) * signs / np.sqrt(width)).astype(np.float32)


class ToneVision:
    """`builtin:tone`: brightness, contrast, colour and the coarse direction of light, in 18 numbers.

    The numbers (`features`) are standardised by fixed constants and carried into 1,024 dimensions by a fixed
    orthonormal matrix, so that angles between vectors are angles between features.

    Attributes:
      names: of the features, in order.
    """

    name, width = "builtin:tone", _VISION_WIDTH
    names = tuple(name for name, _, _ in _FEATURES)

    def __init__(self) -> None:
        code = np.arange(256) / 255  # sRGB to linear light, IEC 61966-2-1
        linear = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
        self._linear = linear.astype(np.float32)
        self._typical, self._spread = np.array([f[1:] for f in _FEATURES], np.float32).T
        self._rows = _hadamard_rows(len(_FEATURES) + 1, _VISION_WIDTH)
        self.options = {
            "grid": _GRID,
            "floor": _FLOOR,
            "constant": _CONSTANT,
            "features": [list(f) for f in _FEATURES],
        }
        self.constants = [self._rows[:, :64] * 32]

    def features(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] of any size to float32 [B, 18], in stops, named by `ToneVision.names`."""
        _check_images(images, "builtin:tone")
        return _one_by_one(self._features_one, images)

    def _features_one(self, images: np.ndarray) -> np.ndarray:
        rows, columns = (area_weights(size, _GRID) for size in images.shape[1:3])
        cells = np.tensordot(rows, self._linear[images[0]], 1)  # [32, W, 3]
        cells = np.tensordot(columns, cells, (1, 1)).transpose(1, 0, 2)[None]  # [1, 32, 32, 3]
        # The colour of the light, by two classical estimates that paint disturbs less than it does the mean:
        # shades of grey (Finlayson and Trezzi 2004, Minkowski norm 6) and grey edge (van de Weijer et al. 2007).
        lights = np.mean(cells**6, axis=(1, 2)) ** (1 / 6)  # [1, 3]
        edges = np.sqrt(np.mean(np.diff(cells, axis=1) ** 2, (1, 2)) + np.mean(np.diff(cells, axis=2) ** 2, (1, 2)))

        cells = cells.reshape(1, -1, 3)
        luma = np.log2(cells @ np.array([0.2126, 0.7152, 0.0722], np.float32) + _FLOOR)  # [1, 1024]

        def opponent(colour: np.ndarray, floor: float = _FLOOR) -> tuple[np.ndarray, np.ndarray]:
            red, green, blue = np.moveaxis(np.log2(colour + floor), -1, 0)
            return red - green, 0.5 * (red + green) - blue

        redness, warmth = opponent(cells)
        darker = (luma <= np.median(luma, axis=1, keepdims=True)).astype(np.float32)
        darker /= darker.sum(1, keepdims=True)

        # From side to side, between medians of the outer fifths: a subject in the middle moves them little, so
        # that the vector does not tell where the subject stands.
        fifth = round(_GRID / 5)

        def across(value: np.ndarray) -> np.ndarray:
            square = value.reshape(-1, _GRID, _GRID)
            left, right = square[:, :, :fifth], square[:, :, -fifth:]
            return np.median(right, axis=(1, 2)) - np.median(left, axis=(1, 2))

        # From bottom to top, the slope of a plane through all cells.
        up = np.repeat((_GRID - 1) / _GRID - 2 * np.arange(_GRID) / _GRID, _GRID).astype(np.float32)

        def upwards(value: np.ndarray) -> np.ndarray:
            return value @ up / (up @ up)

        p05, p95 = np.quantile(luma, [0.05, 0.95], axis=1)
        values = [luma.mean(1), luma.std(1), p05, p95, redness.mean(1), warmth.mean(1), *opponent(lights)]
        values += [(redness * darker).sum(1), (warmth * darker).sum(1), *opponent(edges, _FLOOR / 8)]
        values += [across(luma), upwards(luma)]
        values += [across(redness), upwards(redness), across(warmth), upwards(warmth)]
        return np.stack(values, axis=1).astype(np.float32)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] of any size to float32 [B, 1024], unit L2 norm.

        Raises:
          ValueError: not uint8 RGB.
        """
        return _one_by_one(self._embed_one, self.features(images))

    def encode_patches(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] to float32 [B, h, w, 1024]: brightness and colour of 4 x 4 parts of each 16 pixels."""
        _check_images(images, "builtin:tone")
        height, width = (size // _PATCH for size in images.shape[1:3])
        if min(height, width) < 1:
            raise ValueError(f"builtin:tone: pictures of at least {_PATCH} pixels a side, got {images.shape}")
        part = _PATCH // 4
        linear = self._linear[images[:, : height * _PATCH, : width * _PATCH]]
        parts = linear.reshape(len(images), height, 4, part, width, 4, part, 3).mean(axis=(3, 6))
        parts = np.log2(parts + _FLOOR).transpose(0, 1, 3, 2, 4, 5).reshape(len(images), height, width, 48)
        return (parts @ _hadamard_rows(48, _VISION_WIDTH)).astype(np.float32)

    def _embed_one(self, features: np.ndarray) -> np.ndarray:
        standard = (features - self._typical) / self._spread
        standard = 3 * np.tanh(standard / 3)  # one odd feature must not own the vector
        vector = np.append(standard, [[np.float32(_CONSTANT)]], axis=1) @ self._rows
        return vector / np.linalg.norm(vector)
