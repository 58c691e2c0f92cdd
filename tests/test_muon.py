"""Muon: orthogonal within a layer's matrix, of a known size, and Adam for the rest."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from training_helpers import lively, tiny_model, tiny_optimizer

from fluxdit_jax.model import dit
from fluxdit_jax.muon import FUSED, UPDATE_RMS
from fluxdit_jax.optimizer import build_optimizer, is_hidden_matrix, path_name

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def params():
    return lively(dit.build(tiny_model())[1])


def test_muon_on_stacked_layers_is_muon_on_each_layer():
    rng = np.random.default_rng(0)
    depth, rows, columns = 3, 24, 40

    def tree(stack):
        return {"blocks": {"mlp": {"down": {"kernel": stack}}, "table": stack[:, 0]}}

    optimizer = build_optimizer(tiny_optimizer(name="muon", weight_decay=0.1))
    update = jax.jit(optimizer.update)
    weights = rng.normal(size=(depth, rows, columns)).astype(np.float32)
    stacked, state = tree(weights), optimizer.init(tree(weights))
    layers = [tree(weights[i : i + 1]) for i in range(depth)]
    states = [optimizer.init(layer) for layer in layers]
    for _ in range(3):
        gradient = rng.normal(size=weights.shape).astype(np.float32)
        gradient[1] *= 100  # one loud layer does not change the others
        together, state = update(tree(gradient), state, stacked)
        for i in range(depth):
            alone, states[i] = update(tree(gradient[i : i + 1]), states[i], layers[i])
            kernel = together["blocks"]["mlp"]["down"]["kernel"][i]
            np.testing.assert_allclose(kernel, alone["blocks"]["mlp"]["down"]["kernel"][0], rtol=1e-3, atol=1e-7)


def test_muon_orthogonalises_kernels_of_blocks_and_gives_the_rest_to_adam(params):
    lr, adam_lr = 1e-2, 1e-3
    optimizer = build_optimizer(tiny_optimizer(name="muon", lr=lr, adam_lr=adam_lr))
    gradient = lively(params, seed=2)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        update = np.asarray(update)
        if is_hidden_matrix(path):
            for layer in update:
                singular = np.linalg.svd(layer, compute_uv=False) / lr
                scale = 0.2 * np.sqrt(max(layer.shape))
                assert np.mean(singular > 0.6 * scale) > 0.9 and singular.max() < 1.3 * scale, path_name(path)
                assert 0.1 < np.sqrt(np.mean(layer**2)) / lr < 0.25  # as large as AdamW's
        else:
            # optax's Muon uses Nesterov momentum in its Adam too: the first update is 1.47 instead of 1
            np.testing.assert_allclose(np.abs(update), 1.474 * adam_lr, rtol=0.02, err_msg=path_name(path))


def parts_of(tree):
    """The tree with every part of a fused kernel as a kernel of its own."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *modules, name, kernel = path_name(path).split("/") if is_hidden_matrix(path) else (path_name(path), "")
        for number, part in enumerate(np.split(np.asarray(leaf), FUSED.get(name, 1), axis=-1)):
            found["/".join([*modules, f"{name}_{number}", kernel])] = part
    blocks = {name: {"kernel": leaf} for name, leaf in found.items() if name.endswith("/kernel")}
    return {"blocks": blocks, "others": {name: leaf for name, leaf in found.items() if not name.endswith("/kernel")}}


def test_split_kernels_are_updated_as_the_matrices_that_they_are(params):
    """Against Muon on a tree that has query, key, value, gate and up apart, over steps and with weight decay."""
    config = tiny_optimizer(name="muon", weight_decay=0.1, split_fused=True)
    split, plain = build_optimizer(config), build_optimizer(tiny_optimizer(name="muon", weight_decay=0.1))
    state, expected_state = split.init(params), plain.init(parts_of(params))
    update, expected_update, fused_update = map(jax.jit, (split.update, plain.update, plain.update))
    for seed in range(2):
        gradient = lively(params, seed=seed)
        updates, state = update(gradient, state, params)
        expected, expected_state = expected_update(parts_of(gradient), expected_state, parts_of(params))
        for name, leaf in parts_of(updates)["blocks"].items():
            other = expected["blocks"][name]["kernel"]
            np.testing.assert_allclose(leaf["kernel"], other, rtol=1e-3, atol=1e-7, err_msg=name)
    assert jax.tree.map(np.shape, updates) == jax.tree.map(np.shape, params)
    fused, _ = fused_update(gradient, plain.init(params), params)  # the test can fail: it is not what fused ones get
    ours, theirs = (tree["blocks"]["attention"]["qkv"]["kernel"] for tree in (updates, fused))
    assert np.abs(np.asarray(ours) - theirs).max() > 0.1 * np.abs(theirs).max()


@pytest.mark.parametrize("split", [False, True])
def test_the_size_of_updates_is_known_for_every_shape(split):
    """RMS of lr * 0.2, as AdamW's; a tenth and more below, since the iteration's singular values are 0.7 to 1.2."""
    lr, rng = 1e-2, np.random.default_rng(0)
    shapes = {"qkv": (2, 48, 144), "kv": (2, 48, 96), "gate_up": (2, 48, 256), "down": (2, 128, 48), "out": (2, 48, 48)}
    tree = {"blocks": {n: {"kernel": rng.normal(size=s).astype(np.float32)} for n, s in shapes.items()}}
    optimizer = build_optimizer(tiny_optimizer(name="muon", lr=lr, split_fused=split))
    updates, _ = jax.jit(optimizer.update)(tree, optimizer.init(tree), tree)
    for name in shapes:
        for layer in np.asarray(updates["blocks"][name]["kernel"]):
            for part in np.split(layer, FUSED.get(name, 1) if split else 1, axis=-1):
                assert 0.8 < np.sqrt(np.mean(part**2)) / (lr * UPDATE_RMS) < 1.05, name


def test_its_products_are_bfloat16_with_f32_sums_where_the_device_has_them(params):
    optimizer = build_optimizer(tiny_optimizer(name="muon"))
    program = jax.jit(optimizer.update).lower(params, optimizer.init(params), params).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products
    for product in products:
        assert "lhs_precision_type = bf16" in product and "accumulation_type = f32" in product
