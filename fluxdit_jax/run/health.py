"""The monitor: turns a run's gradient norms and ratios into words and advice.

What the numbers mean:
  * a healthy gradient norm is hairy and falls slowly over thousands of steps;
  * one that jumps and stays up means the weights were thrown somewhere bad: the learning rate is too high;
  * a loss that goes back to where it began, after having fallen, means the same;
  * one that sinks towards zero while the prediction stays weak means the network has given up and predicts
    the mean of everything, which decodes to grey; where the loss sinks to nothing with it, all is memorised;
  * a part whose gradient is exactly zero is not connected, or sits behind two zero initialisations.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from statistics import median, pstdev

DIVERGED = "diverged"  # the kind of a diagnosis after which the state is of no use
WINDOW = 20  # steps a condition must last before it is named
BASELINE = 200  # steps before the window that it is compared with
SPIKE = 5.0  # a window's median this many times the baseline's
SINK = 0.02  # a window's median at this share of the largest window so far
WEAK = 0.3  # predicted RMS below this share of the target's
TRIVIAL = 0.01  # a loss below this means that nothing is left to learn
BROKEN = 10  # bad steps within a window that are no accident
LOUD_RMS_RATIO = 1.5  # predicted RMS above this many times the target's; a healthy step never has that
OUTBURSTS = 3  # loud steps within a window that are no accident
DEAD_STEPS = 100  # steps without any gradient before a part is called dead
LEARNED = 0.05  # share of its first loss that a run must have gained before it can lose it again
RISEN = 1.5  # a loss this many times the first one was thrown away at once
NOISE = 4.0  # standard deviations of single steps' losses; medians over a window wander by less than half of it
INPUT_BOUND_SHARE = 0.25  # share of the time spent waiting for data


@dataclasses.dataclass(frozen=True)
class Observation:
    """One optimizer step as the monitor sees it.

    Attributes:
      gradient_norm: NaN where no step was completed.
      gradient_groups: gradient norm by parameter group; empty where no step was completed.
      rms_ratio: RMS of the predicted over that of the target velocity; 1.0 is ideal.
      skipped: micro-batches skipped for non-finite gradients since the last observation.
      data_wait: share of the step's time spent waiting for data, 0 to 1.
    """

    step: int
    loss: float
    gradient_norm: float
    gradient_groups: dict[str, float]
    rms_ratio: float
    skipped: int
    data_wait: float


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Something to tell a person. `serious` ones stop the run where the configuration says so."""

    kind: str
    message: str
    serious: bool


class Monitor:
    """Feed it every step; it answers with what has begun or ended since."""

    def __init__(self, learning_rate: float, warmup_steps: int, silent: frozenset[str] = frozenset()):
        """
        Args:
          learning_rate, warmup_steps: of the run, to speak of them.
          silent: parameter groups that rightly get no gradient (nulls of conditions that are never dropped).
        """
        self._silent = silent
        self._learning_rate = learning_rate
        self._warmup_steps = warmup_steps
        self._norms: deque[float] = deque(maxlen=BASELINE + WINDOW)
        self._ratios: deque[float] = deque(maxlen=WINDOW)
        self._waits: deque[float] = deque(maxlen=WINDOW)
        self._skips: deque[int] = deque(maxlen=WINDOW)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._first_loss: float | None = None  # median over a window
        self._best_loss = math.inf
        self._best_spread = 0.0  # standard deviation of the losses in that window
        self._silent_for: dict[str, int] = {}
        self._once_heard: set[str] = set()  # groups that have had a gradient
        self._largest = 0.0  # largest window median so far
        self._before_spike = 0.0  # what the norm was before it rose
        self._active: set[str] = set()
        self._seen = 0

    def levels(self) -> dict[str, float] | None:
        """The first and the best loss, and the noise there, for `recall` after a restart; None while unknown."""
        if self._first_loss is None:
            return None
        return {"first": self._first_loss, "best": self._best_loss, "spread": self._best_spread}

    def recall(self, levels: dict[str, float]) -> None:
        """Takes up the `levels` of the process before, without which a diverged run would pass for one at its start."""
        self._first_loss, self._best_loss, self._best_spread = (levels[name] for name in ("first", "best", "spread"))

    def observe(self, seen: Observation) -> list[Diagnosis]:
        """Takes one step; returns diagnoses that begin or end with it (usually none)."""
        self._skips.append(seen.skipped)
        self._waits.append(seen.data_wait)
        if math.isfinite(seen.gradient_norm):
            self._seen += 1
            self._norms.append(seen.gradient_norm)
        if math.isfinite(seen.rms_ratio):
            self._ratios.append(seen.rms_ratio)
        if math.isfinite(seen.loss):
            self._losses.append(seen.loss)
        for name, norm in seen.gradient_groups.items():
            self._silent_for[name] = self._silent_for.get(name, 0) + 1 if norm == 0.0 else 0
            if norm > 0.0:
                self._once_heard.add(name)
        found = [
            self._non_finite(seen),
            self._broken(seen),
            self._spiked(seen),
            self._diverged(seen),
            self._sinking(seen),
            self._trivial(seen),
            self._disconnected(seen),
            self._starved(seen),
        ]
        return [diagnosis for diagnosis in found if diagnosis is not None]

    def summary(self) -> str:
        """One clause for the log on how the run is doing now."""
        if self._active:
            return "trouble: " + ", ".join(sorted(self._active))
        if len(self._norms) < WINDOW:
            return "too early to tell"
        ratio = median(self._ratios) if self._ratios else math.nan
        if ratio < WEAK:
            return f"weak so far: the prediction has {ratio:.2g} of the target's size"
        return "healthy"

    def _change(self, kind: str, present: bool, message: str, ended: str, serious: bool = True) -> Diagnosis | None:
        if present and kind not in self._active:
            self._active.add(kind)
            return Diagnosis(kind, message, serious)
        if not present and kind in self._active:
            self._active.remove(kind)
            return Diagnosis(kind, ended, False)
        return None

    def _non_finite(self, seen: Observation) -> Diagnosis | None:
        return self._change(
            "non-finite",
            sum(self._skips) > 0,
            f"step {seen.step}: {seen.skipped} micro-batch(es) had a gradient with NaN or infinity and were skipped; "
            "the weights were not touched. Once in days is a bad record (`python -m preprocess verify` finds it)",
            f"step {seen.step}: gradients have been finite for {WINDOW} steps",
            serious=False,
        )

    def _broken(self, seen: Observation) -> Diagnosis | None:
        bad = sum(skipped > 0 for skipped in self._skips)
        return self._change(
            "non-finite again and again",
            bad >= BROKEN or ("non-finite again and again" in self._active and bad > 0),
            f"step {seen.step}: {bad} of the last {len(self._skips)} steps had micro-batches with NaN or infinity. The "
            "weights are finite: many records are bad (`python -m preprocess verify` tells), or the weights have grown "
            f"so far that products overflow. Then the learning rate ({self._learning_rate:g}) is too high: go "
            "back to a checkpoint from before, and lower optim.lr by 3. health.max_skipped such micro-batches in a row "
            "end the run",
            f"step {seen.step}: gradients have been finite for {WINDOW} steps",
        )

    def _medians(self) -> tuple[float, float] | None:
        norms = list(self._norms)
        if len(norms) < 2 * WINDOW:
            return None
        return median(norms[-WINDOW:]), median(norms[:-WINDOW])

    def _spiked(self, seen: Observation) -> Diagnosis | None:
        medians = self._medians()
        if medians is None:
            return None
        now, before = medians
        if "spiked" in self._active:
            before = self._before_spike  # the baseline itself has risen since
            present = now > SPIKE * before
        else:
            present = now > SPIKE * before and min(list(self._norms)[-WINDOW:]) > before
            self._before_spike = before
        return self._change(
            "spiked",
            present,
            f"step {seen.step}: the gradient norm rose from about {before:.3g} to {now:.3g} and has stayed there for "
            f"{WINDOW} steps: the learning rate ({self._learning_rate:g}) is too high. Go back to a checkpoint from "
            "before, and lower optim.lr by 3 or lengthen optim.warmup_steps",
            f"step {seen.step}: the gradient norm has come down to {now:.3g}",
        )

    def _diverged(self, seen: Observation) -> Diagnosis | None:
        if len(self._losses) < WINDOW:
            return None
        now = median(self._losses)
        if self._first_loss is None:
            self._first_loss = now
        if now < self._best_loss:
            self._best_loss, self._best_spread = now, pstdev(self._losses)
        gained, kept = self._first_loss - self._best_loss, self._first_loss - now
        # Held against the noise of the steps, or a run that is resumed on its plateau would be accused.
        lost = gained > max(LEARNED * self._first_loss, NOISE * self._best_spread) and kept < gained / 2
        # A prediction larger than its target is worse than none. Weights that are thrown in the first steps show it
        # only there: afterwards the run sits at the loss of predicting nothing, from which it never fell.
        outbursts = sum(ratio > LOUD_RMS_RATIO for ratio in self._ratios)
        what = (
            f"{outbursts} of the last {WINDOW} steps predicted velocities more than {LOUD_RMS_RATIO:g} times as large "
            "as the targets, which is worse than predicting nothing: the weights have diverged"
            if outbursts >= OUTBURSTS
            else f"the loss began at {self._first_loss:.3g}, had fallen to {self._best_loss:.3g} and is at {now:.3g} "
            "now: what was learned is lost"
        )
        return self._change(
            DIVERGED,
            lost or now > RISEN * self._first_loss or outbursts >= OUTBURSTS,
            f"step {seen.step}: {what}. The learning rate ({self._learning_rate:g}) is too high. "
            "Go back to a checkpoint from before, and lower optim.lr by 3 or lengthen optim.warmup_steps",
            f"step {seen.step}: the loss has come down to {now:.3g}",
        )

    def _sinking(self, seen: Observation) -> Diagnosis | None:
        medians = self._medians()
        if medians is None:
            return None
        now, _ = medians
        self._largest = max(self._largest, now)
        ratio = median(self._ratios) if self._ratios else math.nan
        sunk = now < SINK * self._largest
        what = f"sank to {now:.3g} (it was {self._largest:.3g})" if sunk else f"is {now:.3g}, long after the warm-up,"
        return self._change(
            "collapsed",
            ratio < WEAK and (sunk or self._seen > self._warmup_steps + BASELINE),
            f"step {seen.step}: the gradient norm {what} and the prediction "
            f"has {ratio:.2f} of the target's size: it collapses to the mean of all, "
            "which is a grey image. Look at the latent statistics in the manifest, at the conditions, and at layers "
            "that start at zero",
            f"step {seen.step}: the prediction has {ratio:.2f} of the target's size again",
        )

    def _trivial(self, seen: Observation) -> Diagnosis | None:
        if len(self._losses) < WINDOW:
            return None
        now = median(self._losses)
        return self._change(
            "nothing left to learn",
            now < (2 * TRIVIAL if "nothing left to learn" in self._active else TRIVIAL),
            f"step {seen.step}: the loss is {now:.2g}: every picture is predicted. A small set that is memorised comes "
            "to that; if yours is large, its pictures or latents are all alike: look at the contact sheet of "
            "`python -m preprocess inspect` and at the latent statistics in the manifest",
            f"step {seen.step}: the loss is back at {now:.3g}",
            serious=False,
        )

    def _disconnected(self, seen: Observation) -> Diagnosis | None:
        silent = sorted(n for n, steps in self._silent_for.items() if steps >= DEAD_STEPS and n not in self._silent)
        why = (
            f"it had one before, so too large an update has put its units out: the learning rate "
            f"({self._learning_rate:g}) is too high. Go back to a checkpoint from before and lower optim.lr by 3"
            if self._once_heard.issuperset(silent)
            else "not connected to the loss, or behind two layers that both start at zero. It will never learn; "
            "restart with this mended"
        )
        return self._change(
            "dead_parameters",
            bool(silent),
            f"step {seen.step}: {', '.join(silent)} had a gradient of exactly zero for {DEAD_STEPS} steps: {why}",
            f"step {seen.step}: every part of the network receives gradient",
        )

    def _starved(self, seen: Observation) -> Diagnosis | None:
        full = len(self._waits) == WINDOW
        share = sum(self._waits) / max(1, len(self._waits))
        return self._change(
            "input_bound",
            # once said it ends only well below: a share that wavers about the limit would fill the log
            full and share > (INPUT_BOUND_SHARE / 2 if "input_bound" in self._active else INPUT_BOUND_SHARE),
            f"step {seen.step}: {share:.0%} of the time is spent waiting for data. Raise data.threads or "
            "data.prefetch, or move the data set to a faster disk",
            f"step {seen.step}: data keeps up",
            serious=False,
        )
