"""Alignment with stored patches: the right patch for every token, the gradient's place, and its end."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_helpers import REPOSITORY, arguments, lively, make_batch, network_inputs, tiny_model, tiny_step

from fluxdit_jax import alignment, flow
from fluxdit_jax.alignment import AlignmentConfig
from fluxdit_jax.dataset import cells
from fluxdit_jax.model import dit
from fluxdit_jax.model.routing import Routed, Routing
from fluxdit_jax.objective import valid_tokens

pytest_plugins = ("training_fixtures",)

# ------------------------------------------------------------------------------------------------ the right patch


def test_each_token_has_the_cell_that_covers_its_middle():
    rng = np.random.default_rng(0)
    grids = np.array([(4, 6), (16, 16), (5, 3), (1, 7), (20, 12), (32, 8)], np.int32)
    for _ in range(20):
        wanted = rng.integers(1, 33, (len(grids), 2)).astype(np.int32)
        index = np.stack([rng.permutation(256) % grid.prod() for grid in grids]).astype(np.int32)
        found = np.asarray(alignment.cell_of_token(jnp.asarray(index), jnp.asarray(grids), jnp.asarray(wanted)))
        for row, ((rows, columns), (m, n)) in enumerate(zip(grids, wanted, strict=True)):
            y, x = np.divmod(index[row], columns)
            expected = np.floor((y + 0.5) * m / rows + 1e-9) * n + np.floor((x + 0.5) * n / columns + 1e-9)
            np.testing.assert_array_equal(found[row], expected)


def test_a_target_is_the_patch_less_the_pictures_mean_whatever_stands_in_the_padding():
    rng = np.random.default_rng(1)
    grids, counts = np.array([(4, 4), (2, 6)], np.int32), np.array([(2, 2), (1, 3)], np.int32)
    plain = [rng.normal(size=(n.prod(), 8)).astype(np.float32) * 3 for n in counts]
    rows = np.full((2, 5, 10), 77, np.int8)
    for row, values in enumerate(plain):
        rows[row, : len(values)] = cells.packed(values)
    index = np.stack([rng.permutation(16), np.arange(16)]).astype(np.int32)
    found = alignment.targets(jnp.asarray(rows), jnp.asarray(counts), jnp.asarray(grids), jnp.asarray(index))
    for row, values in enumerate(plain):
        centred = cells.unpacked(rows[row, : len(values)]) - cells.unpacked(rows[row, : len(values)]).mean(axis=0)
        own = grids[row].prod()
        one = (each[row : row + 1] for each in (index, grids, counts))
        place = np.asarray(alignment.cell_of_token(*one))[0]
        real = index[row] < own
        np.testing.assert_allclose(np.asarray(found[row])[real], centred[place[real]], atol=1e-5)
        np.testing.assert_allclose(cells.unpacked(rows[row, : len(values)]), values, atol=0.05)


def test_the_loss_in_closed_form():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 2, 5, 7)).astype(np.float32)
    cosines = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    expected = [np.mean(1 - cosines[0, :3]), np.mean(1 - cosines[1])]
    np.testing.assert_allclose(alignment.loss(a, b, np.array([3, 5])), expected, rtol=1e-5)
    gradient = jax.grad(lambda a: alignment.loss(a, jnp.zeros((1, 2, 3)), np.array([2])).sum())(jnp.zeros((1, 2, 3)))
    assert np.isfinite(gradient).all()


# ------------------------------------------------------------------------------------------------ the step


def step_of(depth: int, aligned: AlignmentConfig | None, routing: Routing | None = None, tap: int = 2, **changes):
    """(state, step) of a tiny network; without alignment it has no projector."""
    config = tiny_model(depth=depth, tap=tap if aligned else 0, target_width=6 if aligned else 0, **changes)
    return tiny_step(config, flow.FlowConfig(), routing=routing, aligned=aligned)


def batch_with_patches() -> dict[str, np.ndarray]:
    rng, batch = np.random.default_rng(3), make_batch()
    batch["cells"] = batch["grid"].copy()
    batch["patches"] = np.zeros((4, 4, 8), np.int8)
    for row, count in enumerate(batch["grid"].prod(axis=1)):
        batch["patches"][row, :count] = cells.packed(rng.normal(size=(count, 6)).astype(np.float32))
    return batch


@pytest.mark.parametrize(("tap", "routing"), [(2, None), (1, Routing(0.5, 1, 1)), (3, Routing(0.5, 1, 1))])
def test_the_gradient_is_only_below_the_tap(quick_compile, routing, tap):
    batch = batch_with_patches()
    state, heavy = step_of(4, AlignmentConfig(weight=3.0), routing, tap)
    grads = jax.jit(heavy.accumulate)(state, batch)[0].opt_state.acc_grads
    without = jax.jit(heavy.plain)(state, batch)[0].opt_state.acc_grads
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(without), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        name = "/".join(str(key.key) for key in path)
        if name.startswith("blocks/"):
            np.testing.assert_allclose(a[tap:], b[tap:], rtol=1e-4, atol=1e-6, err_msg=name)
            assert not np.allclose(a[:tap], b[:tap], rtol=1e-3, atol=1e-6), name
        elif name.startswith("out/"):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)
        elif name.startswith("projector/"):
            assert a.any() and not b.any(), name


AFTER_THE_END = """
from test_alignment import *
from training_helpers import tree_equal
state, step = step_of(2, AlignmentConfig(), tap=1)
bare, without = step_of(2, None)
keep = lambda tree: {name: part for name, part in tree.items() if name != "projector"}
bare = bare._replace(params=keep(state.params), ema=keep(state.ema))
batch = batch_with_patches()
for _ in range(3):
    state = jax.jit(step.update)(jax.jit(step.plain)(state, batch)[0])[0]
    bare = jax.jit(without.update)(jax.jit(without.accumulate)(bare, batch)[0])[0]
assert tree_equal(keep(state.params), bare.params) and tree_equal(keep(state.ema), bare.ema)
"""


def test_after_its_end_the_bits_are_those_of_a_run_without():
    """Compiled as for users: with the tests' few optimisations the averages differ in their last bit."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")}
    environment["PYTHONPATH"] = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    if "XLA_FLAGS" in os.environ:  # of conftest.py; in how many parts a program is compiled changes no bit of it
        environment["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
    done = subprocess.run(
        [sys.executable, "-c", AFTER_THE_END], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_logged_cosine_is_that_of_both_gradients_of_the_features(quick_compile):
    """Against the gradients taken apart, with the projector's loss and the flow's alone."""
    rng = np.random.default_rng(5)
    config = tiny_model(depth=3, tap=2, target_width=6)
    graph, shapes = dit.build(config)
    params, inputs = lively(shapes, scale=0.2), network_inputs(config)
    target = rng.normal(size=(3, 4, 16)).astype(np.float32)
    patches = rng.normal(size=(3, 4, 6)).astype(np.float32)
    zeros = jnp.zeros(dit.tap_shape(config, 3, 4))

    def losses(probes):
        velocity, projected = dit.apply(graph, params, *arguments(inputs), probes=probes)
        return jnp.mean((velocity - target) ** 2), jnp.mean(alignment.loss(projected, patches, jnp.full(3, 4)))

    of_flow, own = jax.grad(lambda p: losses(p)[0] + 0.5 * losses(p)[1])((zeros, zeros))
    flow_alone = jax.grad(lambda z: losses((z, zeros))[0])(zeros)
    own_alone = 0.5 * jax.grad(lambda z: losses((zeros, z))[1])(zeros)
    np.testing.assert_allclose(own, own_alone, rtol=1e-4, atol=1e-7)
    expected = np.vdot(flow_alone, own_alone) / np.linalg.norm(flow_alone) / np.linalg.norm(own_alone)
    np.testing.assert_allclose(of_flow, flow_alone, rtol=1e-4, atol=1e-7)
    assert alignment.agreement(of_flow, own) == pytest.approx(expected, rel=1e-3)


def test_features_of_kept_tokens_alone_are_aligned(quick_compile):
    """Inside of the skipped blocks the projector sees the kept tokens, in their order."""
    config = tiny_model(depth=4, tap=2, target_width=6)
    graph, shapes = dit.build(config)
    params, inputs = lively(shapes, scale=0.2), network_inputs(config, grids=((4, 6), (5, 3)), tokens=24)
    routing, grid = Routing(0.5, 1, 1), jnp.asarray(((4, 6), (5, 3)))
    valid = valid_tokens(grid, 24)
    routed = Routed(flow.draw_order(0, jnp.arange(2, dtype=jnp.uint32), valid), routing.kept(grid.prod(1)), routing)
    zeros = jnp.zeros(dit.tap_shape(config, 2, 24, routing))
    assert zeros.shape == (2, 16, 32)
    _, projected = dit.apply(graph, params, *arguments(inputs), routed=routed, probes=(zeros, zeros))
    assert projected.shape == (2, 16, 6)


def test_a_micro_batch_in_bfloat16(quick_compile):
    state, step = step_of(4, AlignmentConfig(), Routing(0.5, 1, 1), dtype="bfloat16")
    state, metrics = jax.jit(step.accumulate)(state, batch_with_patches())
    assert not metrics["skipped"] and -1 <= metrics["alignment"]["cosine"] <= 1 and metrics["alignment"]["loss"] > 0
