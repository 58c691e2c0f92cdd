"""What encoding works on: the same images at one or several resolutions, of which some shards are to be made."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fluxdit_jax.dataset.fields import LATENT
from preprocess.buckets import Size
from preprocess.build.items import Item
from preprocess.build.plan import Fingerprints, Unit
from preprocess.decoding.images import Rejected

_AT = "@"


@dataclasses.dataclass(frozen=True)
class Target:
    """A shard that is to be made.

    Attributes:
      number: of its resolution in the build.
      folder: `.build` of its dataset.
    """

    number: int
    uid: str
    unit: Unit
    folder: Path

    @property
    def latent(self) -> str:
        """Name under which its latents are held, beside those of other resolutions."""
        return f"{LATENT.name}{_AT}{self.number}"


def field_of(name: str) -> str:
    """The field of what is held under a name."""
    return name.partition(_AT)[0]


@dataclasses.dataclass(frozen=True)
class Task:
    """The same images at every resolution of a build; its images are in memory once it is `loaded`.

    Attributes:
      units: at each resolution.
      targets: those of them that are to be made, at least one.
    """

    units: tuple[Unit, ...]
    targets: tuple[Target, ...]

    def loaded(self) -> Task:
        """The task with its images in memory."""
        units = tuple(unit.loaded() for unit in self.units)
        return Task(units, tuple(dataclasses.replace(target, unit=units[target.number]) for target in self.targets))

    @property
    def items(self) -> Sequence[Item]:
        """The images; their buckets are those of the first resolution."""
        return self.units[0].items

    def sizes(self, index: int) -> tuple[Size, ...]:
        """The sizes at which encoders are given an image."""
        return (*(unit.items[index].bucket for unit in self.units), self.items[index].seen)

    def size(self, index: int, name: str) -> Size:
        """The size at which an image is encoded to what is held under a name."""
        for target in self.targets:
            if name == target.latent:
                return target.unit.items[index].bucket
        return self.items[index].seen

    def ids(self, prints: Fingerprints) -> list[dict[str, str]]:
        """For each image the names of its tensors, by the name under which they are held."""
        of_targets = [[prints.ids(item) for item in target.unit.items] for target in self.targets]
        latent = prints.names.index(LATENT.name)
        every = []
        for index in range(len(self.items)):
            ids = dict(zip(prints.names, of_targets[0][index], strict=True))
            del ids[LATENT.name]
            latents = {t.latent: own[index][latent] for t, own in zip(self.targets, of_targets, strict=True)}
            every.append(latents | ids)
        return every


@dataclasses.dataclass
class Job:
    """A task being done.

    Attributes:
      ids: of `Task.ids`.
      tensors: of each image, those that there are, by the name under which they are held; what is made from captions
        is a tuple, of all of them.
    """

    task: Task
    ids: list[dict[str, str]]
    tensors: list[dict[str, Any]]
    batches: list[list[int]]
    rejects: dict[int, Rejected] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Loaded:
    """A picture, as each encoder wants it, by the name under which the result is held; None if none needs it."""

    pixels: dict[str, np.ndarray] | None
    profile_ignored: bool


def batches(task: Task, tensors: list[dict[str, Any]], names: Sequence[str], size: int) -> list[list[int]]:
    """Images that need more than captions, in batches of equal sizes and one kind of need.

    Args:
      names: under which that is held.
    """
    groups: dict[tuple[tuple[Size, ...], tuple[bool, ...]], list[int]] = collections.defaultdict(list)
    for index, there in enumerate(tensors):
        needs = tuple(name not in there for name in names)
        if any(needs):
            groups[task.sizes(index), needs].append(index)
    return [
        members[start : start + size] for _, members in sorted(groups.items()) for start in range(0, len(members), size)
    ]
