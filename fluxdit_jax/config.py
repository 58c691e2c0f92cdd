"""The configuration: every key with its default, meaning and unit, and the checks of its values.

A file in `configs/` starts from `default_config()` and changes what its experiment needs. Nothing else in
the package sees the `ConfigDict`: `resolve` turns it into the frozen dataclasses that the model, the flow
and the optimizer take.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fluxdit_jax import flow, model, optimizer
from fluxdit_jax.attention import choose_implementation
from fluxdit_jax.data import ON_CORRUPT
from fluxdit_jax.other_captions import MAX_CAPTIONS
from fluxdit_jax.paths import HomeError, expand_keys
from fluxdit_jax.records import Manifest

# Keys in which a leading `~` is a home directory.
PATHS = ("workdir", "data.path", "log.vae", "gate.report", "resume.from_run")


class ConfigError(Exception):
    """A value of the configuration is wrong; the message starts with its key."""


def default_config() -> ConfigDict:
    """All keys. `placeholder` keys are optional (None) until they are given."""
    c = ConfigDict()
    c.seed = 0  # decides initialisation, order of the data, noise, times and dropped conditions
    c.workdir = placeholder(str)  # the run directory; not empty: the run in it is resumed
    c.profile = placeholder(str)  # "START:STOP": writes a trace of these steps under workdir/profile
    c.device_memory_gb = 24.0  # what one device may use; the memory plan is held against it

    c.data = ConfigDict()
    c.data.path = placeholder(str)  # dataset directory made by `python -m preprocess build`
    c.data.batch_size = 16  # samples per micro-batch, over all devices
    c.data.text_tokens = placeholder(int)  # captions are padded or cut to this; None: the longest stored
    c.data.caption_weights = ()  # relative weights of a picture's 1st, 2nd, ... caption; the last: of all further
    c.data.threads = 2  # reader threads
    c.data.prefetch = 4  # micro-batches read ahead
    c.data.on_corrupt = "stop"  # at a damaged record: stop, or skip: the next sound one stands in, up to 1 %

    c.model = ConfigDict()
    c.model.width = 384  # features of a token
    c.model.depth = 12  # blocks
    c.model.heads = 6  # attention heads; width / heads is a multiple of 4
    c.model.patch = 2  # latent pixels per token side
    c.model.channels = 16  # latent channels; must be the dataset's
    c.model.text_width = 1024  # width of a text token; must be the dataset's
    c.model.vision_width = 1024  # width of the vision vector; must be the dataset's
    c.model.dtype = "auto"  # of the network: bfloat16, float32; auto: float32 on a CPU, as few have fast bfloat16
    c.model.remat = "none"  # what is recomputed in the backward pass: none, dots, attention, block
    c.model.attention = "auto"  # cudnn, xla; auto: cudnn (flash) on an NVIDIA GPU in bfloat16

    c.flow = ConfigDict()
    c.flow.mean = 0.0  # of the logit of t
    c.flow.std = 1.0  # of the logit of t
    c.flow.uniform_share = 0.0  # share of samples with uniform t; 1.0: uniform time
    c.flow.shift = placeholder(float)  # time shift s; None: sqrt(largest token count / 256), at least 1
    c.flow.stratified = True  # one t from each of effective_batch quantiles
    c.flow.drop_text = 0.1  # probability of training a sample on its vision vector alone
    c.flow.drop_vision = 0.3  # ... on its caption alone
    c.flow.drop_both = 0.1  # ... on neither

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # adamw, muon
    c.optim.lr = 1e-4  # the highest learning rate
    c.optim.adam_lr = 1e-4  # with muon: of everything but the matrices inside the blocks
    c.optim.schedule = "constant"  # constant, cosine
    c.optim.warmup_steps = 1000  # steps in which the rate rises from 0
    c.optim.final_fraction = 0.0  # where the cosine ends, as a share of lr
    c.optim.b1 = 0.9  # decay of the first moment
    c.optim.b2 = 0.95  # decay of the second moment
    c.optim.eps = 1e-8  # added to the root of the second moment
    c.optim.weight_decay = 0.01  # matrices only
    c.optim.clip = 1.0  # global gradient norm
    c.optim.effective_batch = 256  # samples per optimizer step; a multiple of data.batch_size

    c.ema = ConfigDict()
    c.ema.decay = 0.9999  # warmed up as min(decay, (1 + t) / (10 + t))
    c.ema.short_decay = placeholder(float)  # of a second average, to see whether the first lags; None: none

    c.train = ConfigDict()
    c.train.steps = 100_000  # optimizer steps

    c.checkpoint = ConfigDict()
    c.checkpoint.minutes = 30.0  # between resumable checkpoints; the first comes after a tenth
    c.checkpoint.keep = 2  # resumable checkpoints kept
    c.checkpoint.ema_every = 5000  # steps between EMA weights; all are kept

    c.health = ConfigDict()
    c.health.action = "warn"  # what a diagnosis does: warn, stop
    c.health.max_skipped = 100  # micro-batches in a row without a finite gradient that end the run, whatever the action

    c.log = ConfigDict()
    c.log.every = 50  # steps between logged scalars
    c.log.minutes = 30.0  # image grid and held-out loss at least so often, first after a tenth; 0: by steps
    c.log.preview_every = 1000  # steps between image grids; 0: none
    c.log.preview_count = 8  # images per grid
    c.log.preview_steps = 32  # sampler steps of a preview
    c.log.preview_guidance = 1.0  # text guidance of a preview; 1: none
    c.log.heldout_every = 1000  # steps between held-out losses; 0: none (also without a holdout split)
    c.log.heldout_count = 128  # pictures of the holdout split
    c.log.peak_tflops = placeholder(float)  # of one device in bfloat16, for the MFU; None: by the device's name
    c.log.vae = placeholder(str)  # directory or id of the decoder; None: the one named in the dataset

    c.gate = ConfigDict()
    c.gate.required = False  # refuse to train without a passing validation report
    c.gate.report = placeholder(str)  # validation/report.json of a nano run

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices that split the batch; -1: all that are left
    c.mesh.fsdp = 1  # devices that split the weights
    c.mesh.coordinator = placeholder(str)  # several processes: host:port of process 0; auto: ask the cluster (SLURM)
    c.mesh.processes = 1  # with host:port: how many processes
    c.mesh.process = 0  # with host:port: the number of this one

    c.resume = ConfigDict()
    c.resume.allow_changes = False  # resume although keys that change the mathematics were changed
    c.resume.from_run = placeholder(str)  # a new run starts from this run's weights (another stage, resolution, data)
    c.resume.take = "ema"  # of that run: ema (weights; optimizer and step anew), state (everything, steps go on)
    return c


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is made of, resolved against its dataset.

    Attributes:
      model, flow, optimizer: see there.
      tokens: image tokens a sequence is padded to (the largest bucket).
      text_tokens: text tokens a caption is padded to.
      text_limit: text tokens a longer caption is cut to; None: none of the data set is that long.
      batch_size: samples of a micro-batch over all devices; effective_batch: of an optimizer step.
    """

    model: model.ModelConfig
    flow: flow.FlowConfig
    optimizer: optimizer.OptimizerConfig
    tokens: int
    text_tokens: int
    text_limit: int | None
    batch_size: int
    effective_batch: int
    ema_decay: float
    short_ema_decay: float | None
    seed: int


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        shown = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a huge integer"
        raise ConfigError(f"config.{key} is {shown[:200]}; it must be {expected}")


def _check_kinds(c: Any, default: ConfigDict, prefix: str = "") -> None:
    """Raises `ConfigError` for a missing key, and for a value that is not of the kind of the key's default.

    A file of Python can put anything anywhere; integers are counts of the device's int32.
    """
    for name in default:
        key = prefix + name
        _require(isinstance(c, ConfigDict), prefix[:-1], c, "a group of keys")
        _require(name in c, key, None, "there: the configuration lacks it")
        value, kind = c[name], default.get_type(name)
        if isinstance(default[name], ConfigDict):
            _check_kinds(value, default[name], f"{key}.")
        elif value is None and default[name] is None:
            continue
        elif kind is tuple:
            expected = "a tuple of numbers from 0 to 1e6, as (1.0, 0.5)"
            _require(isinstance(value, tuple), key, value, expected)
            for number in value:
                counts = isinstance(number, float) or type(number) is int
                _require(counts and 0 <= number <= 1e6, key, value, expected)
        elif kind is bool:
            _require(isinstance(value, bool), key, value, "True or False")
        elif kind is int:
            _require(type(value) is int and abs(value) < 2**31, key, value, "an integer below 2**31")
        elif kind is float:
            number = isinstance(value, float) or (type(value) is int and abs(value) < 2**53)
            _require(number, key, value, "a number")
        else:
            _require(isinstance(value, str) and "\0" not in value, key, value, "a text")


def check(c: ConfigDict) -> None:
    """Expands `~` in the keys that are paths. Raises `ConfigError`, naming the key, for a value that cannot be."""
    _check_kinds(c, default_config())
    try:
        expand_keys(c, PATHS)
    except HomeError as error:
        raise ConfigError(f"config.{error}") from error
    for key, text in (("workdir", "the run directory"), ("data.path", "a dataset directory")):
        value = c.data.path if key == "data.path" else c.workdir
        _require(bool(value), key, value, f"given: {text} (--config.{key}=DIR)")
    positive = {
        "device_memory_gb": c.device_memory_gb,
        "data.batch_size": c.data.batch_size,
        "data.threads": c.data.threads,
        "data.prefetch": c.data.prefetch,
        "model.width": c.model.width,
        "model.depth": c.model.depth,
        "model.heads": c.model.heads,
        "model.patch": c.model.patch,
        "model.channels": c.model.channels,
        "model.text_width": c.model.text_width,
        "model.vision_width": c.model.vision_width,
        "flow.std": c.flow.std,
        "optim.lr": c.optim.lr,
        "optim.adam_lr": c.optim.adam_lr,
        "optim.eps": c.optim.eps,
        "optim.clip": c.optim.clip,
        "optim.effective_batch": c.optim.effective_batch,
        "train.steps": c.train.steps,
        "checkpoint.minutes": c.checkpoint.minutes,
        "checkpoint.keep": c.checkpoint.keep,
        "checkpoint.ema_every": c.checkpoint.ema_every,
        "health.max_skipped": c.health.max_skipped,
        "log.every": c.log.every,
        "log.preview_count": c.log.preview_count,
        "log.preview_steps": c.log.preview_steps,
        "log.preview_guidance": c.log.preview_guidance,
        "log.heldout_count": c.log.heldout_count,
        "mesh.fsdp": c.mesh.fsdp,
        "mesh.processes": c.mesh.processes,
    }
    for key, value in positive.items():
        _require(math.isfinite(value) and value > 0, key, value, "a finite number above 0")
    not_negative = {
        "seed": c.seed,
        "optim.warmup_steps": c.optim.warmup_steps,
        "optim.weight_decay": c.optim.weight_decay,
        "log.minutes": c.log.minutes,
        "log.preview_every": c.log.preview_every,
        "log.heldout_every": c.log.heldout_every,
        "mesh.process": c.mesh.process,
    }
    for key, value in not_negative.items():
        _require(math.isfinite(value) and value >= 0, key, value, "0 or above")
    shares = {
        "flow.uniform_share": c.flow.uniform_share,
        "flow.drop_text": c.flow.drop_text,
        "flow.drop_vision": c.flow.drop_vision,
        "flow.drop_both": c.flow.drop_both,
        "optim.final_fraction": c.optim.final_fraction,
    }
    for key, value in shares.items():
        _require(0 <= value <= 1, key, value, "between 0 and 1")
    for key, value in {"optim.b1": c.optim.b1, "optim.b2": c.optim.b2, "ema.decay": c.ema.decay}.items():
        _require(0 <= value < 1, key, value, "at least 0 and below 1")
    if c.ema.short_decay is not None:
        expected = f"at least 0 and below ema.decay ({c.ema.decay})"
        _require(0 <= c.ema.short_decay < c.ema.decay, "ema.short_decay", c.ema.short_decay, expected)
    _require(c.seed < 2**31, "seed", c.seed, "below 2**31")
    _require(math.isfinite(c.flow.mean), "flow.mean", c.flow.mean, "a finite number")
    dropped = c.flow.drop_text + c.flow.drop_vision + c.flow.drop_both
    _require(dropped <= 1, "flow.drop_*", round(dropped, 6), "at most 1 in sum: they are one categorical draw")

    choices = {
        "model.dtype": (c.model.dtype, ("auto", "bfloat16", "float32")),
        "model.remat": (c.model.remat, tuple(model.REMAT_POLICIES)),
        "model.attention": (c.model.attention, ("auto", "cudnn", "xla")),
        "optim.name": (c.optim.name, optimizer.NAMES),
        "optim.schedule": (c.optim.schedule, optimizer.SCHEDULES),
        "data.on_corrupt": (c.data.on_corrupt, ON_CORRUPT),
        "health.action": (c.health.action, ("warn", "stop")),
        "resume.take": (c.resume.take, ("ema", "state")),
    }
    if str(c.model.dtype).lower() in ("float16", "fp16", "half", "f16"):
        raise ConfigError(
            f"config.model.dtype is {c.model.dtype!r}; float16 is refused: its largest number is 65,504, so "
            "activations of a transformer overflow and small gradients vanish without a word. Use bfloat16"
        )
    for key, (value, allowed) in choices.items():
        _require(value in allowed, key, value, "one of " + ", ".join(allowed))

    _require(
        c.model.width % c.model.heads == 0 and (c.model.width // c.model.heads) % 4 == 0,
        "model.width",
        c.model.width,
        f"a multiple of model.heads ({c.model.heads}) with a head size that is a multiple of 4",
    )
    _require(
        c.optim.effective_batch % c.data.batch_size == 0,
        "optim.effective_batch",
        c.optim.effective_batch,
        f"a multiple of data.batch_size ({c.data.batch_size})",
    )
    _require(c.mesh.data == -1 or c.mesh.data > 0, "mesh.data", c.mesh.data, "-1 (all devices) or above 0")
    if c.flow.shift is not None:
        _require(math.isfinite(c.flow.shift) and c.flow.shift > 0, "flow.shift", c.flow.shift, "above 0")
    if c.profile is not None:
        profile_steps(c.profile)
    if c.log.peak_tflops is not None:
        _require(0 < c.log.peak_tflops < math.inf, "log.peak_tflops", c.log.peak_tflops, "finite and above 0")
    weights = c.data.caption_weights
    _require(len(weights) <= MAX_CAPTIONS, "data.caption_weights", weights, f"at most {MAX_CAPTIONS} weights")
    _require(not weights or sum(weights) > 0, "data.caption_weights", weights, "not all 0, or () for all alike")
    if c.data.text_tokens is not None:
        _require(c.data.text_tokens > 0, "data.text_tokens", c.data.text_tokens, "above 0")
    _require(
        c.optim.warmup_steps <= c.train.steps or c.optim.schedule == "constant",
        "optim.warmup_steps",
        c.optim.warmup_steps,
        f"at most train.steps ({c.train.steps}) with a cosine schedule",
    )


def profile_steps(text: str) -> range:
    """The steps of `config.profile`, "START:STOP"."""
    start, colon, stop = text.partition(":")
    correct = colon and start.isdecimal() and stop.isdecimal() and len(text) < 30 and int(start) < int(stop)
    _require(bool(correct), "profile", text, "START:STOP with START below STOP, both steps")
    return range(int(start), int(stop))


def resolve(c: ConfigDict, manifest: Manifest) -> Settings:
    """Checks the configuration against the dataset and gives each part its plain values."""
    widths = (
        ("model.channels", c.model.channels, "VAE", manifest.vae),
        ("model.text_width", c.model.text_width, "text encoder", manifest.text),
        ("model.vision_width", c.model.vision_width, "vision encoder", manifest.vision),
    )
    for key, value, what, identity in widths:
        if value != identity.width:
            raise ConfigError(
                f"config.{key} is {value}, but the dataset {c.data.path} was made with the {what} "
                f"{identity.id!r} of width {identity.width}"
            )
    sizes = manifest.latent_sizes()
    for h, w in sizes:
        if h % c.model.patch or w % c.model.patch:
            raise ConfigError(
                f"config.model.patch is {c.model.patch}; it does not divide the latent size {w}x{h} (width x height)"
            )
    tokens = max(h * w for h, w in sizes) // c.model.patch**2
    text_tokens = c.data.text_tokens or 8 * math.ceil(manifest.text_tokens / 8)
    dtype = c.model.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    attention = c.model.attention
    if attention == "auto":
        attention = choose_implementation(dtype, c.model.width // c.model.heads)
    shift = flow.shift_for_tokens(tokens) if c.flow.shift is None else c.flow.shift
    m, f, o = c.model, c.flow, c.optim
    return Settings(
        model=model.ModelConfig(
            width=m.width,
            depth=m.depth,
            heads=m.heads,
            patch=m.patch,
            channels=m.channels,
            text_width=m.text_width,
            vision_width=m.vision_width,
            dtype=dtype,
            remat=m.remat,
            attention=attention,
        ),
        flow=flow.FlowConfig(
            mean=f.mean,
            std=f.std,
            uniform_share=f.uniform_share,
            shift=shift,
            stratified=f.stratified,
            drop_text=f.drop_text,
            drop_vision=f.drop_vision,
            drop_both=f.drop_both,
        ),
        optimizer=optimizer.OptimizerConfig(
            name=o.name,
            lr=o.lr,
            adam_lr=o.adam_lr,
            schedule=o.schedule,
            warmup_steps=o.warmup_steps,
            total_steps=c.train.steps,
            final_fraction=o.final_fraction,
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            clip=o.clip,
            accumulate=o.effective_batch // c.data.batch_size,
        ),
        tokens=tokens,
        text_tokens=text_tokens,
        text_limit=text_tokens if text_tokens < manifest.text_tokens else None,
        batch_size=c.data.batch_size,
        effective_batch=o.effective_batch,
        ema_decay=c.ema.decay,
        short_ema_decay=c.ema.short_decay,
        seed=c.seed,
    )
