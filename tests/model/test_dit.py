"""The network: what may change its output and what may not, and what it costs."""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_helpers import (
    arguments,
    dropping,
    jitted,
    lively,
    make_batch,
    network_inputs,
    tiny_flow,
    tiny_model,
    tiny_optimizer,
    tiny_step,
)

from fluxdit_jax.model import attention, dit, rotary
from fluxdit_jax.optimizer import build_optimizer, gradient_norms, path_name
from fluxdit_jax.state import create_state

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

PROD = dit.ModelConfig(
    width=1152,
    depth=28,
    heads=16,
    patch=2,
    channels=16,
    dtype="bfloat16",
    remat="block",
    attention="xla",
)


class Network:
    """The tiny network with lively weights, compiled once per input shape."""

    def __init__(self, config):
        self.config = config
        self.graph, shapes = dit.build(config)
        self.params = lively(shapes)
        self.run = jax.jit(lambda params, *inputs: dit.apply(self.graph, params, *inputs))

    def __call__(self, inputs, params=None):
        return np.asarray(self.run(self.params if params is None else params, *arguments(inputs)))


@pytest.fixture(scope="module")
def network(quick_compile):
    return Network(tiny_model())


def real_tokens(out, inputs):
    return np.concatenate([out[row, : h * w] for row, (h, w) in enumerate(inputs["grid"])])


# ------------------------------------------------------------------------------------------------ structure


def test_a_new_network_predicts_zero_and_its_blocks_are_the_identity():
    config = tiny_model()
    graph, _ = dit.build(config)
    params = dit.initialize(config, jax.random.key(1))
    inputs = network_inputs(config)
    assert not np.asarray(dit.apply(graph, params, *arguments(inputs))).any()
    params["out"]["kernel"] = jnp.ones_like(params["out"]["kernel"])
    without_blocks = jax.tree.map(jnp.zeros_like, params["blocks"])
    a = dit.apply(graph, params, *arguments(inputs))
    b = dit.apply(graph, params | {"blocks": without_blocks}, *arguments(inputs))
    assert np.asarray(a).any()
    np.testing.assert_array_equal(a, b)


def test_the_seed_decides_the_weights():
    config = tiny_model()
    make = jax.jit(lambda key: dit.initialize(config, key)["blocks"]["mlp"]["down"]["kernel"])
    np.testing.assert_array_equal(make(jax.random.key(3)), make(jax.random.key(3)))
    assert not np.array_equal(make(jax.random.key(3)), make(jax.random.key(4)))


# ------------------------------------------------------------------------------------------------ scan and remat


def test_scan_equals_a_loop_over_the_blocks(network, monkeypatch):
    inputs = network_inputs(network.config)
    weight = np.random.default_rng(1).normal(size=(3, 4, network.config.token_width))

    def value_and_grad():
        def loss(params):
            out = dit.apply(network.graph, params, *arguments(inputs))
            return jnp.sum(out * weight), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(network.params)
        return out, grads

    def unrolled(body, x, stacked, order=(0, 1)):
        for layer in order:
            x, _ = body(x, jax.tree.map(lambda leaf: leaf[layer], stacked))  # noqa: B023
        return x, None

    scanned = value_and_grad()
    monkeypatch.setattr(jax.lax, "scan", unrolled)
    looped = value_and_grad()
    np.testing.assert_array_equal(scanned[0], looped[0])
    for path, (a, b) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: (a, b), scanned[1], looped[1]), is_leaf=lambda x: isinstance(x, tuple)
    ):
        # the gradient of what every block shares is summed in another order
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * np.abs(a).max(), err_msg=path_name(path))
    monkeypatch.setattr(jax.lax, "scan", lambda *args: unrolled(*args, order=(1, 0)))
    assert not np.allclose(scanned[0], value_and_grad()[0], rtol=1e-2)


def test_remat_policies_compute_the_same_and_keep_ever_less():
    inputs = network_inputs(tiny_model(), grids=((4, 4), (3, 5)), tokens=16)
    results, kept = {}, {}
    for policy in dit.REMAT_POLICIES:
        graph, shapes = dit.build(tiny_model(remat=policy))

        def loss(params, graph=graph):
            return jnp.mean(jnp.square(dit.apply(graph, params, *arguments(inputs))))

        params = lively(shapes)
        results[policy] = jax.jit(jax.value_and_grad(loss))(params)
        saved = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
        kept[policy] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(saved))
    for policy, result in results.items():
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(result), jax.tree.leaves(results["none"]), strict=True
        ):
            np.testing.assert_allclose(
                a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max(), err_msg=f"{policy} {jax.tree_util.keystr(path)}"
            )
    assert kept["none"] > kept["dots"] > kept["attention"] > kept["block"], kept
    two_attentions = 2 * 2 * (2 * 16 * 32)  # in each of 2 blocks, for 2 samples of 16 tokens of width 32
    assert kept["attention"] - kept["block"] == two_attentions


def test_attention_that_is_kept_is_not_computed_again(monkeypatch):
    """One head at a time, the forward pass has one exp and the backward pass another."""
    monkeypatch.setattr(attention, "_LOGITS_AT_ONCE", 0)
    inputs = network_inputs(tiny_model(), grids=((4, 4), (3, 5)), tokens=16)

    def exponentials(policy):
        graph, shapes = dit.build(tiny_model(remat=policy))

        def loss(params):
            return jnp.sum(dit.apply(graph, params, *arguments(inputs)))

        return str(jax.make_jaxpr(jax.grad(loss))(lively(shapes))).count("= exp ")

    assert exponentials("none") == exponentials("dots") == exponentials("attention") == exponentials("block") - 2


# ------------------------------------------------------------------------------------------------ padding and masks


def test_padding_tokens_change_nothing(network):
    inputs = network_inputs(network.config)
    out = network(inputs)
    # what stands in them
    garbage = inputs | {"x": inputs["x"].copy()}
    for row, (h, w) in enumerate(inputs["grid"]):
        garbage["x"][row, h * w :] = 100.0
    assert not np.array_equal(garbage["x"], inputs["x"])
    np.testing.assert_array_equal(real_tokens(network(garbage), inputs), real_tokens(out, inputs))
    # how many there are
    longer = inputs | {"x": np.pad(inputs["x"], ((0, 0), (0, 5), (0, 0)))}
    np.testing.assert_allclose(real_tokens(network(longer), inputs), real_tokens(out, inputs), rtol=1e-4, atol=1e-5)
    # a real token does matter
    changed = inputs | {"x": inputs["x"].copy()}
    changed["x"][0, 3] += 0.1
    assert (np.abs(network(changed) - out)[0].max(axis=1) > 1e-4).all()


def test_samples_of_a_batch_do_not_see_each_other(network):
    inputs = network_inputs(network.config)
    alone = {name: array[1:2] for name, array in inputs.items()}
    np.testing.assert_allclose(network(alone)[0, :3], network(inputs)[1, :3], rtol=1e-4, atol=1e-5)


def test_the_text_mask_is_used(network):
    inputs = network_inputs(network.config)
    out = network(inputs)
    beyond, within = inputs["text"].copy(), inputs["text"].copy()
    for row, length in enumerate(inputs["text_length"]):
        beyond[row, length:] = 50.0
        within[row, length - 1] += 0.5
    assert not np.array_equal(beyond, inputs["text"])
    np.testing.assert_array_equal(network(inputs | {"text": beyond}), out)
    assert (np.abs(network(inputs | {"text": within}) - out).max(axis=(1, 2)) > 1e-4).all()
    longer = inputs | {"text": np.pad(inputs["text"], ((0, 0), (0, 4), (0, 0)))}
    np.testing.assert_allclose(network(longer), out, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ conditions


def test_every_input_reaches_the_output(network):
    inputs = network_inputs(network.config)
    out = network(inputs)
    changes = {
        "x": inputs["x"] + 0.1,
        "t": inputs["t"] + 0.05,
        "grid": inputs["grid"][:, ::-1],
        "text": inputs["text"] + 0.3,
        "vision": -inputs["vision"],
        "keep_text": ~inputs["keep_text"],
        "keep_vision": ~inputs["keep_vision"],
    }
    for name, value in changes.items():
        moved = np.abs(network(inputs | {name: value}) - out).max(axis=(1, 2))
        rows = slice(1, 3) if name == "grid" else slice(None)  # 2 x 2 is its own transpose
        assert (moved[rows] > 1e-4).all(), name


@pytest.mark.parametrize(
    ("keep", "ignored", "null"),
    [("keep_text", ("text", "text_length"), "null_text"), ("keep_vision", ("vision",), "null_vision")],
)
def test_a_dropped_condition_is_wholly_replaced_by_its_null(network, keep, ignored, null):
    inputs = network_inputs(network.config)
    dropped = inputs | {keep: np.array([False, True, False])}
    other = dict(dropped)
    for name in ignored:
        other[name] = np.roll(inputs[name], 1, axis=0)
    out, out_other = network(dropped), network(other)
    np.testing.assert_array_equal(out_other[[0, 2]], out[[0, 2]])
    assert not np.allclose(out_other[1], out[1], atol=1e-4)
    params = network.params | {null: network.params[null] + 1}
    moved = np.abs(network(dropped, params) - out).max(axis=(1, 2)) > 1e-4
    assert moved.tolist() == [True, False, True]
    kept = {name: array[1:2] for name, array in dropped.items()}
    np.testing.assert_allclose(
        network(dropped)[1, :3], network(kept | {keep: np.array([True])})[0, :3], rtol=1e-4, atol=1e-5
    )


@pytest.fixture(scope="module")
def two_steps(quick_compile):
    """(graph, params after two optimizer steps from the real start, the state, the step) with dropped conditions."""
    config = tiny_model()
    state, parts = tiny_step(config, tiny_flow(drop=dropping(0.2, 0.2, 0.2)), ema_target=0.999, global_batch_size=16)
    start = jax.jit(lambda key: dit.initialize(config, key))(jax.random.key(0))
    state, step = create_state(start, build_optimizer(tiny_optimizer())), jitted(parts)
    for number in range(2):
        state, _ = step(state, make_batch(size=16, first_index=16 * number))
    return dit.build(config)[0], state, step


def test_conditions_reach_the_output_after_two_steps(two_steps):
    graph, state, _ = two_steps
    inputs = network_inputs(tiny_model())
    run = jax.jit(lambda *inputs: dit.apply(graph, state.params, *inputs))
    out = np.asarray(run(*arguments(inputs)))
    for name in ("t", "text", "vision", "keep_text", "keep_vision"):
        value = ~inputs[name] if inputs[name].dtype == bool else inputs[name][::-1]
        moved = np.abs(np.asarray(run(*arguments(inputs | {name: value}))) - out).max()
        assert moved > 1e-7, name


def test_every_parameter_has_gradient_after_two_steps(two_steps):
    _, state, step = two_steps
    after, _ = step(state, make_batch(size=16, first_index=32))
    norms = gradient_norms(after.opt_state)
    assert {"blocks/attention", "blocks/cross", "blocks/mlp", "blocks/table"} < norms.groups.keys()
    assert len(norms.groups) == 14
    for name, norm in norms.groups.items():
        assert norm > 0, name
    # Adam's first moment is a mean of the three gradients: zero only where all were
    moments = after.opt_state.inner_opt_state[2][0].mu
    for path, leaf in jax.tree_util.tree_leaves_with_path(moments):
        name = path_name(path)
        layers = np.asarray(leaf) if name.startswith("blocks/") else np.asarray(leaf)[None]
        for number, layer in enumerate(layers):
            assert np.any(layer), f"{name} layer {number}"
    for part in np.split(np.asarray(moments["modulation"]["kernel"]), 9, axis=1):
        assert np.any(part)


# ------------------------------------------------------------------------------------------------ positions


def test_rotary_positions_are_relative_and_tell_rows_from_columns():
    grid, head_dim = np.array([[5, 7]], np.int32), 16
    cos, sin = rotary.rotary(grid, np.arange(35)[None], head_dim)
    rng = np.random.default_rng(0)
    q, k = (np.broadcast_to(rng.normal(size=head_dim), (1, 35, 1, head_dim)) for _ in range(2))
    rotated = [np.asarray(rotary.rotate(jnp.asarray(x, jnp.float32), cos, sin))[0, :, 0] for x in (q, k)]
    np.testing.assert_allclose(np.linalg.norm(rotated[0], axis=1), np.linalg.norm(q[0, 0, 0]), rtol=1e-6)
    products = (rotated[0] @ rotated[1].T).reshape(5, 7, 5, 7)
    by_offset: dict[tuple[int, int], list[float]] = {}
    for r, c, r2, c2 in np.ndindex(products.shape):
        by_offset.setdefault((r2 - r, c2 - c), []).append(products[r, c, r2, c2])
    means = {offset: np.mean(values) for offset, values in by_offset.items()}
    for offset, values in by_offset.items():
        assert np.ptp(values) < 1e-4, offset
    distinct = np.sort(list(means.values()))
    assert len(means) == 9 * 13 and np.diff(distinct).min() > 1e-5  # no two offsets look alike
    assert abs(means[1, 0] - means[0, 1]) > 1e-2


def test_the_picture_cannot_be_told_from_its_shifted_tokens_only_by_the_grid(network):
    """The same tokens as 1 x 4, 2 x 2 and 4 x 1 are three different pictures."""
    inputs = {name: array[:1] for name, array in network_inputs(network.config).items()}
    outs = [network(inputs | {"grid": np.array([grid], np.int32)}) for grid in ((1, 4), (2, 2), (4, 1))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(outs[a] - outs[b]).max() > 1e-3


# ------------------------------------------------------------------------------------------------ precision and cost


def test_bfloat16_is_near_float32(network):
    bf16 = Network(tiny_model(dtype="bfloat16"))
    inputs = network_inputs(network.config)
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), network.params)
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), cast)
    out = bf16(inputs, cast)
    assert out.dtype == np.float32
    exact = network(inputs, rounded)
    a, b = real_tokens(out, inputs), real_tokens(exact, inputs)
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert 1e-4 < error < 0.03, error  # it is bf16, and it is near


def test_counting_the_production_model_allocates_nothing():
    D, hidden, head = 1152, 3072, 72
    block = 3 * D * D + D * D + 2 * head  # self-attention
    block += D * D + 2 * D * D + D * D + 2 * head  # cross-attention
    block += 3 * D * hidden + 7 * D
    ends = (64 * D + D) + (256 * D + D) + (D * D + D) + (1024 * D + D) + D  # patch, time, vision, its null
    ends += 1024 + (1024 * D + D) + D  # text, its null
    ends += 9 * D * D + 9 * D + (D * 64 + 64)
    before = {id(array) for array in jax.live_arrays()}
    started = time.monotonic()
    count = dit.count_parameters(PROD)
    assert time.monotonic() - started < 60
    assert count == 28 * block + ends
    assert {id(array) for array in jax.live_arrays()} <= before
    assert 400e6 < count < 650e6
