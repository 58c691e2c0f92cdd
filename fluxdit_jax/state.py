"""The training state: everything that changes from step to step and goes into a checkpoint."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """All that an optimizer step reads and writes.

    Attributes:
      params: f32 master weights, nested dicts.
      opt_state: `optax.MultiStepsState`: `gradient_step` counts optimizer steps (the step), `mini_step` the
        micro-batches in `acc_grads` (their mean gradient, f32), `inner_opt_state` has the f32 moments.
      ema: f32 average of the masters, same tree; what is sampled, shown and exported.
      skipped: int32, micro-batches skipped because their gradient was not finite.
      short_ema: a second average with a shorter memory, to compare with; None without one.
    """

    params: Any
    opt_state: optax.MultiStepsState
    ema: Any
    skipped: jax.Array
    short_ema: Any = None

    @property
    def step(self) -> jax.Array:
        """Optimizer updates done, int32."""
        return self.opt_state.gradient_step


def create_state(params: Any, optimizer: optax.MultiSteps, short_ema: bool = False) -> TrainState:
    """The state at step 0. The EMA is a copy, not an alias: both buffers are donated at every step."""
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params),
        skipped=jnp.zeros((), jnp.int32),
        short_ema=jax.tree.map(jnp.copy, params) if short_ema else None,
    )


def without_part(state: TrainState, skipped: int = 0) -> TrainState:
    """The state of the last whole step: without a gradient that is accumulated in part, of whose micro-batches, which
    are drawn again, so many were `skipped`."""
    zeros = jax.tree.map(jnp.zeros_like, (state.opt_state.mini_step, state.opt_state.acc_grads))
    whole = state.opt_state._replace(mini_step=zeros[0], acc_grads=zeros[1])
    return state._replace(opt_state=whole, skipped=state.skipped - skipped if skipped else state.skipped)


def shape_difference(saved: Any, wanted: Any) -> str | None:
    """The first leaf, in words, that two trees do not share by path and shape; None if they share all."""
    shapes, expected = (
        {_path(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (saved, wanted)
    )
    for path in [*expected, *shapes]:
        if path not in shapes:
            return f"it has no {path}"
        if path not in expected:
            return f"it has {path}, which there is not here"
        if shapes[path] != expected[path]:
            return f"{path} is {list(shapes[path])} there, {list(expected[path])} here"
    return None


def _path(path: tuple[Any, ...]) -> str:
    names = (getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path)
    return "/".join(str(name) for name in names)
