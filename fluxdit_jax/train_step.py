"""One optimizer step: loss and gradient of each micro-batch, their mean, then update and EMA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fluxdit_jax import alignment, flow
from fluxdit_jax.alignment import AlignmentConfig
from fluxdit_jax.model import dit
from fluxdit_jax.model.conditions import Given, given
from fluxdit_jax.model.routing import Routed, Routing, reordered
from fluxdit_jax.optimizer import ema_decay, gradient_norms, group_norms
from fluxdit_jax.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]


def patch_statistics(mean: tuple[float, ...], std: tuple[float, ...], patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel latent statistics laid out as a patch, f32 [P]. Patches are (row, column, channel)."""
    return np.tile(np.array(mean, np.float32), patch**2), np.tile(np.array(std, np.float32), patch**2)


def valid_tokens(grid_Bx2: jax.Array, tokens: int) -> jax.Array:
    """bool [B, tokens]: which tokens are the sample's own."""
    return jnp.arange(tokens)[None, :] < (grid_Bx2[:, 0] * grid_Bx2[:, 1])[:, None]


def normalize_latents(batch: Batch, mean_P: np.ndarray, std_P: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(normalised latent tokens f32 [B, N, P] with zeros at padding, validity bool [B, N])."""
    tokens = batch["latent"].astype(jnp.float32)
    valid = valid_tokens(batch["grid"], tokens.shape[1])
    return jnp.where(valid[..., None], (tokens - mean_P) / std_P, 0.0), valid


def flow_loss(
    graph: Any,
    params: Any,
    grid: jax.Array,
    conditions: dict[str, Given],
    x0: jax.Array,
    valid: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    routed: Routed | None = None,
    probes: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """Runs the network on (x_t, t) and returns f32 (loss [B], prediction [B, N, P], target [B, N, P], projection).

    With `routed` the tokens of prediction and target are in its order. The projection is None without `probes`, see
    `dit.DiT.__call__`.
    """
    noise = jnp.where(valid[..., None], noise, 0.0)
    if routed is not None:
        x0, noise = reordered(x0, routed.order_BxN), reordered(noise, routed.order_BxN)
    options = {name: value for name, value in (("routed", routed), ("probes", probes)) if value is not None}
    out = dit.apply(graph, params, flow.interpolate(x0, noise, t), t, grid, conditions, **options)
    prediction, projection = (out, None) if probes is None else out
    target = flow.velocity(x0, noise)
    return flow.sample_means(jnp.square(prediction - target), valid), prediction, target, projection


def alignment_loss(model: dit.ModelConfig, batch: Batch, projection: jax.Array, routed: Routed | None) -> jax.Array:
    """f32 [B] of the tokens that are there at the tap."""
    K, grid = projection.shape[1], batch["grid"]
    inside = routed is not None and dit.tap_inside(model, routed.routing)
    length_B = routed.kept_B if routed is not None and inside else grid[:, 0] * grid[:, 1]
    order = jnp.arange(K, dtype=jnp.int32)[None, :] if routed is None else routed.order_BxN[:, :K]
    return alignment.loss(projection, alignment.targets(batch["patches"], batch["cells"], grid, order), length_B)


class TrainStep(NamedTuple):
    """An optimizer step: `accumulate` for each of its micro-batches, then `update`. To be jitted, the state donated.

    Attributes:
      accumulate: (state, batch) -> (state, metrics of the micro-batch). The batch is `BatchLayout.shapes`.
      update: state -> (state, metrics of the step).
      plain: as `accumulate`, without the alignment.
    """

    accumulate: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    update: Callable[[TrainState], tuple[TrainState, Metrics]]
    plain: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    graph: Any,
    model: dit.ModelConfig,
    optimizer: optax.MultiSteps,
    flow_config: flow.FlowConfig,
    statistics: tuple[np.ndarray, np.ndarray],
    *,
    seed: int,
    global_batch_size: int,
    ema_target: float,
    short_ema_target: float | None = None,
    first_step: int = 0,
    routing: Routing | None = None,
    aligned: AlignmentConfig | None = None,
) -> TrainStep:
    """Builds the pure functions of a step. All metrics are device scalars or small vectors.

    Args:
      ema_target: decay of the EMA after its warm-up; short_ema_target: of the second one, None for none.
      first_step: of the stage, see `ema_decay`.
      routing: of the tokens; None: each goes through every block.
      aligned: the alignment, with `model.tap`; None: none.
    """
    mean_P, std_P = statistics
    names = [condition.name for condition in model.conditions]

    def loss_fn(params: Any, probes: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        index = batch["index"]
        x0, valid = normalize_latents(batch, mean_P, std_P)
        t = flow.draw_time(flow_config, seed, index, global_batch_size)
        noise = flow.draw_noise(seed, index, x0.shape[1:])
        keep = flow.draw_kept_conditions(flow_config, names, seed, index)
        conditions = given(model.conditions, batch, keep)
        grid, routed = batch["grid"], None
        if routing is not None:
            routed = Routed(flow.draw_order(seed, index, valid), routing.kept(grid[:, 0] * grid[:, 1]), routing)
        loss_B, prediction, target, projection = flow_loss(
            graph, params, grid, conditions, x0, valid, t, noise, routed, probes
        )
        bin_loss, bin_count = flow.loss_by_time(loss_B, t)
        metrics: Metrics = {
            "loss": jnp.mean(loss_B),
            "prediction_rms": jnp.sqrt(jnp.mean(flow.sample_means(jnp.square(prediction), valid))),
            "target_rms": jnp.sqrt(jnp.mean(flow.sample_means(jnp.square(target), valid))),
            "tokens": jnp.sum(valid),
            "replaced": jnp.sum(batch["replaced"]),
            "bin_loss": bin_loss,
            "bin_count": bin_count,
        }
        if projection is None or aligned is None:
            return metrics["loss"], metrics
        metrics["alignment"] = {"loss": jnp.mean(alignment_loss(model, batch, projection, routed))}
        return metrics["loss"] + aligned.weight * metrics["alignment"]["loss"], metrics

    def accumulate(state: TrainState, batch: Batch, align: bool = aligned is not None) -> tuple[TrainState, Metrics]:
        """Adds a micro-batch to the running mean of the gradient. One that is not finite is left out and counted."""
        # The gradient is taken with respect to the compute-dtype weights, then accumulated in f32.
        compute = jax.tree.map(lambda p: p.astype(model.dtype), state.params)
        probes = None
        if align:
            B, N = batch["latent"].shape[:2]
            zeros = jnp.zeros(dit.tap_shape(model, B, N, routing), model.dtype)
            probes = zeros, zeros
        (grads, of_features), metrics = jax.grad(loss_fn, (0, 1), has_aux=True)(compute, probes, batch)
        if of_features is not None:
            metrics["alignment"]["cosine"] = alignment.agreement(*of_features)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        # Of the sum of squares: finite entries can still overflow the norm, and then clipping and the moments.
        finite = jnp.isfinite(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        before = state.opt_state
        mean = jax.tree.map(
            lambda g, acc: jnp.where(finite, acc + (g - acc) / (before.mini_step + 1), acc), grads, before.acc_grads
        )
        opt_state = before._replace(mini_step=before.mini_step + finite, acc_grads=mean)
        skipped = (~finite).astype(jnp.int32)
        return state._replace(opt_state=opt_state, skipped=state.skipped + skipped), metrics | {"skipped": skipped}

    def update(state: TrainState) -> tuple[TrainState, Metrics]:
        """Updates weights and averages by the mean gradient; if every micro-batch was skipped, only counts the step."""
        before = state.opt_state
        updates, inner = optimizer.inner_opt.update(before.acc_grads, before.inner_opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def averaged(ema: Any, target: float) -> Any:
            return optax.incremental_update(params, ema, 1 - ema_decay(before.gradient_step, target, first_step))

        ema = averaged(state.ema, ema_target)
        short_ema = None if short_ema_target is None else averaged(state.short_ema, short_ema_target)
        old = (state.params, before.inner_opt_state, state.ema, state.short_ema)
        params, inner, ema, short_ema = jax.tree.map(
            lambda new, old: jnp.where(before.mini_step > 0, new, old), (params, inner, ema, short_ema), old
        )
        opt_state = before._replace(
            mini_step=jnp.zeros_like(before.mini_step),
            gradient_step=before.gradient_step + 1,
            inner_opt_state=inner,
            acc_grads=jax.tree.map(jnp.zeros_like, before.acc_grads),
        )
        norms = gradient_norms(opt_state)
        metrics = {
            "step": opt_state.gradient_step,
            "micro_batches": before.mini_step,
            "grad_norm": norms.total,
            "grad_norm_groups": norms.groups,
            "update_norm": group_norms(updates)[0],
            "param_norm": group_norms(params)[0],
            "ema_distance": group_norms(jax.tree.map(lambda a, b: a - b, params, ema))[0],
        }
        return TrainState(params, opt_state, ema, state.skipped, short_ema), metrics

    return TrainStep(accumulate, update, functools.partial(accumulate, align=False))
