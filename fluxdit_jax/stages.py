"""A run in stages: the same weights trained on, each time at another resolution, length, micro-batch or learning rate.

`config.train.stages` names them in order. `config.stages.NAME` holds the keys of `STAGE_KEYS` in which a stage differs
from the rest of the configuration; what is None there is as everywhere. What carries over at a switch is the whole
training state (weights, moments, EMA, step), the sample count and with it the place in the epoch. What is the stage's
own is the data of its resolution with its latent statistics, the compiled step, the time shift, and the learning rate,
whose schedule is counted from the stage's first step.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fluxdit_jax.config import KEYS, STAGE_KEYS, ConfigError, check

LENGTHS = ("train.steps", "train.images")  # the keys that say how long a run or a stage is


def add_stage(config: ConfigDict, name: str, values: dict[str, Any]) -> None:
    """Adds a stage to a configuration, for files in `configs/`: the keys in which it differs, with their values."""
    group = ConfigDict()
    for key in STAGE_KEYS:
        part, _, last = key.partition(".")
        if part not in group:
            group[part] = ConfigDict()
        group[part][last] = placeholder(KEYS[key].kind)
    for key, value in values.items():
        part, _, last = key.partition(".")
        group[part][last] = value
    config.stages[name] = group
    config.train.stages = ", ".join(filter(None, [config.train.stages, name]))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run that is trained in one way.

    Attributes:
      name: "" of a run without stages.
      config: the run's with the stage's keys in place. `data.path` is the dataset of its resolution; `train.steps` is
        the step after which it ends, counted from the start of the run.
      first: steps before it.
    """

    name: str
    config: ConfigDict
    first: int

    @property
    def last(self) -> int:
        """The step after which it ends."""
        return self.config.train.steps


def stages_of(config: ConfigDict) -> tuple[Stage, ...]:
    """The stages of a checked configuration, each checked as well; raises `ConfigError`."""
    names = [name.strip() for name in config.train.stages.split(",")]
    if len(set(names)) < len(names):
        raise ConfigError(f"config.train.stages is {config.train.stages!r}: a stage is named twice")
    stages: list[Stage] = []
    for name in names:
        own = config.copy_and_resolve_references()
        own.unlock()
        if name or len(names) > 1:
            _put(own, name, config)
        _set_length(own)
        try:
            check(own, stage=True)
        except ConfigError as error:
            raise ConfigError(f"stage {name}: {error}" if name else str(error)) from error
        first = stages[-1].last if stages else 0
        own.train.steps += first
        if own.data.resolution is not None:
            own.data.path = str(Path(own.data.path) / str(own.data.resolution))
        stages.append(Stage(name, own, first))
    return tuple(stages)


def _put(own: ConfigDict, name: str, config: ConfigDict) -> None:
    """Puts the values of a stage in the place of the run's; raises `ConfigError`."""
    if name not in config.stages:
        known = ", ".join(config.stages) or "none"
        raise ConfigError(f"config.train.stages names {name!r}; the groups of config.stages are: {known}")
    group = config.stages[name]
    values = {key: value for key in STAGE_KEYS if (value := _given(group, key)) is not None}
    if not values.keys() & set(LENGTHS):
        raise ConfigError(f"config.stages.{name} must have train.steps or train.images")
    own.train.images = None
    for key, value in values.items():
        part, _, last = key.partition(".")
        own[part][last] = value


def _set_length(own: ConfigDict) -> None:
    """Makes steps of `train.images`, if it is given; values that are wrong are left to `check`."""
    images, batch = own.train.images, own.optim.global_batch_size
    if type(images) is int and type(batch) is int and images > 0 and batch > 0:
        own.train.steps = math.ceil(images / batch)


def _given(group: ConfigDict, key: str) -> Any:
    part, _, last = key.partition(".")
    return group.get(part, {}).get(last)


def stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that a step belongs to: weights of a step at a switch are those of the stage that has ended."""
    return next((stage for stage in stages if step <= stage.last), stages[-1])


def key_of(name: str) -> str:
    """The key that a key of a stage, as stages.NAME.optim.lr, stands for; any other is its own."""
    head, _, rest = name.partition(".")
    return rest.partition(".")[2] if head == "stages" else name
