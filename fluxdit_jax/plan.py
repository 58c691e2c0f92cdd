"""The plan of a run: what each stage takes in time, energy, memory and disk, before its first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from fluxdit_jax.device import devices
from fluxdit_jax.model import cost
from fluxdit_jax.prepared import Prepared
from fluxdit_jax.settings import Settings
from fluxdit_jax.shared.cli import duration

MANY_EPOCHS = 1000  # over a set that is not there to be memorised
SMALL_SET = 200  # pictures up to which a set is there to be memorised, as the gate's is
_HEADER = (
    "stage", "px", "tokens", "GFLOP/picture", "batch", "remat", "lr", "steps", "pictures", "epochs", "s/picture",
    "hours", "kWh",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rate:
    """What all devices of a run together are taken to reach, FLOP/s, and where that is from."""

    flops: float
    source: str


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What a stage of a run would take.

    Attributes:
      flops: of a picture: forward and backward pass, recomputation not counted.
      pictures: trained on, each time one is seen. images: of an epoch.
      warmup: steps until its rate is `lr`.
      seconds, kwh: time and energy of the stage.
    """

    name: str
    resolution: int
    tokens: int
    flops: float
    micro_batch: int
    micro_batches: int
    remat: str
    lr: float
    warmup: int
    steps: int
    pictures: int
    images: int
    seconds: float
    kwh: float

    @property
    def epochs(self) -> float:
        return self.pictures / self.images

    def cells(self) -> list[str]:
        """The row of a table."""
        return [
            self.name or "all", f"{self.resolution}", f"{self.tokens:,}", f"{self.flops / 1e9:,.1f}",
            f"{self.micro_batch} x {self.micro_batches}", self.remat, f"{self.lr:g}", f"{self.steps:,}",
            f"{self.pictures:,}", f"{self.epochs:.3g}", f"{self.seconds / self.pictures:.3g}",
            f"{self.seconds / 3600:,.2f}", f"{self.kwh:,.2f}",
        ]  # fmt: skip


def training_flops(settings: Settings) -> int:
    """FLOPs of a sample's forward and backward pass, recomputation not counted."""
    aligned = settings.alignment is not None
    return 3 * cost.flops_per_sample(
        settings.model, settings.tokens, settings.batch.lengths, settings.routing, projecting=aligned
    )


def rate_of(config: ConfigDict) -> Rate:
    """What the devices are taken to reach: `plan.utilisation` of their peak, or of what a product reaches here."""
    count, share = jax.device_count(), config.plan.utilisation
    peak = devices.peak_tflops(config.log.peak_tflops)
    if peak is not None:
        return Rate(share * 1e12 * peak * count, f"{share:.0%} of {count} x {peak:g} TFLOP/s")
    found = devices.measured_tflops()
    return Rate(
        share * 1e12 * found * count, f"{share:.0%} of the {found:.2g} TFLOP/s that a product of matrices reaches here"
    )


def plan_of(stages: Sequence[Prepared], rate: Rate) -> list[StagePlan]:
    """The plan of each stage."""
    found = []
    for each in stages:
        settings, config = each.settings, each.stage.config
        steps = each.stage.last - each.stage.first
        pictures, flops = steps * settings.global_batch_size, training_flops(settings)
        seconds = pictures * flops / rate.flops
        found.append(
            StagePlan(
                name=each.stage.name,
                resolution=each.manifest.resolution,
                tokens=settings.tokens,
                flops=flops,
                micro_batch=settings.micro_batch_size,
                micro_batches=settings.optimizer.grad_accum_steps,
                remat=settings.model.remat,
                lr=config.optim.lr,
                warmup=config.optim.warmup_steps,
                steps=steps,
                pictures=pictures,
                images=each.manifest.records("train"),
                seconds=seconds,
                kwh=seconds / 3600 * config.plan.watts / 1000,
            )
        )
    return found


def in_words(stages: Sequence[Prepared]) -> tuple[list[str], list[str]]:
    """(the plan as lines, warnings)."""
    rate = rate_of(stages[0].stage.config)
    plans = plan_of(stages, rate)
    return [*table(plans), *totals(plans, stages, rate)], warnings(plans)


def table(plans: Sequence[StagePlan]) -> list[str]:
    """Lines of a table, a row a stage."""
    rows = [list(_HEADER), *(plan.cells() for plan in plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def totals(plans: Sequence[StagePlan], stages: Sequence[Prepared], rate: Rate) -> list[str]:
    """What the stages take together, and the disk."""
    config = stages[0].stage.config
    seconds, kwh = sum(plan.seconds for plan in plans), sum(plan.kwh for plan in plans)
    state = _bytes(stages[0].program.abstract)
    average = _bytes((stages[0].program.abstract.ema, stages[0].program.abstract.short_ema))
    last, ends = stages[-1].stage.last, {each.stage.last for each in stages}
    kept = len(ends | set(range(config.checkpoint.ema_every, last + 1, config.checkpoint.ema_every)))
    states = config.checkpoint.keep + 1  # one is there while it is written
    disk = state * states + average * kept
    return [
        f"in all {duration(seconds)} ({seconds / 86400:.2f} days) and {kwh:,.2f} kWh at {config.plan.watts:g} W, if "
        f"{rate.flops / 1e12:.3g} TFLOP/s are reached ({rate.source}); pictures, saving and held-out losses besides",
        f"disk for checkpoints: {disk / 1e9:.2f} GB ({states} states of {state / 1e9:.2f} GB, {kept} "
        f"EMA weights of {average / 1e9:.2f} GB)",
    ]


def warnings(plans: Sequence[StagePlan]) -> list[str]:
    """What a plan does that its maker may not want: a rate that is never reached, so many epochs of few images that the
    model memorises them."""
    found = [
        f"{f'stage {plan.name}: ' if plan.name else ''}optim.warmup_steps is {plan.warmup} and there are {plan.steps} "
        f"steps: the learning rate ends at {plan.lr * plan.steps / plan.warmup:.2g} and never is {plan.lr:g}"
        for plan in plans
        if plan.warmup > plan.steps
    ]
    pictures, images = sum(plan.pictures for plan in plans), plans[0].images
    epochs = pictures / images
    if epochs > MANY_EPOCHS and images > SMALL_SET:
        found.append(_many_epochs(plans, epochs, images))
    return found


def _many_epochs(plans: Sequence[StagePlan], epochs: float, images: int) -> str:
    fewer = max(1, round(MANY_EPOCHS / 10 * images / (plans[0].micro_batch * plans[0].micro_batches)))
    key = "--config.train.steps" if len(plans) == 1 else "in all stages together train.steps"
    return (
        f"train.steps is {sum(plan.steps for plan in plans)}: {epochs:.3g} epochs of {images} images. After so many a "
        f"model has memorised its images; {MANY_EPOCHS // 10} epochs are {key}={fewer}, or "
        f"train.images={round(MANY_EPOCHS / 10 * images)}"
    )


def _bytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
