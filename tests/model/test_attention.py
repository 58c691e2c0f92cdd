"""Attention against a plain numpy softmax in float64, on both XLA branches."""

from __future__ import annotations

import jax
import jax.extend.core  # of its own: `import jax` alone does not bring it
import jax.numpy as jnp
import numpy as np
import pytest

from fluxdit_jax.device.sharding import make_mesh
from fluxdit_jax.model import attention
from fluxdit_jax.model.attention import attend, choose_implementation

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

BRANCHES = ("at_once", "by_head")


@pytest.fixture(params=BRANCHES)
def branch(request, monkeypatch):
    """Forces one of the two ways of the XLA path."""
    monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", 2**40 if request.param == "at_once" else 0)
    return request.param


def draw(shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def reference(q, k, v, lengths):
    """softmax(q kᵀ / sqrt(d)) v sample by sample and head by head, over the valid keys alone."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, length in enumerate(lengths):
        for h in range(q.shape[2]):
            logits = q[b, :, h] @ k[b, :length, h].T / np.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[b, :, h] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :length, h]
    return out


@pytest.mark.parametrize("keys", [5, 9])
def test_equals_the_softmax_over_the_valid_keys(branch, keys):
    B, N, H, d = 3, 5, 2, 8
    q, k, v = draw((B, N, H, d), 0), draw((B, keys, H, d), 1), draw((B, keys, H, d), 2)
    lengths = np.array([1, 3, keys], np.int32)
    out = attend(q, k, v, lengths, "xla")
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, reference(q, k, v, lengths), rtol=1e-5, atol=1e-6)


def test_what_stands_beyond_the_length_is_not_seen(branch):
    q, k, v = draw((2, 4, 2, 4), 0), draw((2, 6, 2, 4), 1), draw((2, 6, 2, 4), 2)
    lengths = np.array([2, 5], np.int32)
    before = attend(q, k, v, lengths, "xla")
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = 1e4, -1e4
    np.testing.assert_array_equal(attend(q, k, v, lengths, "xla"), before)
    k[0, 1] += 1
    assert not np.array_equal(attend(q, k, v, lengths, "xla")[0], before[0])


def test_large_logits_do_not_overflow(branch):
    q, k, v = draw((1, 4, 1, 4), 0) * 1e3, draw((1, 4, 1, 4), 1) * 1e3, draw((1, 4, 1, 4), 2)
    out = attend(q, k, v, np.array([4], np.int32), "xla")
    np.testing.assert_allclose(out, reference(q, k, v, [4]), rtol=1e-3, atol=1e-4)


def test_both_branches_and_their_gradients_agree(monkeypatch):
    q, k, v = draw((2, 6, 3, 4), 0), draw((2, 5, 3, 4), 1), draw((2, 5, 3, 4), 2)
    lengths, weight = np.array([2, 5], np.int32), draw((2, 6, 3, 4), 3)

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v, lengths, "xla") * weight)

    results = []
    for limit in (2**40, 0):
        monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", limit)
        results.append(jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)


def test_the_branch_is_chosen_by_the_number_of_logits(monkeypatch):
    q, lengths = draw((2, 4, 3, 4), 0), np.array([4, 4], np.int32)

    def has_loop():
        return "scan" in str(jax.make_jaxpr(lambda q: attend(q, q, q, lengths, "xla"))(q))

    monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", 2 * 3 * 4 * 4)
    assert not has_loop()
    monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", 2 * 3 * 4 * 4 - 1)
    assert has_loop()


@pytest.mark.parametrize(("queries", "loop"), [(1024, False), (1025, True)])
def test_up_to_8_mib_of_logits_are_made_at_once(queries, loop):
    q, k = (jax.ShapeDtypeStruct((1, n, 16, 8), jnp.float32) for n in (queries, 128))
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    program = jax.make_jaxpr(lambda *inputs: attend(*inputs, "xla"))(q, k, k, lengths)
    assert ("scan" in str(program)) == loop


@pytest.mark.parametrize(
    ("primitive", "name", "kept"),
    [
        ("dot_product_attention_fwd_wrapper", None, True),
        ("dot_product_attention_bwd_wrapper", None, False),
        ("name", "attention", True),
        ("name", "product", False),
        ("exp", "attention", False),
        ("exp", None, False),
    ],
)
def test_what_is_kept_for_the_backward_pass(primitive, name, kept):
    parameters = {} if name is None else {"name": name}
    assert attention.keep(jax.extend.core.Primitive(primitive), **parameters) == kept


def test_only_samples_are_split_over_a_mesh_that_is_set():
    x = jax.ShapeDtypeStruct((2, 3, 4, 8), jnp.float32)
    assert not jax.make_jaxpr(attention._split_by_sample)(x).jaxpr.eqns
    with jax.set_mesh(make_mesh(1, 1, 2)):
        (constraint,) = jax.make_jaxpr(attention._split_by_sample)(x).jaxpr.eqns
    spec = constraint.params["sharding"].spec
    assert set(spec[0]) == {"data", "fsdp"} and not any(spec[1:])


def test_bfloat16_uses_f32_logits_and_softmax(branch):
    q, k, v = (draw((1, 64, 2, 16), seed, jnp.bfloat16) for seed in range(3))
    q = (q * 8).astype(jnp.bfloat16)  # logits up to about 30, which bf16 would round by 0.06
    out = attend(q, k, v, np.array([60], np.int32), "xla")
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out, np.float64) - reference(q, k, v, [60])).max()
    assert error < 0.015  # one rounding of the weights and one of the sums; 0.05 with bf16 logits


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="of machines without a GPU")
def test_choice_without_a_gpu_is_xla():
    assert choose_implementation("bfloat16", 64) == "xla"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "expected"),
    [
        ("bfloat16", 64, "cudnn"),
        ("bfloat16", 128, "cudnn"),
        ("float32", 64, "xla"),
        ("bfloat16", 136, "xla"),
        ("bfloat16", 60, "xla"),
    ],
)
def test_choice_on_a_gpu(monkeypatch, dtype, head_dim, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_implementation(dtype, head_dim) == expected


def test_an_unknown_implementation_is_refused_by_name():
    q, lengths = draw((1, 2, 1, 4), 0), np.array([2], np.int32)
    with pytest.raises(ValueError, match="'cudnn' or 'xla', got 'flash'"):
        attend(q, q, q, lengths, "flash")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("keys", [64, 24])  # of the picture itself, of a caption
def test_cudnn_equals_xla_forward_and_backward(keys):
    q, k, v = (jnp.asarray(draw((2, n, 4, 64), s), jnp.bfloat16) for s, n in enumerate((64, keys, keys)))
    lengths, weight = np.array([keys // 2 + 1, keys], np.int32), draw((2, 64, 4, 64), 3)

    def loss(implementation):
        def f(q, k, v):
            out = attend(q, k, v, lengths, implementation).astype(jnp.float32)
            return jnp.sum(out * weight), out

        return jax.grad(f, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    for a, b in zip(jax.tree.leaves(loss("cudnn")), jax.tree.leaves(loss("xla")), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)
