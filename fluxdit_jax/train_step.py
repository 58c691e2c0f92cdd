"""One optimizer step: loss and gradient of each micro-batch, their mean, then update and EMA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fluxdit_jax import alignment
from fluxdit_jax.objective import Batch, Metrics, Objective
from fluxdit_jax.optimizer import ema_decay, gradient_norms, group_norms
from fluxdit_jax.state import TrainState


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
    objective: Objective,
    optimizer: optax.MultiSteps,
    *,
    ema_target: float,
    short_ema_target: float | None = None,
    first_step: int = 0,
) -> TrainStep:
    """Builds the pure functions of a step. All metrics are device scalars or small vectors.

    Args:
      ema_target: decay of the EMA after its warm-up; short_ema_target: of the second one, None for none.
      first_step: of the stage, see `ema_decay`.
    """
    targets = ema_target, short_ema_target
    return TrainStep(
        functools.partial(accumulate, objective, align=objective.aligned is not None),
        functools.partial(update, optimizer, targets, first_step),
        functools.partial(accumulate, objective, align=False),
    )


def accumulate(objective: Objective, state: TrainState, batch: Batch, align: bool) -> tuple[TrainState, Metrics]:
    """Adds a micro-batch to the running mean of the gradient. One that is not finite is left out and counted."""
    # The gradient is taken with respect to the compute-dtype weights, then accumulated in f32.
    compute = jax.tree.map(lambda p: p.astype(objective.model.dtype), state.params)
    probes = objective.probes(batch) if align else None
    (grads, of_features), metrics = jax.grad(objective, (0, 1), has_aux=True)(compute, probes, batch)
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


def update(
    optimizer: optax.MultiSteps, targets: tuple[float, float | None], first_step: int, state: TrainState
) -> tuple[TrainState, Metrics]:
    """Updates weights and averages by the mean gradient; if every micro-batch was skipped, only counts the step."""
    before = state.opt_state
    updates, inner = optimizer.inner_opt.update(before.acc_grads, before.inner_opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def averaged(ema: Any, target: float) -> Any:
        return optax.incremental_update(params, ema, 1 - ema_decay(before.gradient_step, target, first_step))

    ema = averaged(state.ema, targets[0])
    short_ema = None if targets[1] is None else averaged(state.short_ema, targets[1])
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
