"""What a run is made of: the plain values that the model, the flow, the optimizer and the loader take."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, TypeVar

import jax
from ml_collections import ConfigDict

from fluxdit_jax import flow, optimizer
from fluxdit_jax.alignment import AlignmentConfig
from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.cells import FACTOR_BYTES, side_of
from fluxdit_jax.dataset.fields import PATCHES, of_captions
from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.loader.reader import BatchLayout
from fluxdit_jax.model import dit
from fluxdit_jax.model.attention import choose_implementation
from fluxdit_jax.model.conditions import Condition
from fluxdit_jax.model.routing import Routing

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is made of, resolved against its dataset.

    Attributes:
      model, flow, optimizer: see there.
      routing: of the tokens in training; None: none.
      alignment: with the vision encoder's patches; None: none.
      batch: what a micro-batch consists of.
      text_limit: text tokens a longer caption is cut to; None: none of the data set is that long.
      micro_batch_size: samples of a micro-batch over all devices; global_batch_size: of an optimizer step.
    """

    model: dit.ModelConfig
    flow: flow.FlowConfig
    optimizer: optimizer.OptimizerConfig
    routing: Routing | None
    alignment: AlignmentConfig | None
    batch: BatchLayout
    text_limit: int | None
    micro_batch_size: int
    global_batch_size: int
    ema_decay: float
    short_ema_decay: float | None
    seed: int

    @property
    def tokens(self) -> int:
        """Image tokens a latent is padded to (the largest bucket)."""
        return self.batch.tokens

    @property
    def text_tokens(self) -> int:
        """Text tokens a caption is padded to."""
        return self.batch.lengths["text"]


def conditions_of(manifest: Manifest) -> tuple[Condition, ...]:
    """What the network is given: the conditions that the dataset stores."""
    return tuple(
        Condition(name, manifest.encoders[name].width, name in manifest.lengths) for name in manifest.conditions
    )


def resolve(c: ConfigDict, manifest: Manifest, first: int = 0) -> Settings:
    """Checks the configuration against the dataset and gives each part its plain values.

    Args:
      first: the step from which the learning rate is counted.
    """
    sizes = manifest.latent_sizes()
    for h, w in sizes:
        if h % c.model.patch or w % c.model.patch:
            raise ConfigError(
                f"config.model.patch is {c.model.patch}; it does not divide the latent size {w}x{h} (width x height)"
            )
    tokens = max(h * w for h, w in sizes) // c.model.patch**2
    lengths = {name: 8 * math.ceil(longest / 8) for name, longest in manifest.lengths.items()}
    lengths["text"] = text_tokens = c.data.text_tokens or lengths["text"]
    try:
        drop = flow.parse_drop(c.flow.drop, list(manifest.conditions), [f.name for f in of_captions(manifest.layout)])
    except ValueError as error:
        raise ConfigError(f"config.flow.drop is {c.flow.drop!r}: {error}") from error
    dtype = c.model.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    attention = c.model.attention
    runs_here = choose_implementation(dtype, c.model.width // c.model.heads)
    if attention == "cudnn" != runs_here:
        log.warning("config.model.attention is cudnn, which cannot run here: xla is taken, which computes the same")
    if attention == "auto" or runs_here == "xla":
        attention = runs_here
    shift = flow.shift_for_tokens(tokens) if c.flow.shift is None else c.flow.shift
    model = _fill(
        dit.ModelConfig,
        c.model,
        dtype=dtype,
        attention=attention,
        channels=manifest.vae.width,
        conditions=conditions_of(manifest),
        tap=c.alignment.block,
        target_width=_target_width(c, manifest),
    )
    alignment = _alignment(c, first)
    return Settings(
        model=model,
        flow=_fill(flow.FlowConfig, c.flow, shift=shift, drop=drop),
        optimizer=_fill(
            optimizer.OptimizerConfig,
            c.optim,
            first_step=first,
            total_steps=c.train.steps - first,
            grad_accum_steps=c.optim.global_batch_size // c.data.micro_batch_size,
        ),
        routing=_fill(Routing, c.routing) if c.routing.share else None,
        alignment=alignment,
        batch=_batch(manifest, model, tokens, lengths, patches=alignment is not None),
        text_limit=text_tokens if text_tokens < manifest.text_tokens else None,
        micro_batch_size=c.data.micro_batch_size,
        global_batch_size=c.optim.global_batch_size,
        ema_decay=c.ema.decay,
        short_ema_decay=c.ema.short_decay,
        seed=c.seed,
    )


def _target_width(c: ConfigDict, manifest: Manifest) -> int:
    """Values of a stored patch, 0 without alignment; raises `ConfigError` where the dataset has none."""
    if not c.alignment.block:
        return 0
    if PATCHES.name not in manifest.encoders:
        raise ConfigError(
            f"config.alignment.block is {c.alignment.block}, and {c.data.path} has no patches of the vision encoder: "
            "`python -m preprocess build --output DATASET --vision-patches 256` adds them"
        )
    return manifest.encoders[PATCHES.name].width - FACTOR_BYTES


def _alignment(c: ConfigDict, first: int) -> AlignmentConfig | None:
    """The alignment of the steps after `first`; its end is None where that is not before the last step."""
    if not c.alignment.block or (c.alignment.until is not None and c.alignment.until <= first):
        return None
    ends = c.alignment.until is not None and c.alignment.until < c.train.steps
    return AlignmentConfig(c.alignment.weight, c.alignment.until if ends else None)


def _batch(
    manifest: Manifest, model: dit.ModelConfig, tokens: int, lengths: dict[str, int], patches: bool
) -> BatchLayout:
    """What a micro-batch consists of."""
    widths, cell = {each.name: each.width for each in model.conditions}, 0.0
    wanted = {name: length for name, length in lengths.items() if name in widths}
    if patches:
        encoder = manifest.encoders[PATCHES.name]
        widths[PATCHES.name], wanted[PATCHES.name] = encoder.width, manifest.lengths[PATCHES.name]
        cell = side_of(manifest.resolution, encoder.options["cells"])
    return BatchLayout(model.patch, tokens, model.token_width, widths, wanted, cell)


def _fill(kind: type[T], group: ConfigDict, **others: Any) -> T:
    """Builds `kind` from the keys of the group that have its fields' names; `others` override."""
    names = {field.name for field in dataclasses.fields(kind)} - others.keys()  # type: ignore[arg-type]
    return kind(**{name: group[name] for name in names}, **others)
