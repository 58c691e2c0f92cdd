"""Matrix products of the CPU path: values and gradients against float64, in both dtypes and odd shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxdit_jax.model import attention
from fluxdit_jax.model.matmul import matmul, repeat_rows, transpose

# Elsewhere both are XLA's own product and broadcasting, in TF32 for float32 on a GPU.
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the CPU path")


def draw(shape, seed, dtype):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 48, 80), (1, 16, 8), (33, 1, 7), (5, 9, 1)])
def test_value_and_gradients(dtype, shape):
    M, K, N = shape
    x, w, dy = draw((M, K), 0, dtype), draw((K, N), 1, dtype), draw((M, N), 2, dtype)

    @jax.jit
    def run(x, w, dy):
        y, back = jax.vjp(matmul, x, w)
        return y, *back(dy)

    got = run(x, w, dy)
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    for result, exact in zip(got, (x @ w, dy @ w.T, x.T @ dy), strict=True):
        assert result.dtype == dtype
        error = np.linalg.norm(np.asarray(result, np.float64) - exact) / np.linalg.norm(exact)
        assert error < (1e-5 if dtype == "float32" else 4e-3), error  # one rounding of the sum to bf16


def test_transpose():
    x = draw((3, 5), 0, "bfloat16")
    np.testing.assert_array_equal(np.asarray(jax.jit(transpose)(x)), np.asarray(x).T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_of_repeated_rows_is_their_sum_rounded_once(dtype):
    x, dy = draw((2, 24), 0, dtype), draw((2, 300, 24), 1, dtype)

    @jax.jit
    def run(x, dy):
        y, back = jax.vjp(lambda x: repeat_rows(x, 300), x)
        return y, back(dy)[0]

    y, dx = run(x, dy)
    np.testing.assert_array_equal(np.asarray(y), np.repeat(np.asarray(x)[:, None], 300, axis=1))
    exact = np.asarray(dy, np.float64).sum(axis=1)
    assert dx.dtype == dtype
    assert np.linalg.norm(np.asarray(dx, np.float64) - exact) < (1e-6 if dtype == "float32" else 3e-3) * np.linalg.norm(
        exact
    )


def test_bfloat16_attention_head_by_head_has_the_gradients_of_the_plain_one(monkeypatch):
    q, k, v, g = (draw((2, 32, 3, 16), seed, "bfloat16") for seed in range(4))
    lengths = np.array([20, 32], np.int32)
    results = []
    for limit in (2**40, 0):
        monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", limit)
        back = jax.jit(lambda q, k, v, g: jax.vjp(lambda *a: attention.attend(*a, lengths, "xla"), q, k, v)[1](g))
        results.append(back(q, k, v, g))
    for a, b in zip(*results, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)
