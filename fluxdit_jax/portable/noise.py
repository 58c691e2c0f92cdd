"""The noise that a picture starts from: a function of its seed, the same bits on every device. numpy only.

The integers are JAX's (`jax.random.key` of the seed, Threefry 2x32), and the normal numbers those that
`jax.random.normal` makes of them, but for the last bit of one in a hundred, where devices do not agree either.

Sources: Salmon et al. 2011 (Threefry, doi:10.1145/2063384.2063405); Giles 2010 (the inverse error function).
"""

from __future__ import annotations

import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# Of erfinv(x) / x in w = -log(1 - x^2): in w - 2.5 below 5, else in sqrt(w) - 3; the highest power first.
_CENTRE = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
           -0.00417768164, 0.246640727, 1.50140941)  # fmt: skip
_TAIL = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
         0.00943887047, 1.00167406, 2.83297682)  # fmt: skip


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers, f32.

    Args:
      seed: 0 to 2**32 - 1.
    """
    return (np.float32(np.sqrt(2)) * _inverse_error_function(_uniform(_bits(seed, int(np.prod(shape)))))).reshape(shape)


def _bits(seed: int, count: int) -> np.ndarray:
    """uint32 [count]: each a Threefry block of its own number, its two halves combined."""
    number = np.arange(count, dtype=np.uint64)
    keys = (np.uint32(0), np.uint32(seed), np.uint32(seed) ^ np.uint32(0x1BD11BDA))
    a, b = (number >> np.uint64(32)).astype(np.uint32) + keys[0], number.astype(np.uint32) + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            a = a + b
            b = a ^ ((b << np.uint32(rotation)) | (b >> np.uint32(32 - rotation)))
        a, b = a + keys[(block + 1) % 3], b + keys[(block + 2) % 3] + np.uint32(block + 1)
    return a ^ b


def _uniform(bits: np.ndarray) -> np.ndarray:
    """f32 in (-1, 1), of 23 bits each."""
    low = np.nextafter(np.float32(-1), np.float32(0))
    share = ((bits >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)
    return np.maximum(low, share * (np.float32(1) - low) + low)


def _inverse_error_function(x: np.ndarray) -> np.ndarray:
    """f32; each step is rounded to f32 once, as with fused multiply and add."""
    w = -np.log1p(-(x * x).astype(np.float64)).astype(np.float32)
    centre = w < 5
    w = np.where(centre, w - np.float32(2.5), np.sqrt(w) - np.float32(3))
    p = np.where(centre, np.float32(_CENTRE[0]), np.float32(_TAIL[0]))
    for a, b in zip(_CENTRE[1:], _TAIL[1:], strict=True):
        addend = np.where(centre, np.float32(a), np.float32(b))
        p = (addend.astype(np.float64) + p.astype(np.float64) * w).astype(np.float32)
    return p * x
