"""What `metrics.jsonl` knows of why a test failed: whether the run has learned, and what went wrong while it did."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fluxdit_jax.run.health import WEAK

MIN_LOSSES = 8  # logged losses from which on a curve says something
FALLING = 0.75  # last loss over the one before it; a schedule that ends low takes off less than that
LOST = 0.5  # share of what the loss had gained
LEARNED = 0.3  # share of its first loss that a network which draws something has gained

# (step, loss) of the logged lines that have a loss.
Losses = list[tuple[int, float]]

# The health message of `metrics.jsonl` that belongs to a cause.
_TOLD = {
    "learning rate": ("diverged", "spiked", "broken"),
    "collapse": ("collapsed",),
    "no gradient": ("dead_parameters",),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """What the log says up to the weights' step.

    Attributes:
      findings: (cause, what was found and what to do), the most serious first.
      explains: whether they are reason enough for pictures that show nothing.
      first, last: the loss of the first and of the last eighth of the logged lines; None where they are too few.
    """

    findings: tuple[tuple[str, str], ...]
    explains: bool
    first: float | None
    last: float | None


def read_training(log: list[dict[str, Any]], step: int | None = None, planned: int | None = None) -> Training:
    """
    Args:
      log: the entries of `metrics.jsonl`, oldest first.
      step: of the weights; later entries do not count. None: all do.
      planned: `config.train.steps`, or None.
    """
    log = [entry for entry in log if step is None or entry["step"] <= step]
    losses = [(entry["step"], entry["loss"]) for entry in log if entry.get("loss") is not None]
    serious = [*_lost(losses), *_weak(log), *_silent(log)]
    serious = [(cause, f"{text}{_told(log, cause)}") for cause, text in serious]
    unfinished = _unfinished(losses, step, planned)
    more = [*_skipped(log), *_lagging(log)]
    eighth = max(1, len(losses) // 8)
    means = [float(np.mean([loss for _, loss in part])) for part in (losses[:eighth], losses[-eighth:]) if part]
    known = means if len(losses) >= MIN_LOSSES else (None, None)
    return Training((*serious, *unfinished, *more), bool(serious or unfinished), *known)


def _unfinished(losses: Losses, step: int | None, planned: int | None) -> list[tuple[str, str]]:
    cause = "not trained to the end"
    if step is not None and planned is not None and step < planned:
        falls = " The loss still falls." if _falling(losses) else ""
        return [(cause, f"The weights are of step {step:,} of {planned:,}: train on, then validate again.{falls}")]
    if len(losses) < MIN_LOSSES:
        few = f"metrics.jsonl has {len(losses)} losses, too few to judge the training: train for longer"
        return [("little trained", f"{few}, or log more often (config.log.every).")]
    if falling := _falling(losses):
        before, last = falling
        return [
            (
                cause,
                f"The loss still falls ({before:.3f} to {last:.3f} over the last quarter): train longer first.",
            )
        ]
    return []


def _falling(losses: Losses) -> tuple[float, float] | None:
    """(mean a quarter ago, mean now) of a loss that still falls."""
    eighth = len(losses) // 8
    if not eighth:
        return None
    values = [loss for _, loss in losses]
    last, before = float(np.mean(values[-eighth:])), float(np.mean(values[-3 * eighth : -2 * eighth]))
    return (before, last) if last < FALLING * before else None


def _lost(losses: Losses) -> list[tuple[str, str]]:
    if len(losses) < MIN_LOSSES:
        return []
    eighth = len(losses) // 8
    means = [float(np.mean([v for _, v in losses[k : k + eighth]])) for k in range(len(losses) - eighth + 1)]
    best = int(np.argmin(means))
    first, low, last = means[0], means[best], means[-1]
    if first - low < 0.05 * first or first - last > LOST * (first - low):
        return []
    return [
        (
            "learning rate",
            f"The loss had fallen to {low:.3f} by step {losses[best + eighth - 1][0]:,} and ends at {last:.3f}: what "
            "was learned is lost. The learning rate is too high: go back to a checkpoint from before, and lower "
            "optim.lr by 3 or lengthen optim.warmup_steps.",
        )
    ]


def _last(log: list[dict[str, Any]], name: str, count: int = 3) -> list[float]:
    return [entry[name] for entry in log if entry.get(name) is not None][-count:]


def _weak(log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    ratios = _last(log, "velocity_rms_ratio")
    if len(ratios) < 3 or np.median(ratios) >= WEAK:
        return []
    return [
        (
            "collapse",
            f"The predicted velocity has {np.median(ratios):.2g} of its target's size (velocity_rms_ratio; healthy: "
            "near 1): the network predicts the mean of everything. Look at the learning rate, at the data set's latent "
            "statistics, and at layers that start at zero.",
        )
    ]


def _silent(log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    prefix = "gradient_norm_by_group/"
    names = {name for entry in log for name in entry if name.startswith(f"{prefix}") and "/null_" not in name}
    dead = sorted(name[len(prefix) :] for name in names if len(v := _last(log, name)) == 3 and not any(v))
    if not dead:
        return []
    return [("no gradient", f"No gradient reaches {', '.join(dead)} at the end: these parts do not learn.")]


def _skipped(log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    count = sum(_last(log, "skipped", max(1, len(log) // 4)))
    if not count:
        return []
    return [
        (
            "broken numbers",
            f"{count:.0f} micro-batches of the last quarter had a gradient with NaN or infinity and were skipped: look "
            "for bad records (`python -m preprocess verify`), and at the learning rate.",
        )
    ]


def _lagging(log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    long, short = _last(log, "heldout_loss", 1), _last(log, "short_ema/heldout_loss", 1)
    if not (long and short) or short[0] >= 0.98 * long[0]:
        return []
    return [
        (
            "the EMA lags",
            f"The EMA's held-out loss is {long[0]:.4f}, that of the short average {short[0]:.4f}: the EMA is behind. "
            "Train longer, or lower ema.decay.",
        )
    ]


def _told(log: list[dict[str, Any]], cause: str) -> str:
    """What the run's own diagnosis said last."""
    names = [f"health/{kind}" for kind in _TOLD.get(cause, ())]
    said = [entry[name] for entry in log for name in names if isinstance(entry.get(name), str)]
    return f" The run said: {said[-1]}." if said else ""
