"""Whole optimizer steps against float64: a network of five numbers, which has gradients in closed form."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import linear_network
import numpy as np
import pytest
from linear_network import START
from training_helpers import (
    CHANNELS,
    UNEVEN_SIZES,
    dropping,
    jitted,
    make_batch,
    make_record,
    tiny_flow,
    tiny_model,
    tiny_optimizer,
    tree_equal,
)

from fluxdit_jax import flow
from fluxdit_jax.loader import reader
from fluxdit_jax.objective import Objective, normalize_latents, patch_statistics, valid_tokens
from fluxdit_jax.optimizer import build_optimizer
from fluxdit_jax.state import TrainState, create_state
from fluxdit_jax.train_step import make_train_step

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")

MEAN, STD = (0.5, -1.0, 0.0, 2.0), (2.0, 1.0, 0.5, 3.0)
MODEL = tiny_model()
FLOW = tiny_flow(stratified=True, drop=dropping(0.1, 0.3, 0.2))
OPTIMIZER = tiny_optimizer(lr=1e-2, b1=0.9, b2=0.95, eps=1e-3)
EMA, SHORT_EMA = 0.15, 0.12  # the first step's decay is 0.1, later ones are these


# ------------------------------------------------------------------------------------------- the batch


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_statistics_are_laid_out_as_patches_are(patch):
    record = make_record(0, (2 * patch, 3 * patch))
    mean_P, std_P = patch_statistics(MEAN, STD, patch)
    assert mean_P.dtype == std_P.dtype == np.float32
    latent = record.latent.astype(np.float32)
    normalised = (latent - np.reshape(MEAN, (4, 1, 1))) / np.reshape(STD, (4, 1, 1))
    tokens = (reader.patchify(latent, patch) - mean_P) / std_P
    np.testing.assert_allclose(tokens, reader.patchify(normalised.astype(np.float32), patch), rtol=1e-6)


def test_normalised_latents_are_zero_at_padding_whatever_stands_there():
    batch = make_batch(size=3)
    x0, valid = normalize_latents(batch, *patch_statistics(MEAN, STD, 2))
    assert x0.dtype == jnp.float32
    assert valid.sum(axis=1).tolist() == [h * w // 4 for h, w in UNEVEN_SIZES]
    assert not np.asarray(x0)[~np.asarray(valid)].any()
    batch["latent"][~np.asarray(valid)] = np.nan
    np.testing.assert_array_equal(normalize_latents(batch, *patch_statistics(MEAN, STD, 2))[0], x0)
    np.testing.assert_array_equal(valid_tokens(batch["grid"], 6)[:, :4], valid)


# ---------------------------------------------------------------------------------------- whole steps


@functools.cache
def program(accumulate: int):
    """(a fresh state with two averages, the step) for global batches of 4 * accumulate samples."""
    optimizer = build_optimizer(dataclasses.replace(OPTIMIZER, grad_accum_steps=accumulate))
    graph, params = linear_network.build()
    step = make_train_step(
        Objective(graph, MODEL, FLOW, patch_statistics(MEAN, STD, 2), seed=0, global_batch_size=4 * accumulate),
        optimizer,
        ema_target=EMA,
        short_ema_target=SHORT_EMA,
    )
    return create_state(params, optimizer, short_ema=True), step


@functools.cache
def draws(effective: int):
    """(times, noise, which captions and which vectors are kept) by the index of the samples, compiled."""
    return jax.jit(
        lambda index: (
            flow.draw_time(FLOW, 0, index, effective),
            flow.draw_noise(0, index, (4, 4 * CHANNELS)),
            *flow.draw_kept_conditions(FLOW, ("text", "vision"), 0, index).values(),
        )
    )


def by_hand(params: dict, batch: dict, effective: int) -> tuple[dict, dict]:
    """(the gradient, the metrics) of one micro-batch, in float64."""
    drawn = draws(effective)(batch["index"])
    t, noise = (np.asarray(part, np.float64) for part in drawn[:2])
    keep_text, keep_vision = drawn[2:]
    per_sample = []
    for row, (height, width) in enumerate(batch["grid"]):
        own = height * width
        x0 = (batch["latent"][row, :own].astype(np.float64) - np.tile(MEAN, 4)) / np.tile(STD, 4)
        x = (1 - t[row]) * x0 + t[row] * noise[row, :own]
        target = noise[row, :own] - x0
        text = batch["text"][row, : batch["text_length"][row]] if keep_text[row] else None
        vision = batch["vision"][row] if keep_vision[row] else None
        seen = linear_network.slopes(x, t[row], (height, width), text, vision)
        prediction = sum(params[name] * value for name, value in seen.items())
        error = prediction - target
        slopes = {name: np.mean(2 * error * value) for name, value in seen.items()}
        per_sample.append((slopes, np.mean(error**2), np.mean(prediction**2), np.mean(target**2), own))
    slopes, losses, predictions, targets, tokens = zip(*per_sample)
    metrics = {
        "loss": np.mean(losses),
        "prediction_rms": np.sqrt(np.mean(predictions)),
        "target_rms": np.sqrt(np.mean(targets)),
        "tokens": sum(tokens),
        "bin_loss": np.bincount((t * 8).astype(int), losses, minlength=8),
        "bin_count": np.bincount((t * 8).astype(int), minlength=8),
    }
    return {name: np.mean([slope[name] for slope in slopes]) for name in START}, metrics


def norm(tree: dict) -> float:
    return float(np.sqrt(sum(np.square(value) for value in tree.values())))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_steps_by_hand(accumulate: int) -> None:
    """Loss, gradient, its mean over the micro-batches, Adam's update, both averages, and all that is measured."""
    state, step = program(accumulate)
    step = jitted(step)
    params, emas = dict(START), [dict(START), dict(START)]
    first, second = dict.fromkeys(START, 0.0), dict.fromkeys(START, 0.0)
    for number in range(2):
        gradients = []
        for part in range(accumulate):
            batch = make_batch(first_index=4 * (number * accumulate + part))
            batch["replaced"][:part] = True
            gradient, expected = by_hand(params, batch, 4 * accumulate)
            gradients.append(gradient)
            state, metrics = step.accumulate(state, batch)
            for name, value in expected.items():
                np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
            assert metrics["replaced"] == part and not metrics["skipped"]
            assert (int(state.step), int(state.opt_state.mini_step)) == (number, part + 1)
            mean = {name: np.mean([g[name] for g in gradients]) for name in START}
            for name, value in mean.items():
                np.testing.assert_allclose(state.opt_state.acc_grads[name], value, rtol=1e-4, atol=1e-6)
        state, metrics = step.update(state)
        assert (int(state.step), int(state.opt_state.mini_step)) == (number + 1, 0)
        assert (int(metrics["step"]), int(metrics["micro_batches"])) == (number + 1, accumulate)
        updates = {}
        for name, g in mean.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            moment, square = first[name] / (1 - 0.9 ** (number + 1)), second[name] / (1 - 0.95 ** (number + 1))
            updates[name] = -1e-2 * moment / (np.sqrt(square) + 1e-3)
            params[name] += updates[name]
            for ema, target in zip(emas, (EMA, SHORT_EMA)):
                decay = min(target, (1 + number) / (10 + number))
                ema[name] = decay * ema[name] + (1 - decay) * params[name]
        for found, wanted in zip((state.params, state.ema, state.short_ema), (params, *emas)):
            for name, value in wanted.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
        assert not any(np.any(leaf) for leaf in state.opt_state.acc_grads.values())
        distance = {name: params[name] - emas[0][name] for name in START}
        wanted = {"grad_norm": mean, "update_norm": updates, "param_norm": params, "ema_distance": distance}
        for name, tree in wanted.items():
            np.testing.assert_allclose(metrics[name], norm(tree), rtol=2e-3, err_msg=name)
        for name, value in mean.items():
            np.testing.assert_allclose(metrics["grad_norm_groups"][name], abs(value), rtol=1e-4, err_msg=name)


def bad_batch() -> dict:
    bad = make_batch(first_index=40)
    bad["latent"][2, 0, 0] = np.nan
    return bad


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_micro_batch_that_is_not_finite_is_counted_and_leaves_no_trace(accumulate: int) -> None:
    fresh, step = program(accumulate)
    step = jitted(step)
    clean = dirty = fresh
    for number in range(2):
        for part in range(accumulate):
            batch = make_batch(first_index=4 * (number * accumulate + part))
            clean, _ = step.accumulate(clean, batch)
            dirty, _ = step.accumulate(dirty, batch)
            dirty, metrics = step.accumulate(dirty, bad_batch())
            assert metrics["skipped"] == 1 and int(dirty.skipped) == number * accumulate + part + 1
            assert tree_equal(dirty._replace(skipped=clean.skipped), clean)
        clean, _ = step.update(clean)
        dirty, metrics = step.update(dirty)
        assert int(metrics["micro_batches"]) == accumulate
        assert tree_equal(dirty._replace(skipped=clean.skipped), clean)
    assert int(clean.skipped) == 0 and int(clean.step) == 2


def test_a_step_of_nothing_finite_is_counted_and_changes_nothing_else() -> None:
    state, step = program(3)
    step = jitted(step)
    state, _ = step(state, *[make_batch(first_index=4 * part) for part in range(3)])
    after, metrics = step(state, *[bad_batch()] * 3)
    assert (int(metrics["step"]), int(metrics["micro_batches"]), int(after.skipped)) == (2, 0, 3)
    counted = after.opt_state._replace(gradient_step=state.opt_state.gradient_step)
    assert tree_equal(after._replace(opt_state=counted, skipped=state.skipped), state)


def test_without_a_second_average_there_is_none() -> None:
    optimizer, (graph, params) = build_optimizer(OPTIMIZER), linear_network.build()
    step = make_train_step(
        Objective(graph, MODEL, FLOW, patch_statistics(MEAN, STD, 2), seed=0, global_batch_size=4),
        optimizer,
        ema_target=EMA,
    )
    after: TrainState = jax.eval_shape(step.update, create_state(params, optimizer))[0]
    assert after.short_ema is None
