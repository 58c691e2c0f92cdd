"""Micro-batches and steps of the real thing: loss, accumulation, skipping, precision, EMA."""

from __future__ import annotations

import functools

import jax
import jax.extend.core  # of its own: `import jax` alone does not bring it
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from training_helpers import (
    CHANNELS,
    UNEVEN_SIZES,
    dropping,
    jitted,
    lively,
    make_batch,
    make_record,
    tiny_flow,
    tiny_model,
    tiny_optimizer,
    tiny_step,
    tree_equal,
)

from fluxdit_jax import flow
from fluxdit_jax.loader import reader
from fluxdit_jax.model import dit
from fluxdit_jax.objective import Objective, patch_statistics, valid_tokens
from fluxdit_jax.optimizer import build_optimizer, ema_decay, path_name
from fluxdit_jax.state import create_state
from fluxdit_jax.train_step import make_train_step

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

MEAN, STD = (0.5, -1.0, 0.0, 2.0), (2.0, 1.0, 0.5, 3.0)
DROPS = {"drop": dropping(0.1, 0.2, 0.2)}


def programs(accumulate=1, effective=4, dtype="float32", warmup=0, lr=1e-3, eps=1e-3, name="adamw", **flow_changes):
    """(a fresh state, `jitted` of the step) of the tiny network, at an EMA target of 0.9999."""
    changes = tuple(sorted((DROPS | flow_changes).items()))
    return _programs(accumulate, effective, dtype, warmup, lr, eps, name, changes)


@functools.cache
def _programs(accumulate, effective, dtype, warmup, lr, eps, name, flow_changes):
    optimizer = tiny_optimizer(
        name=name, grad_accum_steps=accumulate, lr=lr, adam_lr=lr, warmup_steps=warmup, eps=eps, weight_decay=0.01
    )
    times = tiny_flow(stratified=True, **dict(flow_changes))
    state, step = tiny_step(
        tiny_model(dtype=dtype), times, optimizer, (MEAN, STD), ema_target=0.9999, global_batch_size=effective
    )
    return state, jitted(step)


def poisoned(batch, value=np.nan):
    """The micro-batch with one bad number in its first latent."""
    latent = batch["latent"].copy()
    latent[0, 0, 0] = value
    return batch | {"latent": latent}


def at_step(state, step):
    """The state as if `step` optimizer steps had been made."""
    return state._replace(opt_state=state.opt_state._replace(gradient_step=jnp.asarray(step, jnp.int32)))


# ------------------------------------------------------------------------------------------------ the batch


def test_what_stands_in_padding_does_not_change_the_step():
    state, step = programs()
    batch = make_batch()
    after = step(state, batch)
    garbage = {name: array.copy() for name, array in batch.items()}
    garbage["latent"][~np.asarray(valid_tokens(batch["grid"], 4))] = 99
    for row, length in enumerate(batch["text_length"]):
        garbage["text"][row, length:] = 7
    assert not tree_equal(garbage, batch)
    assert tree_equal(step(state, garbage), after)


def test_the_loss_in_closed_form():
    """A network that predicts 0.7 has the loss mean((0.7 - noise + x0)²), over each sample's own tokens."""
    state, step = programs()
    out = {name: jnp.full_like(leaf, 0.7 if name == "bias" else 0.0) for name, leaf in state.params["out"].items()}
    batch = make_batch(size=4)
    batch["replaced"][1:3] = True
    _, metrics = step(state._replace(params=state.params | {"out": out}), batch)
    noise = np.asarray(flow.draw_noise(0, batch["index"], (4, 4 * CHANNELS)))
    losses, squares = [], []
    for row, (h, w) in enumerate(batch["grid"]):
        record = make_record(row, UNEVEN_SIZES[row % 3]).latent.astype(np.float32)
        x0 = reader.patchify((record - np.reshape(MEAN, (4, 1, 1))) / np.reshape(STD, (4, 1, 1)), 2)
        target = noise[row, : h * w] - x0
        losses.append(np.mean((0.7 - target) ** 2))
        squares.append(np.mean(target**2))
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["target_rms"], np.sqrt(np.mean(squares)), rtol=1e-5)
    np.testing.assert_allclose(metrics["prediction_rms"], 0.7, rtol=1e-6)
    assert metrics["tokens"] == batch["grid"].prod(axis=1).sum() and metrics["replaced"] == 2
    t = np.asarray(flow.draw_time(tiny_flow(stratified=True), 0, batch["index"], 4))
    bins = (t * flow.TIME_BINS).astype(int)
    sums = np.bincount(bins, losses, minlength=flow.TIME_BINS)
    np.testing.assert_allclose(metrics["bin_loss"], sums, rtol=1e-5)
    np.testing.assert_array_equal(metrics["bin_count"], np.bincount(bins, minlength=flow.TIME_BINS))


@pytest.mark.parametrize("what", ["text", "vision"])
def test_dropped_conditions_are_not_seen_by_the_step(what):
    state, step = programs(drop=dropping(1.0, 0.0, 0.0))
    other = make_batch(seed=9)
    batch = make_batch()
    changed = batch | {what: other[what]}
    assert tree_equal(step(state, changed), step(state, batch))
    state, step = programs()
    assert not tree_equal(step(state, changed)[0].params, step(state, batch)[0].params)


# ------------------------------------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_micro_batches_equal_the_big_batch(name):
    """Two steps of 12 samples, as 1 x 12 and as 3 x 4."""
    results = []
    for size in (12, 4):
        state, step = programs(accumulate=12 // size, effective=12, name=name)
        for start in (0, 12):
            parts = range(start, start + 12, size)
            state, metrics = step(state, *(make_batch(size=size, first_index=first) for first in parts))
        assert int(state.step) == 2 and metrics["micro_batches"] == 12 // size
        results.append((state, metrics))
    (big, big_metrics), (small, small_metrics) = results
    np.testing.assert_allclose(small_metrics["grad_norm"], big_metrics["grad_norm"], rtol=1e-4)
    start = programs(accumulate=1, effective=12, name=name)[0].params
    for path, (a, b, c) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b, c: (a, b, c), small.params, big.params, start),
        is_leaf=lambda x: isinstance(x, tuple),
    ):
        moved = np.abs(b - c).max()
        assert moved > 0, path_name(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * moved, err_msg=path_name(path))
    assert np.abs(np.asarray(small.ema["out"]["kernel"]) - big.ema["out"]["kernel"]).max() < 1e-5


def three(first=0):
    return [make_batch(first_index=first + 4 * number) for number in range(3)]


def test_between_micro_batches_nothing_moves_but_the_accumulator():
    state, step = programs(accumulate=3, effective=12)
    start = state
    for number, batch in enumerate(three(), start=1):
        state, _ = step.accumulate(state, batch)
        assert tree_equal(state.params, start.params) and tree_equal(state.ema, start.ema)
        assert tree_equal(state.opt_state.inner_opt_state, start.opt_state.inner_opt_state)
        assert (int(state.step), int(state.opt_state.mini_step)) == (0, number)
    after, metrics = step.update(state)
    assert (int(metrics["step"]), int(after.step), int(after.opt_state.mini_step)) == (1, 1, 0)
    assert not tree_equal(after.params, start.params) and not tree_equal(after.ema, start.ema)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(after.opt_state.acc_grads))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_is_that_of_optax_multi_steps(name):
    """The mean, the update and the whole state after it, given the same gradients."""
    state, step = programs(accumulate=3, effective=12, name=name)
    optimizer = build_optimizer(tiny_optimizer(name=name, grad_accum_steps=3, eps=1e-3, weight_decay=0.01))
    wanted, params = state.opt_state, state.params
    for batch in three():
        fresh, _ = step.accumulate(state, batch)  # of an empty mean: the gradient itself
        updates, wanted = jax.jit(optimizer.update)(fresh.opt_state.acc_grads, wanted, params)
        params = optax.apply_updates(params, updates)
    after, _ = step(state, *three())
    structure, leaves = jax.tree.structure(wanted), jax.tree.leaves((wanted, params))
    assert jax.tree.structure(after.opt_state) == structure
    for a, b in zip(jax.tree.leaves((after.opt_state, after.params)), leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_schedule_counts_optimizer_steps():
    """In a warm-up of 4 steps the first update is a quarter of the rate, whatever the micro-batches."""
    state, step = programs(accumulate=3, effective=12, warmup=4, eps=1e-8)
    for expected in (0.25e-3, 0.5e-3):
        before = state.params
        state, _ = step(state, *three())
        moved = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(before)))
        np.testing.assert_allclose(moved, expected, rtol=0.05)


# ------------------------------------------------------------------------------------------------ skipping


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38], ids=["nan", "inf", "overflow"])
def test_the_mean_is_over_the_finite_micro_batches(value):
    """A micro-batch whose gradient is not finite is counted and leaves no other trace, wherever in the step it is."""
    state, step = programs(accumulate=3, effective=12)
    bad = poisoned(make_batch(first_index=50), value)
    clean, _ = step(state, *three())
    for place in range(4):
        batches = three()
        batches.insert(place, bad)
        dirty, metrics = step(state, *batches)
        assert int(dirty.skipped) == 1 and metrics["micro_batches"] == 3
        assert tree_equal(dirty._replace(skipped=clean.skipped), clean)
        for name in ("grad_norm", "update_norm", "param_norm", "ema_distance"):
            assert np.isfinite(metrics[name]), name
    for batch in three():
        before, (state, metrics) = state, step.accumulate(state, batch)
        assert metrics["skipped"] == 0 and int(state.skipped) == int(before.skipped) == 0


def test_a_step_without_a_finite_micro_batch_changes_only_the_count_of_steps():
    state, step = programs(accumulate=3, effective=12)
    state, _ = step(state, *three())
    after, metrics = step(state, *(poisoned(batch) for batch in three()))
    assert (int(after.step), int(after.skipped), int(metrics["micro_batches"])) == (2, 3, 0)
    counted = state.opt_state._replace(gradient_step=after.step)
    assert tree_equal(after._replace(skipped=state.skipped), state._replace(opt_state=counted))


def test_a_non_finite_weight_is_not_hidden():
    """The step cannot mend broken weights, and must not pretend to: every micro-batch is counted as skipped."""
    state, step = programs()
    broken = jnp.asarray(state.params["patch_embed"]["bias"]).at[0].set(jnp.nan)
    patch_embed = state.params["patch_embed"] | {"bias": broken}
    state = state._replace(params=state.params | {"patch_embed": patch_embed})
    for count in (1, 2):
        state, metrics = step(state, make_batch())
        assert metrics["skipped"] and int(state.skipped) == count and metrics["micro_batches"] == 0


# ------------------------------------------------------------------------------------------------ precision


def test_small_updates_move_the_f32_masters_of_a_bf16_network():
    state, step = programs(dtype="bfloat16", lr=1e-6, eps=1e-8)
    first = state
    for number in range(20):
        state, _ = step(state, make_batch(first_index=4 * number))
    for path, (a, b) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: (a, b), state.params, first.params), is_leaf=lambda x: isinstance(x, tuple)
    ):
        assert a.dtype == jnp.float32
        moved = np.abs(np.asarray(a, np.float64) - b)
        assert np.median(moved[np.abs(b) > 1e-4]) > 2e-6, path_name(path)
        as_bf16 = [np.asarray(x).astype(ml_dtypes.bfloat16) for x in (a, b)]
        large = np.abs(b) > 0.1  # half a unit in the last place of bf16 is 2e-4 there
        assert np.mean(as_bf16[0][large] == as_bf16[1][large]) > 0.9, path_name(path)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32)


def test_the_optimizer_is_fed_f32_gradients_of_a_bf16_network():
    config, optimizer = tiny_model(dtype="bfloat16"), build_optimizer(tiny_optimizer(grad_accum_steps=3))
    fed = []

    def update(gradients, state, params):
        fed.extend(leaf.dtype for leaf in jax.tree.leaves((gradients, params)))
        return optimizer.inner_opt.update(gradients, state, params)

    watched = optax.MultiSteps(optax.GradientTransformation(optimizer.inner_opt.init, update), 3)
    graph, shapes = dit.build(config)
    statistics = patch_statistics(MEAN, STD, 2)
    step = make_train_step(
        Objective(graph, config, tiny_flow(), statistics, seed=0, global_batch_size=12), watched, ema_target=0.9999
    )
    state, _ = jax.eval_shape(step.accumulate, create_state(lively(shapes), optimizer), make_batch())
    jax.eval_shape(step.update, state)
    assert fed and set(fed) == {jnp.dtype("float32")}


def operand_types(jaxpr):
    """The types of both operands of every matrix product."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield {str(operand.aval.dtype) for operand in equation.invars}
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from operand_types(inner)


def test_the_network_really_runs_in_bf16():
    """Products take bf16; on a CPU they give f32, as `matmul.py` says."""
    state, step = programs(dtype="bfloat16")
    found = list(operand_types(jax.make_jaxpr(step.accumulate)(state, make_batch()).jaxpr))
    # not the gradients of the f32 logits of attention: six of 56
    assert len(found) > 20 and np.mean([types == {"bfloat16"} for types in found]) > 0.8, found


# ------------------------------------------------------------------------------------------------ EMA


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_ema_moves_once_a_step_by_its_closed_form(accumulate):
    """At step 10⁶ the decay is 0.9999."""
    state, step = programs(accumulate=accumulate, effective=4 * accumulate)
    state = at_step(state, 10**6)
    state = state._replace(ema=lively(state.params, seed=5))
    for _ in range(2):
        before = state
        state, _ = step(state, *three()[:accumulate], poisoned(make_batch()))
        for old, new, param in zip(
            jax.tree.leaves(before.ema), jax.tree.leaves(state.ema), jax.tree.leaves(state.params)
        ):
            expected = np.asarray(old, np.float64) + 1e-4 * (np.asarray(param, np.float64) - old)
            np.testing.assert_allclose(new, expected, rtol=0, atol=1.2e-7 * max(1, np.abs(old).max()))
            assert np.mean(np.asarray(new) != old) > 0.9  # a bf16 EMA would not move at all


def test_a_second_ema_has_its_own_decay_and_changes_nothing_else():
    config, (mean_std) = tiny_model(dtype="float32"), patch_statistics(MEAN, STD, 2)
    optimizer, (graph, shapes) = (
        build_optimizer(tiny_optimizer(grad_accum_steps=1, warmup_steps=0)),
        dit.build(config),
    )
    one, two = (
        jitted(
            make_train_step(
                Objective(graph, config, tiny_flow(), mean_std, seed=0, global_batch_size=4),
                optimizer,
                ema_target=0.9999,
                short_ema_target=short,
            )
        )
        for short in (None, 0.9)
    )
    params = lively(shapes, scale=0.2)
    alone = at_step(create_state(params, optimizer), 10**6)
    state = at_step(create_state(params, optimizer, short_ema=True), 10**6)
    assert alone.short_ema is None
    before = state._replace(short_ema=lively(state.params, seed=5))
    alone, _ = one(alone, make_batch())
    state, _ = two(before, make_batch())
    assert tree_equal(alone, state._replace(short_ema=None))
    for old, new, param in zip(*map(jax.tree.leaves, (before.short_ema, state.short_ema, state.params))):
        expected = 0.9 * np.asarray(old, np.float64) + 0.1 * np.asarray(param, np.float64)
        np.testing.assert_allclose(new, expected, atol=1e-6)
    skipped, _ = two(state, poisoned(make_batch()))
    assert tree_equal(skipped.short_ema, state.short_ema)


def test_the_ema_warms_up():
    state, step = programs()
    ema = state.ema
    for number in range(3):
        state, metrics = step(state, make_batch(first_index=4 * number))
        decay = (1 + number) / (10 + number)
        assert np.isclose(ema_decay(jnp.asarray(number), 0.9999), decay)
        ema = jax.tree.map(lambda old, new, d=decay: d * np.asarray(old, np.float64) + (1 - d) * new, ema, state.params)
        for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(state.ema)):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
        distance = np.sqrt(
            sum(
                np.sum((np.asarray(a, np.float64) - b) ** 2)
                for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema))
            )
        )
        np.testing.assert_allclose(metrics["ema_distance"], distance, rtol=1e-4)


def test_a_new_state_shares_no_memory():
    optimizer = build_optimizer(tiny_optimizer())
    params = {"a": {"kernel": jnp.ones((4, 4))}}
    state = create_state(params, optimizer)
    assert state.ema["a"]["kernel"] is not params["a"]["kernel"]
    donated = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    np.testing.assert_array_equal(donated.ema["a"]["kernel"], 2.0)
    assert int(create_state({"a": {"kernel": jnp.ones((2, 2))}}, optimizer).step) == 0


def test_the_step_is_a_pure_function():
    state, step = programs()
    batch = make_batch()
    assert tree_equal(step(state, batch), step(state, batch))
    moved = batch | {"index": batch["index"] + 4}
    assert not tree_equal(step(state, moved)[0].params, step(state, batch)[0].params)
