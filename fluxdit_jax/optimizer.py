"""The optimizer: schedule, AdamW or Muon on f32 master weights, clipping, gradient norms, and the decay of the EMA.

`TrainState.params` are the f32 master weights that optax sees; the network gets a bf16 cast of them. bf16
weights would not move: at a learning rate of 1e-4 the update of a weight of 0.5 is below half its last bit.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fluxdit_jax.muon import muon

NAMES = ("adamw", "muon")
SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its schedule.

    Attributes:
      lr: peak learning rate. For Muon that of the matrices; `adam_lr` is that of the rest.
      split_fused: Muon orthogonalises query, key and value, and gate and up, each by itself.
      warmup_steps, total_steps: optimizer steps, from `first_step` on.
      first_step: optimizer steps before, of other stages of the run.
      final_fraction: the cosine ends at this share of the peak.
      grad_clip_norm: largest global norm of the gradient; a larger one is scaled down to it.
      grad_accum_steps: micro-batches per optimizer step.
    """

    total_steps: int
    name: str = "adamw"
    lr: float = 1e-4
    adam_lr: float = 1e-4
    split_fused: bool = False
    schedule: str = "constant"
    warmup_steps: int = 1000
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_clip_norm: float = 1.0
    grad_accum_steps: int = 1
    first_step: int = 0


def path_name(path: tuple[Any, ...]) -> str:
    """`blocks/mlp/down/kernel` for a key path of the parameter tree."""
    return "/".join(str(key.key) for key in path)


def group_name(path: tuple[Any, ...]) -> str:
    """The group a parameter is reported under: its module; within the blocks, the module's parts."""
    parts = path_name(path).split("/")
    return "/".join(parts[:2]) if parts[0] == "blocks" else parts[0]


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is a kernel: weight decay is for those, never for biases, scales, tables, nulls.

    By name, because in the scanned stack kernels have three dimensions and biases two.
    """
    return path_name(path).endswith("/kernel")


def is_hidden_matrix(path: tuple[Any, ...]) -> bool:
    """Whether Muon orthogonalises it: kernels inside the blocks; the first and last layers stay with Adam."""
    return is_matrix(path) and path_name(path).startswith("blocks/")


def learning_rate(config: OptimizerConfig, peak: float) -> optax.Schedule:
    """Learning rate by optimizer step: from `first_step` on linear warm-up, then constant or cosine."""
    schedule = _from_the_start(config, peak)
    if config.first_step == 0:
        return schedule
    return lambda step: schedule(step - config.first_step)


def _from_the_start(config: OptimizerConfig, peak: float) -> optax.Schedule:
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        decay_steps = max(1, config.total_steps - config.warmup_steps)
        after = optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction)
    if config.warmup_steps == 0:
        return after
    # starts at peak / warmup, not at 0: the first update must not be a no-op
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, max(1, config.warmup_steps - 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


class NormsState(NamedTuple):
    """Norms of the gradient of the last optimizer step, before clipping, f32."""

    total: jax.Array
    groups: dict[str, jax.Array]


def group_norms(tree: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(global norm, norm by `group_name`) of a parameter-shaped tree, accumulated in f32."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        square = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        name = group_name(path)
        squares[name] = squares[name] + square if name in squares else square
    total = jnp.sqrt(sum(squares.values(), jnp.float32(0.0)))
    return total, {name: jnp.sqrt(square) for name, square in squares.items()}


def record_norms() -> optax.GradientTransformation:
    """Passes gradients through and keeps their norms in its state.

    It is the first of the chain, so that these are the norms before clipping.
    """

    def init(params: Any) -> NormsState:
        names = sorted({group_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)})
        # one array each: the state is donated, and a buffer can be donated only once
        zeros = {name: jnp.zeros((), jnp.float32) for name in ["", *names]}
        return NormsState(zeros.pop(""), zeros)

    def update(updates: Any, state: NormsState, params: Any = None) -> tuple[Any, NormsState]:
        del state, params
        return updates, NormsState(*group_norms(updates))

    return optax.GradientTransformation(init, update)


def build_optimizer(config: OptimizerConfig) -> optax.MultiSteps:
    """The whole update rule, and in `init` its state, an `optax.MultiStepsState`.

    `gradient_step` counts optimizer steps and `mini_step` the micro-batches in the mean gradient `acc_grads`.
    `train_step` does the work of `MultiSteps.update`, which computes the whole update at every micro-batch and
    multiplies it by 0 at all but the last.
    """
    by_path = jax.tree_util.tree_map_with_path

    def matrices(params: Any) -> Any:
        return by_path(lambda path, _: is_matrix(path), params)

    if config.name == "adamw":
        rule = optax.adamw(
            learning_rate(config, config.lr),
            config.b1,
            config.b2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=matrices,
        )
    elif config.name == "muon":
        rule = muon(
            learning_rate(config, config.lr),
            learning_rate(config, config.adam_lr),
            is_hidden_matrix,
            split=config.split_fused,
            weight_decay=config.weight_decay,
            decayed=matrices,
            b1=config.b1,
            b2=config.b2,
        )
    else:
        raise ValueError(f"optim.name must be one of {NAMES}, got {config.name!r}")
    inner = optax.chain(record_norms(), optax.clip_by_global_norm(config.grad_clip_norm), rule)
    return optax.MultiSteps(inner, config.grad_accum_steps)


def gradient_norms(opt_state: optax.MultiStepsState) -> NormsState:
    """Norms of the last optimizer step's gradient."""
    return opt_state.inner_opt_state[0]


# An average that remembers longer than a stage would end as weights of the stage before it. From the first step of a
# stage on its memory is that of a run of so many steps, and grows again.
EMA_AGE = 1000


def ema_decay(step: jax.Array, decay: float, first_step: int = 0) -> jax.Array:
    """min(decay, (1 + age) / (10 + age)): a short memory early on, so that the start is forgotten.

    Args:
      first_step: of the stage. The age is the step, after a switch at most `EMA_AGE` and the steps since then.
    """
    age = (step - max(0, first_step - EMA_AGE)).astype(jnp.float32)
    return jnp.minimum(decay, (1 + age) / (10 + age))
