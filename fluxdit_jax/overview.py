"""What a run says of itself before its first step: the network, the data, and the plan of its stages."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax

from fluxdit_jax import plan
from fluxdit_jax.model import dit
from fluxdit_jax.prepared import Prepared
from fluxdit_jax.run.progress import Length

log = logging.getLogger("fluxdit_jax")


def length(stages: Sequence[Prepared], present: Prepared, step: int, samples: int) -> Length:
    """How long the run is, seen from one of its stages; `samples` are drawn at a step."""
    flops = plan.training_flops(present.settings)
    later = [each for each in stages if each.stage.first >= present.stage.last]
    return Length(
        steps=stages[-1].stage.last,
        micro_batches=present.settings.optimizer.grad_accum_steps,
        global_batch=present.settings.global_batch_size,
        images=present.manifest.records("train"),
        until=present.stage.last,
        later=sum((e.stage.last - e.stage.first) * plan.training_flops(e.settings) / flops for e in later),
        planned=flops * present.settings.global_batch_size / plan.rate_of(present.stage.config).flops,
        besides=samples - step * present.settings.global_batch_size,
    )


def describe(stages: Sequence[Prepared]) -> None:
    """Logs the network, the data and the plan, with warnings for captions that are cut and a run that memorises."""
    first = stages[0]
    m, config, manifest, settings = first.settings.model, first.stage.config, first.manifest, first.settings
    log.info(
        "model: %.1f M parameters, width %d, depth %d, heads %d, %s, attention %s, remat %s",
        *(dit.count_parameters(m) / 1e6, m.width, m.depth, m.heads, m.dtype, m.attention, m.remat),
    )
    log.info(
        "data: %d images of %s, up to %d image tokens and %d text tokens each, VAE %s",
        *(
            manifest.records("train"),
            config.data.path,
            settings.tokens,
            settings.text_tokens,
            manifest.vae.id,
        ),
    )
    if further := manifest.further():
        log.info("conditions besides the caption and the vision vector: %s", ", ".join(further))
    if manifest.text_tokens > settings.text_tokens:
        log.warning(
            "captions longer than %d tokens are cut; the longest has %d",
            *(settings.text_tokens, manifest.text_tokens),
        )
    log.info(
        "batch: %d x %d = %d on %d %s device(s); time shift %.2f",
        *(settings.micro_batch_size, settings.optimizer.grad_accum_steps, settings.global_batch_size),
        *(first.mesh.size, jax.devices()[0].device_kind, settings.flow.shift),
    )
    for each in stages:
        if (routing := each.settings.routing) is not None:
            of = f" of stage {each.stage.name}" if each.stage.name else ""
            begin, end = routing.middle(m.depth)
            log.info(
                "routing%s: in training %.0f %% of a picture's tokens skip the blocks %d to %d of %d",
                *(of, 100 * routing.share, begin + 1, end, m.depth),
            )
    if m.tap:
        until = config.alignment.until
        log.info(
            "alignment: features after block %d of %d, weight %g, %s",
            *(m.tap, m.depth, config.alignment.weight, "to the end" if until is None else f"to step {until}"),
        )
        if until is not None and until >= stages[-1].stage.last:
            log.warning("alignment.until is %d, which is not before the last step: it does not end", until)
    lines, warnings = plan.in_words(stages)
    log.info("the plan:")
    for line in lines:
        log.info("  %s", line)
    for line in warnings:
        log.warning("%s", line)


def describe_memory(each: Prepared) -> None:
    """Compiles a stage's step and logs what it needs; raises `OutOfMemory` where that is more than there is."""
    of = f" of stage {each.stage.name}" if each.stage.name else ""
    log.info("compiling the step%s (a minute or two on a GPU, unless it is in the compilation cache)", of)
    needed = each.planned_memory()
    log.info("memory of a device%s: %.2f GB (%s)", of, needed.total / 1e9, needed)


def announce(stages: Sequence[Prepared], present: Prepared, step: int) -> None:
    """Logs that a stage begins or goes on; says nothing in a run without stages."""
    stage, settings = present.stage, present.settings
    if not stage.name:
        return
    log.info(
        "stage %s (%d of %d), %s at step %d, to step %d: %d px, up to %d image tokens, batch %d x %d, learning rate "
        "%g, time shift %.2f",
        *(stage.name, list(stages).index(present) + 1, len(stages)),
        *("begins" if step == stage.first else "goes on", step, stage.last),
        *(present.manifest.resolution, settings.tokens),
        *(settings.micro_batch_size, settings.optimizer.grad_accum_steps, stage.config.optim.lr, settings.flow.shift),
    )
