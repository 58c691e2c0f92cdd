"""Whether weights can still be used, and the watchdog that ends a run whose weights or gradients cannot.

One update that is far too large makes weights that no later update mends: every gradient after it is NaN. Such
weights are never written: not as a checkpoint, not as an EMA, not as a picture.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxdit_jax.state import TrainState

# Root mean square of all weights of a network. They start at about 0.02 and stay below 1; numbers as large as this
# overflow within a few layers.
LARGEST_RMS = 100.0
LARGEST_UPDATE = 10.0  # norm of an update over that of the weights before it: nothing of what was learned is left then
# Micro-batches in a row without a finite gradient, after which the state is not saved any more.
SUSPECT_MICRO_BATCHES = 10


class BrokenRun(Exception):
    """The run cannot go on: its weights are broken, or no gradient is finite. The message says which, what to do."""


def weights_fault(tree: Any) -> str | None:
    """What is wrong with a tree of f32 weights, of the host or of devices, in words; None if nothing is."""
    leaves = jax.tree.leaves(tree)
    if all(isinstance(leaf, np.ndarray) for leaf in leaves):
        squares = sum(float(np.vdot(leaf, leaf)) for leaf in leaves)
    else:
        squares = float(_sum_of_squares(leaves))
    return _rms_fault(math.sqrt(squares / max(1, sum(leaf.size for leaf in leaves))))


def _rms_fault(rms: float) -> str | None:
    if rms <= LARGEST_RMS:  # not so for NaN
        return None
    return f"their root mean square is {rms:.3g}, which can be at most {LARGEST_RMS:g}"


def state_fault(state: TrainState) -> str | None:
    """What is wrong with a training state, in words; None if it can be trained on. Every process must call it."""
    averages = (("weights", state.params), ("EMA weights", state.ema), ("short EMA weights", state.short_ema))
    for name, tree in averages:
        fault = weights_fault(tree)
        if fault:
            return f"its {name} are broken: {fault}"
    if not bool(_all_finite(jax.tree.leaves(state.opt_state))):
        return "the optimizer's moments or the accumulated gradients in it are not finite"
    return None


@jax.jit
def _sum_of_squares(leaves: list[jax.Array]) -> jax.Array:
    return sum((jnp.sum(jnp.square(leaf)) for leaf in leaves), jnp.float32(0.0))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


class Watchdog:
    """Follows a run and ends it where nothing but a person can help.

    Attributes:
      in_a_row: micro-batches skipped since the last one with a finite gradient.
    """

    def __init__(self, max_skipped: int, parameters: int, learning_rate: float):
        """
        Args:
          max_skipped: micro-batches in a row without a finite gradient that end the run.
          parameters: how many numbers the weights are. learning_rate: of the run, to speak of it.
        """
        self._max_skipped, self._parameters, self._learning_rate = max_skipped, parameters, learning_rate
        self._updated: int | None = None  # the last step whose update was seen
        self._norm: float | None = None  # of the weights; None before the first update
        self.in_a_row = 0

    def micro_batch(self, step: int, skipped: bool) -> None:
        """A micro-batch after `step` is done; raises `BrokenRun` if it is one too many without a finite gradient."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= self._max_skipped:
            raise BrokenRun(self._without_gradient(step))

    def end(self, step: int) -> None:
        """The run is over; raises `BrokenRun` if its last `SUSPECT_MICRO_BATCHES` micro-batches were all skipped."""
        if self.in_a_row >= SUSPECT_MICRO_BATCHES:
            raise BrokenRun(self._without_gradient(step))

    def update(self, metrics: dict[str, Any]) -> None:
        """Takes the metrics of an update; raises `BrokenRun` if it has broken the weights."""
        step = self._updated = int(metrics["step"])
        fault = self._fault(*(float(metrics[name]) for name in ("param_norm", "update_norm", "ema_distance")))
        if fault is not None:
            raise BrokenRun(
                f"step {step}: its update has broken the weights: {fault}. The learning rate ({self._learning_rate:g}) "
                "is too high. Nothing of this step is saved: with a lower optim.lr (and optim.adam_lr) and "
                "--config.resume.allow_changes=True the same command goes on from the newest checkpoint, or from the "
                "beginning if there is none"
            )

    def _fault(self, norm: float, update_norm: float, ema_distance: float) -> str | None:
        """What is wrong with the weights after an update, in words."""
        fault = _rms_fault(norm / math.sqrt(self._parameters))
        if fault is None and not math.isfinite(ema_distance):
            fault = "their average, the EMA, is not finite"
        # Before the first update that is seen, as if it stood at right angles to the weights.
        before = math.sqrt(max(0.0, norm**2 - update_norm**2)) if self._norm is None else self._norm
        if fault is None and update_norm > LARGEST_UPDATE * before:
            fault = f"it is more than {LARGEST_UPDATE:g} times as large as the weights before it"
        self._norm = norm
        return fault

    def _without_gradient(self, step: int) -> str:
        rms = f", with a root mean square of {self._norm / math.sqrt(self._parameters):.3g}" if self._norm else ""
        since = "the run began" if self._updated is None else f"step {self._updated}"
        return (
            f"step {step}: {self.in_a_row} micro-batches in a row had a gradient with NaN or infinity "
            f"(health.max_skipped). The weights are finite{rms}, and unchanged since {since}; they are not saved "
            "again. If the run has just begun, look at the data: `python -m preprocess verify` finds bad records, and "
            f"the manifest shows the latent statistics. If it went well before, the learning rate "
            f"({self._learning_rate:g}) has made the weights useless: lower optim.lr by 3 with "
            f"--config.resume.allow_changes=True; checkpoints/{self._updated or step} and later ones, if they are "
            "there, hold these weights: move them away, and the run goes on from the one before"
        )
