"""Token routing: which tokens skip which blocks, what is left of them, and that nothing changes without it."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flops import product_flops
from network_by_hand import predicted
from training_helpers import (
    arguments,
    dropping,
    jitted,
    lively,
    make_batch,
    network_inputs,
    tiny_config,
    tiny_flow,
    tiny_model,
    tiny_step,
    tree_equal,
    write_dataset,
)

from fluxdit_jax import flow
from fluxdit_jax.model import cost, dit
from fluxdit_jax.model.routing import Routed, Routing, reordered
from fluxdit_jax.objective import valid_tokens
from fluxdit_jax.settings import resolve

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

GRIDS = ((4, 6), (5, 3), (2, 7), (1, 1))  # 24, 15, 14 and 1 tokens
HALF = Routing(share=0.5, first=1, last=2)


def routed_of(inputs, routing, seed=0):
    """How a batch of `network_inputs` is routed, as the training step routes it."""
    grid = jnp.asarray(inputs["grid"])
    valid = valid_tokens(grid, inputs["x"].shape[1])
    order = flow.draw_order(seed, jnp.arange(len(grid), dtype=jnp.uint32), valid)
    return Routed(order, routing.kept(grid[:, 0] * grid[:, 1]), routing)


def training_step(routing, **changes):
    return tiny_step(tiny_model(depth=5, **changes), tiny_flow(drop=dropping(0.1, 0.2, 0.2)), routing=routing)


# ------------------------------------------------------------------------------------------------ counts and order


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9])
def test_how_many_tokens_stay(share):
    routing, counts = Routing(share), np.arange(1, 5000, dtype=np.int32)
    exact = [max(1, math.ceil(int(n) * (1 - Fraction(str(share))))) for n in counts]
    kept = np.asarray(routing.kept(jnp.asarray(counts)))
    assert kept.tolist() == exact
    for n, k in zip(counts.tolist(), kept.tolist(), strict=True):
        length = routing.length(n)
        assert k <= length <= n and (length % (128 if n >= 256 else 8) == 0 or length == n)
        assert length - k < 128


def test_a_middle_takes_what_the_ends_leave():
    assert Routing(0.5).middle(28) == (2, 26) and HALF.middle(5) == (1, 3)


def test_the_order_is_random_of_each_sample_and_real_tokens_stay_first():
    grid = jnp.asarray(GRIDS)
    valid = valid_tokens(grid, 24)
    index = jnp.arange(4, dtype=jnp.uint32)
    order = np.asarray(flow.draw_order(7, index, valid))
    for row, (h, w) in zip(order, GRIDS, strict=True):
        assert sorted(row[: h * w]) == list(range(h * w))
        assert row[h * w :].tolist() == list(range(h * w, 24))
    np.testing.assert_array_equal(order[1:], flow.draw_order(7, index[1:], valid[1:]))  # of the sample alone
    assert not np.array_equal(order[0], flow.draw_order(8, index, valid)[0])
    full = jnp.ones((4000, 12), bool)
    many = np.asarray(flow.draw_order(0, jnp.arange(4000, dtype=jnp.uint32), full))
    counts = np.stack([(many == place).mean(axis=0) for place in range(12)])  # each place in each position alike
    assert abs(counts - 1 / 12).max() < 5 * math.sqrt(1 / 12 / 4000)


# ------------------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize("routing", [HALF, Routing(0.75, 0, 0), Routing(0.25, 2, 2), Routing(0.5, 4, 0)])
def test_the_routed_forward_pass_in_closed_form(routing):
    config = tiny_model(width=24, heads=3, depth=5)
    graph, shapes = dit.build(config)
    params, inputs = lively(shapes, scale=0.2), network_inputs(config, grids=GRIDS, tokens=24)
    routed = routed_of(inputs, routing)
    inputs["x"] = np.array(reordered(inputs["x"], routed.order_BxN))
    out = jax.jit(lambda *inputs: dit.apply(graph, params, *inputs, routed))(*arguments(inputs))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    for row, grid in enumerate(inputs["grid"]):
        own, kept = grid.prod(), math.ceil(grid.prod() * (1 - routing.share))
        order = np.asarray(routed.order_BxN[row, :own])
        x = np.empty((own, config.token_width))
        x[order] = inputs["x"][row, :own]
        expected = predicted(
            wide, config, x, inputs["t"][row], grid, inputs["text"][row, : inputs["text_length"][row]],
            inputs["vision"][row], skipped=range(*routing.middle(5)), kept=np.sort(order[:kept]),
        )  # fmt: skip
        np.testing.assert_allclose(out[row, :own], expected[order], rtol=2e-3, atol=2e-3, err_msg=str(row))


def test_an_order_alone_changes_nothing():
    """All tokens kept: the routed network is the network, its tokens in another order."""
    config = tiny_model(depth=5)
    graph, shapes = dit.build(config)
    params, inputs = lively(shapes, scale=0.2), network_inputs(config, grids=GRIDS, tokens=24)
    routed = routed_of(inputs, Routing(0.0, 1, 1))
    plain = dit.apply(graph, params, *arguments(inputs))
    inputs["x"] = np.asarray(reordered(inputs["x"], routed.order_BxN))
    out = dit.apply(graph, params, *arguments(inputs), routed)
    for row, (h, w) in enumerate(GRIDS):
        expected = plain[row][routed.order_BxN[row]][: h * w]
        np.testing.assert_allclose(out[row, : h * w], expected, rtol=1e-4, atol=1e-5)


def test_flops_of_a_routed_step_against_the_program():
    config = tiny_model(width=96, depth=5, heads=3)
    graph, shapes = dit.build(config)
    inputs = network_inputs(config, grids=((6, 8),), tokens=48)
    by_hand = cost.flops_per_sample(config, 48, {"text": 5}, HALF)
    program = jax.make_jaxpr(lambda params: dit.apply(graph, params, *arguments(inputs), routed_of(inputs, HALF)))
    assert by_hand == product_flops(program(shapes).jaxpr) < cost.flops_per_sample(config, 48, {"text": 5})


# ------------------------------------------------------------------------------------------------ the step


def test_routing_of_no_tokens_is_no_routing(tmp_path):
    manifest = write_dataset(tmp_path / "data", train=4, holdout=0, shards=1)
    c = tiny_config(tmp_path / "data", tmp_path / "run")
    plain = resolve(c, manifest)
    c.routing.first, c.routing.last = 0, 0
    assert plain.routing is None and resolve(c, manifest) == plain
    c.routing.share = 0.25
    assert resolve(c, manifest).routing == Routing(0.25, 0, 0)


def test_what_stands_in_padding_does_not_change_a_routed_step():
    state, step = training_step(HALF)
    step, batch = jitted(step), make_batch()
    after = step(state, batch)
    garbage = {name: array.copy() for name, array in batch.items()}
    garbage["latent"][~np.asarray(valid_tokens(batch["grid"], 4))] = 99
    assert tree_equal(step(state, garbage), after)
    assert not tree_equal(jitted(training_step(None)[1])(state, batch)[0].params, after[0].params)


def test_no_gather_enters_the_gradient():
    """What a gather's gradient would be: a scatter-add of floats."""
    state, step = training_step(HALF)
    assert "scatter-add" not in str(jax.make_jaxpr(step.accumulate)(state, make_batch()))


@pytest.mark.parametrize("remat", ["attention"])
def test_remat_does_not_change_a_routed_gradient(remat):
    batch = make_batch()
    state, plain = training_step(HALF)
    _, again = training_step(HALF, remat=remat)
    expected, found = (jax.jit(step.accumulate)(state, batch)[0].opt_state.acc_grads for step in (plain, again))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_each_middle_block_learns_from_the_kept_tokens_alone():
    """The gradient of the stack is one array per parameter, every block's own."""
    state, step = training_step(HALF)
    grads = jax.jit(step.accumulate)(state, make_batch())[0].opt_state.acc_grads
    for leaf in jax.tree.leaves(grads["blocks"]):
        assert leaf.shape[0] == 5 and np.asarray(leaf).reshape(5, -1).any(axis=1).all()
