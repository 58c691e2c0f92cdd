"""Matrix products in the form that XLA's CPU backend runs fast; elsewhere plain ones.

The CPU backend hands a product to YNNPACK, which multiplies bfloat16 at twice the speed of float32, only if
the operands are bfloat16 and the result float32, the left operand is contracted over its last axis, and both
lie in memory as their shapes say. Everything else is converted to float32 first, and the gradient of a dense
layer, xᵀ dy, is of that kind.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def product_f32(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """The product of two matrices of one dtype over the given axes, as f32.

    The barrier keeps a transposition of the result from being folded into the product, which would bring back a
    form that the library does not take (in bfloat16 the CPU backend then fails when it runs).
    """
    y = jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(y)


def transpose(x_MxK: jax.Array) -> jax.Array:
    """The transpose [K, M] laid out anew in memory, not folded into the product that reads it."""
    return jax.lax.optimization_barrier(x_MxK.T.reshape(-1)).reshape(x_MxK.shape[::-1])


@jax.custom_vjp
def _matmul_cpu(x_MxK: jax.Array, w_KxN: jax.Array) -> jax.Array:
    return product_f32(x_MxK, w_KxN, 1, 0).astype(x_MxK.dtype)


def _forward(x_MxK: jax.Array, w_KxN: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul_cpu(x_MxK, w_KxN), (x_MxK, w_KxN)


def _backward(kept: tuple[jax.Array, jax.Array], dy_MxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_MxK, w_KxN = kept
    dx = product_f32(dy_MxN, w_KxN, 1, 1).astype(x_MxK.dtype)
    dw = product_f32(transpose(x_MxK), dy_MxN, 1, 0).astype(w_KxN.dtype)
    return dx, dw


_matmul_cpu.defvjp(_forward, _backward)


def matmul(x_MxK: jax.Array, w_KxN: jax.Array) -> jax.Array:
    """x w in the dtype of x, which is that of w; sums are f32 on every backend."""
    return _matmul_cpu(x_MxK, w_KxN) if jax.default_backend() == "cpu" else jnp.dot(x_MxK, w_KxN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeat_rows_cpu(x_BxD: jax.Array, rows: int) -> jax.Array:
    return jnp.broadcast_to(x_BxD[:, None], (x_BxD.shape[0], rows, x_BxD.shape[1]))


def _repeat_forward(x_BxD: jax.Array, rows: int) -> tuple[jax.Array, None]:
    return _repeat_rows_cpu(x_BxD, rows), None


def _repeat_backward(rows: int, _: None, dy_BxNxD: jax.Array) -> tuple[jax.Array]:
    dy_BxNxD = jax.lax.optimization_barrier(dy_BxNxD)  # what makes it is not to be drawn into the product
    ones_Bx1xN = jnp.ones((dy_BxNxD.shape[0], 1, rows), dy_BxNxD.dtype)
    contracted = (((2,), (1,)), ((0,), (0,)))
    dx = jax.lax.dot_general(ones_Bx1xN, dy_BxNxD, contracted, preferred_element_type=jnp.float32)
    return (dx[:, 0].astype(dy_BxNxD.dtype),)


_repeat_rows_cpu.defvjp(_repeat_forward, _repeat_backward)


def repeat_rows(x_BxD: jax.Array, rows: int) -> jax.Array:
    """x as every row of each sample: [B, rows, D] on a CPU, elsewhere [B, 1, D], which broadcasts to that.

    The gradient is the sum over the rows, in f32, rounded once. On a CPU it is a product with ones: XLA's CPU
    backend is slow at sums over an axis that is not the last.
    """
    return _repeat_rows_cpu(x_BxD, rows) if jax.default_backend() == "cpu" else x_BxD[:, None]


def row_major(x: jax.Array) -> jax.Array:
    """x; on a GPU it and its gradient lie in memory as the shape says, last axis fastest.

    XLA lays out what it sums over an axis with that axis fastest. The gradients of shifts, scales and gates are sums
    over the tokens, so without this the whole backward loop works on [B, D, N] and transposes every input and output
    of a product.
    """
    if jax.default_backend() != "gpu":
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
