"""One micro-batch: loss, gradient, accumulation, and, when a step is complete, update and EMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fluxdit_jax import flow, model
from fluxdit_jax.optimizer import MultiSteps, ema_decay, gradient_norms, group_norms
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
    batch: Batch,
    x0: jax.Array,
    valid: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    keep: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the network on (x_t, t) and returns f32 (loss [B], prediction [B, N, P], target [B, N, P])."""
    noise = jnp.where(valid[..., None], noise, 0.0)
    prediction = model.apply(
        graph,
        params,
        flow.interpolate(x0, noise, t),
        t,
        batch["grid"],
        batch["text"],
        batch["text_length"],
        batch["vision"],
        *keep,
    )
    target = flow.velocity(x0, noise)
    return flow.sample_means(jnp.square(prediction - target), valid), prediction, target


def make_train_step(
    graph: Any,
    dtype: str,
    optimizer: MultiSteps,
    flow_config: flow.FlowConfig,
    statistics: tuple[np.ndarray, np.ndarray],
    seed: int,
    effective_batch: int,
    ema_target: float,
    short_ema_target: float | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the pure function (state, batch) -> (state, metrics) to be jitted with the state donated.

    The batch is what `data.py` makes: latent bf16 [B, N, P], grid int32 [B, 2], text bf16 [B, T, E],
    text_length int32 [B], vision f32 [B, V], index uint32 [B], replaced bool [B].

    Args:
      ema_target: decay of the EMA after its warm-up; short_ema_target: of the second one, None for none.

    Metrics are device scalars of the micro-batch; `grad_norm` and the like belong to the last whole step.
    """
    mean_P, std_P = statistics

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        index = batch["index"]
        x0, valid = normalize_latents(batch, mean_P, std_P)
        t = flow.draw_time(flow_config, seed, index, effective_batch)
        noise = flow.draw_noise(seed, index, x0.shape[1:])
        keep = flow.draw_kept_conditions(flow_config, seed, index)
        loss_B, prediction, target = flow_loss(graph, params, batch, x0, valid, t, noise, keep)
        bin_loss, bin_count = flow.loss_by_time(loss_B, t)
        metrics = {
            "loss": jnp.mean(loss_B),
            "prediction_rms": jnp.sqrt(jnp.mean(flow.sample_means(jnp.square(prediction), valid))),
            "target_rms": jnp.sqrt(jnp.mean(flow.sample_means(jnp.square(target), valid))),
            "tokens": jnp.sum(valid),
            "replaced": jnp.sum(batch["replaced"]),
            "bin_loss": bin_loss,
            "bin_count": bin_count,
        }
        return metrics["loss"], metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # The gradient is taken with respect to the compute-dtype weights, then accumulated in f32.
        compute = jax.tree.map(lambda p: p.astype(dtype), state.params)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(compute, batch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        # Of the squares, not of the numbers: a gradient whose norm overflows would spoil the mean and the moments.
        finite = jnp.isfinite(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        before = state.opt_state
        advanced = finite & (before.mini_step == optimizer.accumulate - 1)
        # A micro-batch with a NaN leaves no trace: not in the accumulator, the moments or the counters.
        mean = jax.tree.map(
            lambda g, acc: jnp.where(finite, acc + (g - acc) / (before.mini_step + 1), acc),
            grads,
            before.acc_grads,
        )

        def update(params: Any, inner: Any, mean: Any, ema: Any, short_ema: Any) -> tuple[Any, tuple[jax.Array, ...]]:
            updates, inner = optimizer.inner_opt.update(mean, inner, params)
            params = optax.apply_updates(params, updates)

            def averaged(ema: Any, target: float) -> Any:
                return optax.incremental_update(params, ema, 1 - ema_decay(before.gradient_step, target))

            ema = averaged(ema, ema_target)
            short_ema = None if short_ema_target is None else averaged(short_ema, short_ema_target)
            distance = jax.tree.map(lambda a, b: a - b, params, ema)
            norms = tuple(group_norms(tree)[0] for tree in (updates, params, distance))
            return (params, inner, jax.tree.map(jnp.zeros_like, mean), ema, short_ema), norms

        carried = (state.params, before.inner_opt_state, mean, state.ema, state.short_ema)
        kept = carried, (jnp.zeros((), jnp.float32),) * 3
        if optimizer.accumulate == 1:
            # The update is always wanted; in a loop a CPU takes 6 % longer for the step of nano in f32.
            after = jax.tree.map(lambda new, old: jnp.where(advanced, new, old), update(*carried), kept)
        else:
            # A loop of one turn or none. A `cond` XLA makes into selects, which read and write the whole state at
            # every micro-batch; if something in it forbids that, it copies the state (6 GB at 526 M parameters).
            after = jax.lax.fori_loop(0, advanced.astype(jnp.int32), lambda _, now: update(*now[0]), kept)
        (params, inner, mean, ema, short_ema), (update_norm, param_norm, ema_distance) = after
        opt_state = before._replace(
            mini_step=jnp.where(finite, (before.mini_step + 1) % optimizer.accumulate, before.mini_step),
            gradient_step=before.gradient_step + advanced,
            inner_opt_state=inner,
            acc_grads=mean,
        )
        skipped = (~finite).astype(jnp.int32)
        norms = gradient_norms(opt_state)
        metrics |= {
            "step": opt_state.gradient_step,
            "mini_step": opt_state.mini_step,
            "skipped": skipped,
            "grad_norm": norms.total,
            "grad_norm_groups": norms.groups,
            "update_norm": update_norm,
            "param_norm": param_norm,
            "ema_distance": ema_distance,
        }
        return TrainState(params, opt_state, ema, state.skipped + skipped, short_ema), metrics

    return train_step
