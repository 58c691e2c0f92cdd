"""Schedules, masks, clipping and norms, against closed forms on the real parameter tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_helpers import lively, tiny_model, tiny_optimizer, tree_equal

from fluxdit_jax.model import dit
from fluxdit_jax.optimizer import (
    build_optimizer,
    ema_decay,
    gradient_norms,
    group_name,
    group_norms,
    is_hidden_matrix,
    is_matrix,
    learning_rate,
    path_name,
)

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")


def leaves(tree):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def params():
    return lively(dit.build(tiny_model())[1])


# ------------------------------------------------------------------------------------------------ schedules


def test_constant_schedule_with_warmup():
    schedule = learning_rate(tiny_optimizer(warmup_steps=5), peak=2.0)
    np.testing.assert_allclose([schedule(i) for i in range(8)], [0.4, 0.8, 1.2, 1.6, 2, 2, 2, 2], rtol=1e-6)
    assert float(schedule(10**6)) == 2.0


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_cosine_schedule(warmup):
    config = tiny_optimizer(schedule="cosine", warmup_steps=warmup, total_steps=110, final_fraction=0.1)
    schedule = learning_rate(config, peak=3.0)
    for step in range(0, 130, 3):
        if step < warmup:
            expected = 3.0 * (step + 1) / warmup
        else:
            share = min(1.0, (step - warmup) / (110 - warmup))
            expected = 3.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * share)))
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, err_msg=str(step))


def test_the_first_update_is_not_nothing():
    for warmup in (0, 1, 2, 1000):
        assert float(learning_rate(tiny_optimizer(warmup_steps=warmup), 1.0)(0)) > 0


def test_a_warmup_as_long_as_the_run():
    config = tiny_optimizer(schedule="cosine", warmup_steps=10, total_steps=10)
    np.testing.assert_allclose(learning_rate(config, 1.0)(9), 1.0, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ names and masks


def test_names_on_the_real_tree(params):
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = {path_name(path) for path in paths}
    kernels = {path_name(path) for path in paths if is_matrix(path)}
    assert kernels == {name for name in names if name.endswith("kernel")}
    assert {path_name(path) for path in paths if is_hidden_matrix(path)} == {
        f"blocks/{part}/kernel"
        for part in (
            "attention/qkv",
            "attention/out",
            "cross/q",
            "cross/kv",
            "cross/out",
            "mlp/gate_up",
            "mlp/down",
        )
    }
    groups = {group_name(path) for path in paths}
    blocks = {"blocks/attention", "blocks/cross", "blocks/mlp", "blocks/table"}
    assert {group for group in groups if "/" in group} == blocks
    assert {"patch_embed", "null_text", "null_vision", "modulation", "out", "text_scale"} < groups


@pytest.mark.parametrize(("name", "decayed"), [("adamw", is_matrix), ("muon", is_hidden_matrix)])
def test_weight_decay_is_for_matrices_and_never_for_the_rest(params, name, decayed):
    optimizer = build_optimizer(tiny_optimizer(name=name, lr=0.1, adam_lr=0.1, weight_decay=0.5))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for (path, update), param in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        if decayed(path):
            np.testing.assert_allclose(update, -0.05 * param, rtol=1e-5, err_msg=path_name(path))
        elif not is_matrix(path):  # optax's muon decays no matrix that it leaves to Adam
            assert not np.any(update), path_name(path)


def test_an_unknown_optimizer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"optim\.name\b.*'adamw', 'muon'.*'sgd'"):
        build_optimizer(tiny_optimizer(name="sgd"))


# ------------------------------------------------------------------------------------------------ norms and clipping


def test_norms_in_closed_form(params):
    total, groups = group_norms(params)
    squares: dict[str, float] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = group_name(path)
        squares[name] = squares.get(name, 0.0) + float(np.sum(leaf.astype(np.float64) ** 2))
    assert groups.keys() == squares.keys()
    for name, square in squares.items():
        np.testing.assert_allclose(groups[name], np.sqrt(square), rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(total, np.sqrt(sum(squares.values())), rtol=1e-5)


def test_norms_of_bf16_are_summed_in_f32():
    tree = {"a": jnp.ones((100_000,), jnp.bfloat16)}
    np.testing.assert_allclose(group_norms(tree)[0], np.sqrt(100_000), rtol=1e-5)


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_clipping_by_the_global_norm_and_norms_from_before_it(params, clip):
    optimizer = build_optimizer(tiny_optimizer(grad_clip_norm=clip))
    gradient = lively(params, seed=1)
    _, state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    norm, groups = group_norms(gradient)
    np.testing.assert_allclose(gradient_norms(state).total, norm, rtol=1e-6)
    for name, value in groups.items():
        np.testing.assert_allclose(gradient_norms(state).groups[name], value, rtol=1e-5)
    factor = min(1.0, clip / float(norm))
    for name, moment in leaves(state.inner_opt_state[2][0].mu).items():
        np.testing.assert_allclose(moment, 0.1 * factor * leaves(gradient)[name], rtol=1e-4, atol=1e-7, err_msg=name)


def test_adamw_is_optax_adamw(params):
    """Three steps against optax itself with the same numbers."""
    config = tiny_optimizer(weight_decay=0.1, warmup_steps=2)
    ours = build_optimizer(config)
    theirs = optax.adamw(
        lambda i: 1e-3 * jnp.minimum(1.0, (i + 1) / 2),
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        mask=jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith("kernel"), params),
    )
    a, b = ours.init(params), theirs.init(params)
    update_a, update_b = jax.jit(ours.update), jax.jit(theirs.update)
    for seed in range(3):
        gradient = lively(params, seed=seed)
        mine, a = update_a(gradient, a, params)
        other, b = update_b(gradient, b, params)
        for name, value in leaves(mine).items():
            np.testing.assert_allclose(value, leaves(other)[name], rtol=1e-4, atol=1e-9, err_msg=name)


# ------------------------------------------------------------------------------------------------ accumulation, EMA


def test_accumulation_is_the_mean_and_counts_optimizer_steps(params):
    config = tiny_optimizer(grad_accum_steps=3, eps=1e-2)
    optimizer, whole = build_optimizer(config), build_optimizer(tiny_optimizer(eps=1e-2))
    gradients = [lively(params, seed=seed) for seed in range(3)]
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for number, gradient in enumerate(gradients):
        assert int(state.gradient_step) == 0 and int(state.mini_step) == number
        updates, state = update(gradient, state, params)
        assert any(np.any(leaf) for leaf in jax.tree.leaves(updates)) == (number == 2)
    assert (int(state.gradient_step), int(state.mini_step)) == (1, 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.acc_grads))
    mean = jax.tree.map(lambda *parts: sum(parts) / 3, *gradients)
    expected, _ = jax.jit(whole.update)(mean, whole.init(params), params)
    for name, value in leaves(updates).items():
        np.testing.assert_allclose(value, leaves(expected)[name], rtol=1e-3, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_everything_the_optimizer_keeps_is_f32(params, name):
    state = jax.eval_shape(build_optimizer(tiny_optimizer(name=name)).init, params)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32), leaf
    assert not tree_equal(params, jax.tree.map(jnp.zeros_like, params))


def test_ema_decay_in_closed_form():
    steps = np.array([0, 1, 9, 90, 8_990, 89_980, 89_990, 10**7], np.int32)
    decays = [float(ema_decay(jnp.asarray(step), 0.9999)) for step in steps]
    expected = [0.1, 2 / 11, 10 / 19, 0.91, 8_991 / 9_000, 89_981 / 89_990, 0.9999, 0.9999]
    np.testing.assert_allclose(decays, expected, rtol=1e-6)
    assert float(ema_decay(jnp.asarray(0), 0.05)) == np.float32(0.05)
