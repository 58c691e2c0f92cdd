"""What a run says of itself before its first step: the network, the data, and how long it will be."""

from __future__ import annotations

import logging

import jax
from ml_collections import ConfigDict

from fluxdit_jax.config import Settings
from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.device import devices
from fluxdit_jax.model import dit
from fluxdit_jax.run.progress import Length
from fluxdit_jax.shared.cli import duration

log = logging.getLogger("fluxdit_jax")
MANY_EPOCHS = 1000  # over a set that is not there to be memorised
SMALL_SET = 200  # pictures up to which a set is there to be memorised, as the gate's is
_EXPECTED_MFU = 0.4


def length(config: ConfigDict, manifest: Manifest) -> Length:
    """How long the run is."""
    micro_batches = config.optim.global_batch_size // config.data.micro_batch_size
    return Length(config.train.steps, micro_batches, config.optim.global_batch_size, manifest.records("train"))


def training_flops(settings: Settings) -> int:
    """FLOPs of a sample's forward and backward pass, recomputation not counted."""
    return 3 * dit.flops_per_sample(settings.model, settings.tokens, settings.batch.lengths)


def describe(config: ConfigDict, settings: Settings, manifest: Manifest, mesh: jax.sharding.Mesh) -> None:
    """Logs it, with warnings for captions that are cut and for a run that only memorises."""
    m = settings.model
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
        *(config.data.micro_batch_size, settings.optimizer.grad_accum_steps, config.optim.global_batch_size),
        *(mesh.size, jax.devices()[0].device_kind, settings.flow.shift),
    )
    _describe_length(length(config, manifest), training_flops(settings), config, mesh.size)


def _describe_length(whole: Length, flops: int, config: ConfigDict, devices_used: int) -> None:
    pictures, epochs = whole.steps * whole.global_batch, whole.epochs(whole.steps)
    peak = devices.peak_tflops(config.log.peak_tflops)
    time = ""
    if peak:
        seconds = pictures * flops / (_EXPECTED_MFU * 1e12 * peak * devices_used)
        time = f", about {duration(seconds)} at {_EXPECTED_MFU:.0%} of the peak rate"
    log.info(
        "length: %d steps of %d = %d pictures = %.3g epochs of %d images%s",
        *(whole.steps, whole.global_batch, pictures, epochs, whole.images, time),
    )
    if epochs > MANY_EPOCHS and whole.images > SMALL_SET:
        few = max(1, round(MANY_EPOCHS / 10 * whole.images / whole.global_batch))
        log.warning(
            "train.steps is %d: %.3g epochs of %d images. After so many a model has memorised its images; "
            "%d epochs are --config.train.steps=%d",
            *(whole.steps, epochs, whole.images, MANY_EPOCHS // 10, few),
        )
