"""The configuration: `KEYS` declares every key once, with its default, its meaning and unit, and its bounds.

A file in `configs/` starts from `default_config()` and changes what its experiment needs. Model and step code does not
see the `ConfigDict`: see `settings`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fluxdit_jax import alignment, flow, optimizer
from fluxdit_jax.dataset.captions import MAX_CAPTIONS
from fluxdit_jax.loader.reader import ON_CORRUPT
from fluxdit_jax.model import dit, rotary, routing
from fluxdit_jax.renamed_keys import EARLIER, gone
from fluxdit_jax.shared.paths import HomeError, expand_keys


class ConfigError(Exception):
    """A value of the configuration is wrong; the message starts with its key."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a value must be: a test, and the same in words for the error."""

    test: Callable[[Any], bool]
    words: str


POSITIVE = Bounds(lambda x: 0 < x < math.inf, "a finite number above 0")
TWO_OR_MORE = Bounds(lambda x: 2 <= x < math.inf, "2 or above")
NOT_NEGATIVE = Bounds(lambda x: 0 <= x < math.inf, "0 or above")
FINITE = Bounds(math.isfinite, "a finite number")
PART = Bounds(lambda x: 0 < x <= 1, "above 0 and at most 1")
SHARE = Bounds(lambda x: 0 <= x <= 1, "between 0 and 1")
DECAY = Bounds(lambda x: 0 <= x < 1, "at least 0 and below 1")
ANY = Bounds(lambda x: True, "")
WEIGHTS = Bounds(
    lambda x: len(x) <= MAX_CAPTIONS and (not x or sum(x) > 0),
    f"() for all alike, or at most {MAX_CAPTIONS} weights that are not all 0",
)


def one_of(*values: str) -> Bounds:
    return Bounds(lambda x: x in values, "one of " + ", ".join(values))


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
      default: a value; or a type, which makes the key optional: None until it is given.
      meaning: what it is, with its unit.
      path: a leading `~` is the home directory.
    """

    default: Any
    meaning: str
    bounds: Bounds = ANY
    path: bool = False

    @property
    def optional(self) -> bool:
        return isinstance(self.default, type)

    @property
    def kind(self) -> type:
        return self.default if isinstance(self.default, type) else type(self.default)


# The defaults of what the model, the flow and the optimizer take stand in their dataclasses.
_MODEL, _FLOW, _OPTIM, _ROUTING = dit.ModelConfig, flow.FlowConfig, optimizer.OptimizerConfig, routing.Routing
_ALIGNMENT = alignment.AlignmentConfig
KEYS = {
    "seed": Key(0, "decides initialisation, order of the data, noise, times and dropped conditions", NOT_NEGATIVE),
    "workdir": Key(str, "the run directory; not empty: the run in it is resumed", path=True),
    "profile": Key(str, '"START:STOP": writes a trace of these steps under workdir/profile'),
    "device_memory_gb": Key(24.0, "what one device may use; the memory plan is held against it", POSITIVE),
    # data
    "data.path": Key(str, "dataset directory made by `python -m preprocess build`", path=True),
    "data.resolution": Key(
        int, "of the datasets in data.path the one of this side, as DATASET/512; None: data.path is one", POSITIVE
    ),
    "data.micro_batch_size": Key(16, "samples per micro-batch, over all devices", POSITIVE),
    "data.text_tokens": Key(int, "captions are padded or cut to this; None: the longest stored", POSITIVE),
    "data.caption_weights": Key(
        (), "relative weights of a picture's 1st, 2nd, ... caption; the last: of all further", WEIGHTS
    ),
    "data.threads": Key(2, "reader threads", POSITIVE),
    "data.prefetch": Key(4, "micro-batches read ahead", POSITIVE),
    "data.on_corrupt": Key("stop", "at a damaged record: stop, or skip up to 1 % of them", one_of(*ON_CORRUPT)),
    # model
    "model.width": Key(_MODEL.width, "features of a token", POSITIVE),
    "model.depth": Key(_MODEL.depth, "blocks", POSITIVE),
    "model.heads": Key(_MODEL.heads, "attention heads; width / heads is a multiple of 4", POSITIVE),
    "model.patch": Key(_MODEL.patch, "latent pixels per token side", POSITIVE),
    "model.dtype": Key(
        "auto",
        "of the network: bfloat16, float32; auto: float32 on a CPU, as few have fast bfloat16",
        one_of("auto", "bfloat16", "float32"),
    ),
    "model.positions": Key(
        _MODEL.positions,
        "what rotary positions count: index: tokens; scaled: parts of the picture, alike at every resolution",
        one_of(*rotary.POSITIONS),
    ),
    "model.remat": Key(
        _MODEL.remat,
        "what is recomputed in the backward pass: none, dots, attention, block",
        one_of(*dit.REMAT_POLICIES),
    ),
    "model.attention": Key(
        "auto", "cudnn, xla; auto: cudnn (flash) on an NVIDIA GPU in bfloat16", one_of("auto", "cudnn", "xla")
    ),
    # routing
    "routing.share": Key(
        _ROUTING.share,
        "of each picture's tokens that skip the middle blocks in training (TREAD), to a thousandth; 0: none",
        Bounds(lambda x: x == 0 or 0.001 <= x <= 0.999, "0, or from 0.001 to 0.999"),
    ),
    "routing.first": Key(_ROUTING.first, "blocks before those skipped, which all tokens go through", NOT_NEGATIVE),
    "routing.last": Key(_ROUTING.last, "blocks after them", NOT_NEGATIVE),
    # alignment
    "alignment.block": Key(
        0, "features after so many blocks are held against the vision encoder's patches (REPA); 0: none", NOT_NEGATIVE
    ),
    "alignment.weight": Key(_ALIGNMENT.weight, "of its loss, beside that of the flow", POSITIVE),
    "alignment.until": Key(int, "the last step with it, counted from the start of the run; None: to the end", POSITIVE),
    # flow
    "flow.mean": Key(_FLOW.mean, "of the logit of t", FINITE),
    "flow.std": Key(_FLOW.std, "of the logit of t", POSITIVE),
    "flow.uniform_share": Key(_FLOW.uniform_share, "share of samples with uniform t; 1.0: uniform time", SHARE),
    "flow.shift": Key(float, "time shift s; None: sqrt(largest token count / 256), at least 1", POSITIVE),
    "flow.stratified": Key(_FLOW.stratified, "one t from each of global_batch_size quantiles"),
    "flow.drop": Key(flow.DROP, "conditions dropped in training, each subset with its probability, as vision+pose 0.2"),
    # optim
    "optim.name": Key(_OPTIM.name, ", ".join(optimizer.NAMES), one_of(*optimizer.NAMES)),
    "optim.lr": Key(_OPTIM.lr, "the highest learning rate", POSITIVE),
    "optim.adam_lr": Key(_OPTIM.adam_lr, "with muon: of everything but the matrices inside the blocks", POSITIVE),
    "optim.split_fused": Key(_OPTIM.split_fused, "with muon: orthogonalise q, k, v, gate and up each by itself"),
    "optim.schedule": Key(_OPTIM.schedule, ", ".join(optimizer.SCHEDULES), one_of(*optimizer.SCHEDULES)),
    "optim.warmup_steps": Key(
        _OPTIM.warmup_steps, "steps of linear warm-up, from lr / warmup_steps to lr", NOT_NEGATIVE
    ),
    "optim.final_fraction": Key(_OPTIM.final_fraction, "where the cosine ends, as a share of lr", SHARE),
    "optim.b1": Key(_OPTIM.b1, "decay of the first moment", DECAY),
    "optim.b2": Key(_OPTIM.b2, "decay of the second moment", DECAY),
    "optim.eps": Key(_OPTIM.eps, "with adamw: added to the root of the second moment", POSITIVE),
    "optim.weight_decay": Key(_OPTIM.weight_decay, "matrices only; with muon those inside the blocks", NOT_NEGATIVE),
    "optim.grad_clip_norm": Key(_OPTIM.grad_clip_norm, "global gradient norm", POSITIVE),
    "optim.global_batch_size": Key(256, "samples per optimizer step; a multiple of data.micro_batch_size", POSITIVE),
    # ema, train, checkpoint
    "ema.decay": Key(
        0.9999, "of the weights' average, per step; warmed up as min(decay, (1 + step) / (10 + step))", DECAY
    ),
    "ema.short_decay": Key(float, "of a second average, to see whether the first lags; None: none", DECAY),
    "train.steps": Key(100_000, "optimizer steps", POSITIVE),
    "train.images": Key(int, "pictures to train on, each as often as it is seen; if given, instead of steps", POSITIVE),
    "train.stages": Key("", "groups of config.stages, one after the other, as px256, px512; empty: no stages"),
    "checkpoint.minutes": Key(30.0, "between resumable checkpoints; the first comes after a tenth", POSITIVE),
    "checkpoint.keep": Key(2, "resumable checkpoints kept", POSITIVE),
    "checkpoint.ema_every": Key(5000, "steps between EMA weights; all are kept", POSITIVE),
    "checkpoint.after": Key(
        "", "command run in the background after each complete save, with {checkpoint} and {workdir}; empty: none"
    ),
    "checkpoint.after_minutes": Key(30.0, "the command is killed after", POSITIVE),
    # health, log
    "health.action": Key("warn", "what a diagnosis does: warn, stop", one_of("warn", "stop")),
    "health.max_skipped": Key(
        100, "micro-batches in a row without a finite gradient that end the run, whatever the action", POSITIVE
    ),
    "log.every": Key(50, "steps between logged scalars", POSITIVE),
    "log.minutes": Key(
        30.0, "image grid and held-out loss at least so often, first after a tenth; 0: by steps", NOT_NEGATIVE
    ),
    "log.preview_every": Key(1000, "steps between image grids; 0: none", NOT_NEGATIVE),
    "log.preview_count": Key(8, "images per grid", POSITIVE),
    "log.preview_steps": Key(32, "sampler steps of a preview", POSITIVE),
    "log.preview_guidance": Key(1.0, "text guidance of a preview; 1: none", POSITIVE),
    "log.heldout_every": Key(
        1000, "steps between held-out losses; 0: none (also without a holdout split)", NOT_NEGATIVE
    ),
    "log.heldout_count": Key(128, "pictures of the holdout split", POSITIVE),
    "log.peak_tflops": Key(float, "of one device in bfloat16, for the MFU; None: by the device's name", POSITIVE),
    "log.vae": Key(str, "directory of the decoder; None: the one named in the dataset", path=True),
    "log.tracker": Key("", "MODULE:OBJECT that gets the scalars and pictures of TensorBoard; empty: none"),
    # score, plan, gate, mesh, resume
    "score.every": Key(0, "steps between scores of what is drawn for held-out captions; 0: none", NOT_NEGATIVE),
    "score.count": Key(256, "captions of the holdout split", TWO_OR_MORE),
    "score.references": Key(2000, "training pictures that drawn ones are compared with", TWO_OR_MORE),
    "score.steps": Key(12, "solver steps", POSITIVE),
    "score.vision_encoder": Key(str, "directory or id; None: the one named in the dataset", path=True),
    "score.device": Key("cpu", "of the vision encoder: cpu, cuda, mps; on the training GPU it needs room"),
    "plan.utilisation": Key(0.4, "share of the devices' peak rate that the plan takes training to reach", PART),
    "plan.watts": Key(450.0, "of the whole machine while it trains", POSITIVE),
    "gate.required": Key(False, "refuse to train without a passing validation report"),
    "gate.report": Key(str, "validation/report.json of a nano run", path=True),
    "mesh.data": Key(
        -1,
        "devices that split the batch; -1: all that are left",
        Bounds(lambda x: x == -1 or x > 0, "-1 (all devices) or above 0"),
    ),
    "mesh.fsdp": Key(1, "devices that split the weights", POSITIVE),
    "mesh.coordinator": Key(str, "several processes: host:port of process 0; auto: ask the cluster (SLURM)"),
    "mesh.num_processes": Key(1, "with host:port: how many processes", POSITIVE),
    "mesh.patience": Key(60.0, "several processes: seconds of silence after which one is given up", POSITIVE),
    "mesh.process_id": Key(0, "with host:port: the number of this one", NOT_NEGATIVE),
    "resume.allow_changes": Key(False, "resume although keys that change the mathematics were changed"),
    "resume.from_run": Key(
        str, "a new run starts from this run's weights (another stage, resolution, data)", path=True
    ),
    "resume.take": Key(
        "ema",
        "of that run: ema (weights; optimizer and step anew), state (everything, steps go on)",
        one_of("ema", "state"),
    ),
}
# What a stage of a run may have of its own, see `stages`.
STAGE_KEYS = (
    "data.resolution",
    "data.micro_batch_size",
    "model.remat",
    "routing.share",
    "train.steps",
    "train.images",
    "flow.mean",
    "flow.std",
    "flow.uniform_share",
    "flow.shift",
    "flow.drop",
    "optim.lr",
    "optim.adam_lr",
    "optim.schedule",
    "optim.warmup_steps",
    "optim.final_fraction",
    "log.preview_every",
    "log.heldout_every",
)
PATHS = tuple(name for name, key in KEYS.items() if key.path)


def default_config() -> ConfigDict:
    """All keys with their defaults; `stages` for `stages.add_stage`."""
    config = ConfigDict({"stages": {}})
    for name, key in KEYS.items():
        *groups, last = name.split(".")
        group = config
        for part in groups:
            if part not in group:
                group[part] = ConfigDict()
            group = group[part]
        group[last] = placeholder(key.kind) if key.optional else key.default
    return config


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        shown = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a huge integer"
        raise ConfigError(f"config.{name} is {shown[:200]}; it must be {expected}")


def _value(c: Any, name: str) -> Any:
    """The value at a dotted name; raises `ConfigError` if a group or the key is missing."""
    above: list[str] = []
    for part in name.split("."):
        _require(isinstance(c, ConfigDict), ".".join(above), c, "a group of keys")
        above.append(part)
        _require(part in c, ".".join(above), None, "there: the configuration lacks it")
        c = c[part]
    return c


def _require_kind(name: str, value: Any, kind: type) -> None:
    """Raises `ConfigError` unless the value has this type; integers must fit in int32."""
    if kind is tuple:
        counts = isinstance(value, tuple) and all(
            (isinstance(number, float) or type(number) is int) and 0 <= number <= 1e6 for number in value
        )
        _require(counts, name, value, "a tuple of numbers from 0 to 1e6, as (1.0, 0.5)")
    elif kind is bool:
        _require(isinstance(value, bool), name, value, "True or False")
    elif kind is int:
        _require(type(value) is int and abs(value) < 2**31, name, value, "an integer below 2**31")
    elif kind is float:
        number = isinstance(value, float) or (type(value) is int and abs(value) < 2**53)
        _require(number, name, value, "a number")
    else:
        _require(isinstance(value, str) and "\0" not in value, name, value, "a text")


def check(c: ConfigDict, stage: bool = False) -> None:
    """Expands `~` in the keys that are paths; raises `ConfigError`, naming the key, for an invalid value."""
    for name in EARLIER:
        group, _, last = name.partition(".")
        if isinstance(c.get(group), ConfigDict) and last in c[group]:
            raise ConfigError(f"config.{name} {gone(name)}")
    for name, key in KEYS.items():
        value = _value(c, name)
        if not (key.optional and value is None):
            _require_kind(name, value, key.kind)
    try:
        expand_keys(c, PATHS)
    except HomeError as error:
        raise ConfigError(f"config.{error}") from error
    for name, what in (("workdir", "the run directory"), ("data.path", "a dataset directory")):
        _require(bool(_value(c, name)), name, _value(c, name), f"given: {what} (--config.{name}=DIR)")
    if c.model.dtype.lower() in ("float16", "fp16", "half", "f16"):
        raise ConfigError(
            f"config.model.dtype is {c.model.dtype!r}; float16 is refused: its largest number is 65,504, so "
            "activations of a transformer overflow and small gradients vanish without a word. Use bfloat16"
        )
    for name, key in KEYS.items():
        value = _value(c, name)
        if not (key.optional and value is None):
            _require(key.bounds.test(value), name, value, key.bounds.words)
    _check_stages(_value(c, "stages"))
    _check_together(c, stage or not c.train.stages)


def _check_stages(stages: Any) -> None:
    """The kinds of the values in `config.stages`; their bounds are those of the whole configuration of each stage."""
    _require(isinstance(stages, ConfigDict), "stages", stages, "a group of stages")
    for stage, group in stages.items():
        plain = re.fullmatch(r"[A-Za-z0-9_]{1,60}", stage) is not None
        _require(
            plain and isinstance(group, ConfigDict), f"stages.{stage}", group, "a group, named by letters and digits"
        )
        for part, keys in group.items():
            _require(isinstance(keys, ConfigDict), f"stages.{stage}.{part}", keys, "a group of keys")
            for last, value in keys.items():
                name = f"stages.{stage}.{part}.{last}"
                known = f"{part}.{last}" in STAGE_KEYS
                _require(known, name, value, f"left out: no key of a stage, which are {', '.join(STAGE_KEYS)}")
                if value is not None:
                    _require_kind(name, value, KEYS[f"{part}.{last}"].kind)


def _check_together(c: ConfigDict, stage: bool) -> None:
    """Constraints between keys; some only of a `stage`, as each may have these keys for itself."""
    if c.ema.short_decay is not None:
        below = f"below ema.decay ({c.ema.decay})"
        _require(c.ema.short_decay < c.ema.decay, "ema.short_decay", c.ema.short_decay, below)
    _require(
        c.model.width % c.model.heads == 0 and (c.model.width // c.model.heads) % 4 == 0,
        "model.width",
        c.model.width,
        f"a multiple of model.heads ({c.model.heads}) with a head size that is a multiple of 4",
    )
    _require(
        c.routing.share == 0 or c.routing.first + c.routing.last < c.model.depth,
        "routing.first",
        c.routing.first,
        f"below model.depth - routing.last ({c.model.depth - c.routing.last}): else no block is skipped",
    )
    below = f"below model.depth ({c.model.depth})"
    _require(c.alignment.block < c.model.depth, "alignment.block", c.alignment.block, below)
    if c.profile is not None:
        profile_steps(c.profile)
    check_mesh(c.mesh)
    if stage:
        batch, micro_batch, warmup = c.optim.global_batch_size, c.data.micro_batch_size, c.optim.warmup_steps
        words = f"a multiple of data.micro_batch_size ({micro_batch})"
        _require(batch % micro_batch == 0, "optim.global_batch_size", batch, words)
        words = f"at most train.steps ({c.train.steps}) with a cosine schedule"
        _require(warmup <= c.train.steps or c.optim.schedule == "constant", "optim.warmup_steps", warmup, words)


def check_mesh(mesh: ConfigDict) -> None:
    """How processes find each other; raises `ConfigError`."""
    if mesh.coordinator is None:
        _require(mesh.num_processes == 1, "mesh.num_processes", mesh.num_processes, "1 without a mesh.coordinator")
    elif mesh.coordinator != "auto":
        host, _, port = mesh.coordinator.rpartition(":")
        correct = bool(host) and port.isdecimal() and 0 < int(port) < 65536
        _require(correct, "mesh.coordinator", mesh.coordinator, "host:port of process 0, or auto")


def profile_steps(text: str) -> range:
    """The steps of `config.profile`, "START:STOP"."""
    start, colon, stop = text.partition(":")
    correct = colon and start.isdecimal() and stop.isdecimal() and len(text) < 30 and int(start) < int(stop)
    _require(bool(correct), "profile", text, "START:STOP with START below STOP, both steps")
    return range(int(start), int(stop))
