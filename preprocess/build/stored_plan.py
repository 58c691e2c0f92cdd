"""The plan of a build on disk, so that other processes do its work without reading the input again.

    OUTPUT/.build/tasks/000000.json    a task: the images of a shard, at all resolutions, and what of them exists
    OUTPUT/.build/tasks/plan.json      options, encoders, versions, images of each task; written last

A worker reads `plan.json` and then one task at a time, however large the dataset is.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import fluxdit_jax
from fluxdit_jax.dataset.manifest import EncoderIdentity
from fluxdit_jax.shared.atomic_files import write_whole
from preprocess import PreprocessError
from preprocess.build.archive import Archive, Place
from preprocess.build.items import Item
from preprocess.build.jobs import Target, Task
from preprocess.build.loading import real_encoders
from preprocess.build.options import Options
from preprocess.build.plan import Fingerprints, Identities, Unit
from preprocess.build.units import WORK, disk_errors
from preprocess.decoding.images import Header
from preprocess.input.byte_source import ByteSource

FOLDER = "tasks"
_PLAN = "plan.json"
_FORMAT = 1
_DECODING = ("numpy", "pillow")
_ENCODING = ("torch", "transformers", "diffusers")


@dataclasses.dataclass(frozen=True)
class StoredPlan:
    """The plan of a build, for other processes.

    Attributes:
      options: of the build, with the device of the process that planned.
      identities: of its encoders.
      versions: of what decides the bytes of a shard, by package.
      images: of each task.
    """

    options: Options
    identities: Identities
    versions: dict[str, str]
    images: tuple[int, ...]

    @property
    def prints(self) -> Fingerprints:
        return Fingerprints.of(self.options, self.identities)

    def save(self, tasks: list[Task], archive: Archive) -> None:
        """Writes the plan and its tasks into the output of the options, in place of an earlier one."""
        folder, prints = _folder(Path(self.options.output)), self.prints
        with disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for number, task in enumerate(each.loaded() for each in tasks):
                places = archive.places(id_ for ids in task.ids(prints) for id_ in ids.values())
                write_whole(folder / f"{number:06d}.json", json.dumps(_raw_task(task, places)))
            raw = {
                "format": _FORMAT,
                "options": self.options.to_dict() | {"device": "auto", "workers": 0},
                "identities": {name: dataclasses.asdict(each) for name, each in self.identities.items()},
                "versions": self.versions,
                "images": self.images,
            }
            write_whole(folder / _PLAN, json.dumps(raw, indent=1))

    @classmethod
    def load(cls, output: Path) -> StoredPlan | None:
        """That of a build in `output`; None if there is none (yet). Raises `PreprocessError` if it cannot be read."""
        path = _folder(output) / _PLAN
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != _FORMAT:
                raise ValueError(f"its format is {raw['format']}, this version reads {_FORMAT}")
            identities = {name: EncoderIdentity(**each) for name, each in raw["identities"].items()}
            options = Options.from_dict(raw["options"], str(path))
            return cls(options, identities, raw["versions"], tuple(raw["images"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PreprocessError(f"{path} cannot be used: {error}; remove {path.parent}") from error

    @staticmethod
    def discard(output: Path) -> None:
        """Removes a plan, which ends where its build publishes."""
        (_folder(output) / _PLAN).unlink(missing_ok=True)

    def task(self, number: int) -> tuple[Task, dict[str, Place]]:
        """A task and where tensors of it exist, for `Archive.learn`.

        Raises:
          PreprocessError: it cannot be read, or this version would name its shards otherwise than the plan does.
        """
        path = _folder(Path(self.options.output)) / f"{number:06d}.json"
        try:
            task, places = _parsed(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PreprocessError(f"{path} cannot be used: {error}; plan again: remove {path.parent}") from error
        for target in task.targets:
            if target.unit.uid(self.prints) != target.uid:
                raise PreprocessError(f"{path} was planned by another version; plan again: remove {path.parent}")
        return task, places

    def require_like(self, identities: Identities, versions: dict[str, str]) -> None:
        """Checks that a process would make the bytes that the planning one would.

        Raises:
          PreprocessError: an encoder or a version differs; the message has both.
        """
        lines = [f"  {name}: {self.versions[name]} planned, {versions.get(name)} here" for name in self.versions
                 if versions.get(name) != self.versions[name]]  # fmt: skip
        for name, planned in self.identities.items():
            here = identities.get(name)
            if here is None or _decisive(here) != _decisive(planned):
                lines.append(f"  {name} encoder: {_told(planned)} planned, {_told(here)} here")
        if lines:
            raise PreprocessError(
                "this machine would make other bytes than the plan asks for:\n" + "\n".join(lines) + "\nInstall the "
                "same versions (`bash scripts/install.sh --encoders`), give the same encoders and --dtype; or plan "
                f"anew: remove {_folder(Path(self.options.output))}; finished shards stay"
            )


def versions_here(options: Options) -> dict[str, str]:
    """Of the packages that decide the bytes of a shard; without what says which build it is ("2.13.0+rocm6.4")."""
    names = _DECODING + (_ENCODING if real_encoders(options) else ())
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    return {"fluxdit_jax": fluxdit_jax.__version__} | found


def _decisive(identity: EncoderIdentity) -> tuple[Any, ...]:
    return identity.sha256, identity.dtype, identity.width, identity.options


def _told(identity: EncoderIdentity | None) -> str:
    return "none" if identity is None else f"{identity.id} ({identity.dtype}, sha256 {identity.sha256[:12]})"


def _folder(output: Path) -> Path:
    return output / WORK / FOLDER


def _raw_task(task: Task, places: dict[str, Any]) -> dict[str, Any]:
    images = [
        {
            "key": item.key,
            "image": dataclasses.asdict(item.image),
            "captions": item.captions,
            "content": item.content,
            "header": dataclasses.asdict(item.header),
            "seen": item.seen,
            "files": item.files,
        }
        for item in task.items
    ]
    return {
        "images": images,
        "units": [{"split": unit.split, "buckets": [item.bucket for item in unit.items]} for unit in task.units],
        "targets": [
            {"number": t.number, "uid": t.uid, "unit": task.units.index(t.unit), "folder": str(t.folder)}
            for t in task.targets
        ],
        "tensors": {id_: [str(path), row, layout] for id_, (path, row, layout) in places.items()},
    }


def _parsed(raw: dict[str, Any]) -> tuple[Task, dict[str, Any]]:
    units = tuple(
        Unit(unit["split"], tuple(_item(image, bucket) for image, bucket in zip(raw["images"], unit["buckets"])))
        for unit in raw["units"]
    )
    targets = tuple(Target(t["number"], t["uid"], units[t["unit"]], Path(t["folder"])) for t in raw["targets"])
    places = {id_: (Path(path), row, layout) for id_, (path, row, layout) in raw["tensors"].items()}
    return Task(units, targets), places


def _item(raw: dict[str, Any], bucket: list[int]) -> Item:
    height, width = bucket
    return Item(
        key=raw["key"],
        image=ByteSource(**raw["image"]),
        captions=tuple(raw["captions"]),
        content=raw["content"],
        header=Header(**raw["header"]),
        bucket=(height, width),
        seen=(raw["seen"][0], raw["seen"][1]),
        files=tuple((name, sha256) for name, sha256 in raw["files"]),
    )
