"""The network against float64 numpy: its parts, its initial weights, the whole forward pass, and its cost."""

from __future__ import annotations

import math

import jax
import jax.extend.core  # of its own: `import jax` alone does not bring it
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flops import product_flops
from network_by_hand import predicted
from training_helpers import TEXT_WIDTH, VISION_WIDTH, arguments, conditions, lively, network_inputs, tiny_model

from fluxdit_jax.model import cost, dit, rotary
from fluxdit_jax.model.conditions import Condition, given, joined
from fluxdit_jax.optimizer import path_name

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

# ------------------------------------------------------------------------------------------------ parts


def test_widths_that_follow_from_others():
    for width in (32, 192, 384, 1152, 2304):  # of the MLP: 8/3, rounded up to 64
        hidden = tiny_model(width=width).mlp_hidden
        assert hidden % 64 == 0 and 0 <= 3 * hidden - 8 * width < 3 * 64
    assert tiny_model(width=96, heads=3).head_dim == 32
    assert [tiny_model(channels=16, patch=patch).token_width for patch in (1, 2, 3)] == [16, 64, 144]


def test_rotary_angles_in_closed_form():
    cos, sin = rotary.rotary(np.array([[2, 3], [3, 2]], np.int32), np.arange(7)[None], head_dim=16)
    assert cos.shape == sin.shape == (2, 7, 8)
    for sample, columns in enumerate((3, 2)):
        for token in range(7):
            row, column = divmod(token, columns)
            angles = [p * 100.0 ** (-pair / 4) for p in (row, column) for pair in range(4)]
            np.testing.assert_allclose(cos[sample, token], np.cos(angles), atol=1e-6)
            np.testing.assert_allclose(sin[sample, token], np.sin(angles), atol=1e-6)


def test_time_features_in_closed_form():
    t = np.array([0.0, 0.25, 1.0], np.float32)
    features = dit.time_features(t)
    assert features.shape == (3, dit.TIME_FEATURES) and features.dtype == jnp.float32
    frequencies = 10_000.0 ** (-np.arange(128) / 128)
    angles = 1000.0 * t[:, None].astype(np.float64) * frequencies
    np.testing.assert_allclose(features, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=2e-4)
    # neighbouring noise levels near 1 stay apart, which they would not in bf16
    close = np.asarray(dit.time_features(np.array([0.999, 0.9995], np.float32)))
    assert np.abs(close[0] - close[1]).max() > 0.1


def test_rms_norm_in_closed_form():
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32) * 50
    scale = np.linspace(0.5, 2, 64, dtype=np.float32)
    exact = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True)) * scale
    np.testing.assert_allclose(dit.rms_norm(x, scale), exact, rtol=1e-5)
    assert not np.asarray(dit.rms_norm(jnp.zeros((2, 8)))).any()
    # f32 inside: only the result is rounded to bf16
    x = x.astype(ml_dtypes.bfloat16)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-6)
    rounded = exact.astype(ml_dtypes.bfloat16)
    assert np.mean(np.asarray(dit.rms_norm(jnp.asarray(x))) == rounded) > 0.98


# ------------------------------------------------------------------------------------------------ the whole


def test_the_forward_pass_in_closed_form():
    """Of four pictures of other sizes: both conditions, one, the other, none."""
    config = tiny_model(width=24, heads=3, depth=2)
    graph, shapes = dit.build(config)
    params = lively(shapes)
    inputs = network_inputs(config, grids=((2, 3), (3, 1), (1, 5), (2, 2)), tokens=6)
    inputs["keep_text"][2:], inputs["keep_vision"][1::2] = False, False
    out = np.asarray(jax.jit(lambda *inputs: dit.apply(graph, params, *inputs))(*arguments(inputs)))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    for row, grid in enumerate(inputs["grid"]):
        text = inputs["text"][row, : inputs["text_length"][row]].astype(np.float64) if row < 2 else None
        vision = inputs["vision"][row].astype(np.float64) if row % 2 == 0 else None
        own = grid.prod()
        expected = predicted(
            wide, config, inputs["x"][row, :own].astype(np.float64), inputs["t"][row], grid, text, vision
        )
        np.testing.assert_allclose(out[row, :own], expected, rtol=2e-3, atol=2e-3, err_msg=str(row))


# ------------------------------------------------------------------------------------------------ weights


def test_initialize_makes_the_tree_that_build_describes():
    _, shapes = dit.build(tiny_model())
    params = jax.jit(lambda key: dit.initialize(tiny_model(), key))(jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    for path, (leaf, shape) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: (a, b), params, shapes), is_leaf=lambda x: isinstance(x, tuple)
    ):
        assert (leaf.shape, leaf.dtype) == (shape.shape, jnp.float32), path_name(path)


def test_the_parameters_of_a_network():
    """Checkpoints and exports hold these names and shapes."""
    D, P, depth, head = 32, 16, 2, 16
    layers = {  # name: (inputs, outputs, whether it has a bias)
        "blocks/attention/qkv": (D, 3 * D, False), "blocks/attention/out": (D, D, False),
        "blocks/cross/q": (D, D, False), "blocks/cross/kv": (D, 2 * D, False), "blocks/cross/out": (D, D, False),
        "blocks/mlp/gate_up": (D, 256, False), "blocks/mlp/down": (128, D, False),
        "patch_embed": (P, D, True), "time_in": (256, D, True), "time_out": (D, D, True),
        "text_embed": (TEXT_WIDTH, D, True), "vision_embed": (VISION_WIDTH, D, True),
        "modulation": (D, 9 * D, True), "out": (D, P, True),
    }  # fmt: skip
    expected = {
        "null_text": (D,), "null_vision": (D,), "text_scale": (TEXT_WIDTH,), "blocks/table": (depth, 7, D),
        **{f"blocks/{part}/{name}_scale": (depth, head) for part in ("attention", "cross") for name in "qk"},
    }  # fmt: skip
    for name, (inputs, outputs, bias) in layers.items():
        stacked = (depth,) if name.startswith("blocks/") else ()
        expected[f"{name}/kernel"] = (*stacked, inputs, outputs)
        expected |= {f"{name}/bias": (outputs,)} if bias else {}
    shapes = dit.build(tiny_model())[1]
    found = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert found == expected


def test_initial_weights():
    config = tiny_model(width=128, depth=3, conditions=conditions(text=64))
    params = jax.jit(lambda key: dit.initialize(config, key))(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, leaf = path_name(path), np.asarray(leaf)
        if name == "out/kernel" or name.endswith("bias") or name.endswith("table"):
            assert not leaf.any(), name
        elif name.startswith("null"):
            assert abs(leaf.std() / {"null_text": 1.0, "null_vision": 0.02}[name] - 1) < 0.3, name
        elif name.endswith("_scale"):
            assert (leaf == 1).all(), name
        elif name == "modulation/kernel":
            parts = leaf.reshape(128, 9, 128)
            gates = [2, 3, 6]
            assert not parts[:, gates].any()
            rest = np.delete(parts, gates, axis=1)
            assert abs(rest.std() * math.sqrt(128) - 0.1) < 0.01
        elif name.endswith("kernel"):
            fan_in = leaf.shape[-2]
            assert abs(leaf.std() * math.sqrt(fan_in) - 1) < 0.05, name  # 0.987 with the cut at 3 sigma
            assert abs(leaf).max() * math.sqrt(fan_in) < 3.001, name
            assert abs(leaf.mean()) * math.sqrt(fan_in * leaf.size) < 5 * math.sqrt(fan_in), name
    stacked = params["blocks"]["mlp"]["down"]["kernel"]
    assert not np.array_equal(stacked[0], stacked[1])
    assert not np.array_equal(stacked[1], stacked[2])


# ------------------------------------------------------------------------------------------------ cost


@pytest.mark.parametrize("policy", dit.REMAT_POLICIES)
def test_every_policy_but_none_computes_blocks_again(policy):
    graph, shapes = dit.build(tiny_model(remat=policy))
    program = jax.make_jaxpr(lambda params: dit.apply(graph, params, *arguments(network_inputs(tiny_model()))))(shapes)
    assert ("remat" in str(program)) == (policy != "none")


def test_two_sequences_and_two_vectors_in_closed_form():
    """Every combination of dropped conditions; the sequences of a sample have lengths of their own."""
    kinds = (*conditions(), Condition("depth", 7, sequence=True), Condition("pose", 3))
    config = tiny_model(width=24, heads=3, depth=2, conditions=kinds)
    graph, shapes = dit.build(config)
    params = lively(shapes)
    grids = [(2, 2), (1, 3), (3, 1), (1, 1)] * 4
    inputs, rng = network_inputs(config, grids=grids), np.random.default_rng(3)
    pose = rng.normal(size=(16, 3))
    extra = {
        "depth": rng.normal(size=(16, 6, 7)).astype(np.float32),
        "depth_length": (1 + np.arange(16) % 6).astype(np.int32),
        "pose": (pose / np.linalg.norm(pose, axis=1, keepdims=True)).astype(np.float32),
    }
    for row, length in enumerate(extra["depth_length"]):
        extra["depth"][row, length:] = 50  # what stands in the padding has no meaning
    batch = inputs | extra
    names = [kind.name for kind in kinds]
    keep = {name: np.arange(16) // 2**bit % 2 == 0 for bit, name in enumerate(names)}
    run = jax.jit(lambda *inputs: dit.apply(graph, params, *inputs))
    out = np.asarray(run(inputs["x"], inputs["t"], inputs["grid"], given(kinds, batch, keep)))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    for row, grid in enumerate(inputs["grid"]):
        values = [
            batch[kind.name][row, : batch[f"{kind.name}_length"][row] if kind.sequence else None].astype(np.float64)
            for kind in kinds
        ]
        values = [value if keep[name][row] else None for name, value in zip(names, values, strict=True)]
        own = grid.prod()
        x = inputs["x"][row, :own].astype(np.float64)
        more = list(zip(names[2:], values[2:], strict=True))
        expected = predicted(wide, config, x, inputs["t"][row], grid, *values[:2], more)
        np.testing.assert_allclose(out[row, :own], expected, rtol=2e-3, atol=2e-3, err_msg=str(row))


def test_sequences_are_joined_without_gaps():
    rng = np.random.default_rng(0)
    first, second, third = (rng.normal(size=(5, length, 2)).astype(np.float32) for length in (3, 2, 4))
    lengths = np.array([[1, 1, 1], [3, 2, 4], [2, 1, 4], [3, 1, 1], [1, 2, 3]], np.int32)
    tokens, length = joined([(part, lengths[:, k]) for k, part in enumerate((first, second, third))])
    assert tokens.shape == (5, 9, 2) and length.tolist() == lengths.sum(1).tolist()
    for row, counts in enumerate(lengths):
        own = [part[row, :count] for part, count in zip((first, second, third), counts, strict=True)]
        np.testing.assert_array_equal(tokens[row, : counts.sum()], np.concatenate(own))
    ((alone, same),) = [joined([(first, lengths[:, 0])])]
    assert alone is first and same.tolist() == lengths[:, 0].tolist()


@pytest.mark.parametrize("depth", [1, 3])
def test_flops_against_the_program_and_against_xla(depth):
    config = tiny_model(width=192, depth=depth, heads=3, conditions=conditions(128, 96), channels=16)
    graph, shapes = dit.build(config)
    tokens, text_tokens = 48, 24
    inputs = network_inputs(config, grids=((6, 8),), tokens=tokens, text_tokens=text_tokens)
    by_hand = cost.flops_per_sample(config, tokens, {"text": text_tokens})

    def run(params):
        return dit.apply(graph, params, *arguments(inputs))

    assert by_hand == product_flops(jax.make_jaxpr(run)(shapes).jaxpr)
    if depth == 1:  # XLA counts the body of a scan once, and also norms, rotations, softmax and gates
        counted = jax.jit(run).lower(shapes).cost_analysis()["flops"]
        assert 0.95 < by_hand / counted <= 1.0, (by_hand, counted)
