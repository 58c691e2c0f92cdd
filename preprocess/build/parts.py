"""The datasets of a build: of one resolution, or of several in folders of their own under one output.

    OUTPUT/build.json                 the options of all
    OUTPUT/256/  OUTPUT/512/  ...     a dataset each

They have the same records in the same shards. The captions and the vision vector of a record are equal in all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Set
from pathlib import Path

from fluxdit_jax.dataset.manifest import INDEX, MANIFEST, DatasetError, load_manifest, parts_of
from fluxdit_jax.shared.sanitize import shown
from preprocess import PreprocessError
from preprocess.build import comparison, repeat
from preprocess.build.existing import Existing
from preprocess.build.jobs import Target, Task
from preprocess.build.journal import Journal
from preprocess.build.lock import locked
from preprocess.build.options import Options
from preprocess.build.plan import Fingerprints, Plan, Unit
from preprocess.build.publish import LOG_FILE, finish, load_options
from preprocess.build.rows import RowsFile
from preprocess.build.units import WORK, disk_errors
from preprocess.build.workers import require_no_worker
from preprocess.database import StoredSet
from preprocess.input.system_folders import hidden, is_plot, of_a_system

_LOGS = (".log", ".out", ".err")  # of a shell, of SLURM


@dataclasses.dataclass
class Part:
    """A dataset of a build.

    Attributes:
      options, output: of it.
      before: what the dataset in `output` was built with; None if there is none.
      plan: of its records. wanted: the units of the plan, by name.
      done: what of it exists.
      found: the plan beside what exists.
    """

    options: Options
    before: repeat.Earlier | None
    plan: Plan
    wanted: list[tuple[str, Unit]]
    done: Existing
    found: comparison.Comparison = dataclasses.field(default_factory=comparison.Comparison)

    @property
    def output(self) -> Path:
        return Path(self.options.output)


def load_parts(
    plan: Plan,
    options: Options,
    prints: Fingerprints,
    journal: Journal,
    beyond: Set[str] = frozenset(),
    damaged: frozenset[tuple[str, int]] = frozenset(),
) -> list[Part]:
    """The parts of a build, ascending by resolution.

    Args:
      plan: of the images.
      options: of the build.
      beyond: keys of the input that `--limit` leaves out.
      damaged: (shard file, row) of records that must not be used.
    """
    parts = []
    for own in options.parts():
        fitted = plan.at(own)
        wanted = [(unit.uid(prints), unit) for unit in fitted.units]
        done = Existing.load(Path(own.output), {uid for uid, _ in wanted}, journal, damaged)
        parts.append(Part(own, repeat.published(Path(own.output)), fitted, wanted, done))
    known = StoredSet(id_ for part in parts for id_ in part.done.usable())
    for part in parts:
        old = None
        if part.before and part.before.identities:
            earlier = dataclasses.replace(part.options, fit=part.before.values.get("fit", part.options.fit))
            old = Fingerprints.of(earlier, part.before.identities)
        part.found = comparison.compare(part.plan, prints, part.done, known, old, beyond)
    return parts


def tasks(parts: list[Part]) -> list[Task]:
    """What is to be encoded: of the same images at all resolutions, the units that are not done."""
    found = []
    for units in zip(*(part.wanted for part in parts), strict=True):
        targets = tuple(
            Target(number, uid, unit, part.output / WORK)
            for number, (part, (uid, unit)) in enumerate(zip(parts, units, strict=True))
            if uid not in part.done.units
        )
        if targets:
            found.append(Task(tuple(unit for _, unit in units), targets))
    return found


def datasets_of(directory: Path) -> list[Path]:
    """The datasets of a folder of several resolutions, those that it should hold as well; else the folder itself."""
    sides: Set[int] = parts_of(directory).keys()
    with contextlib.suppress(PreprocessError):
        sides |= set(load_options(directory).resolutions)
    return [directory / str(side) for side in sorted(sides)] or [directory]


def _require_ours(output: Path) -> None:
    """Raises `PreprocessError` where something stands that no build made: pictures, or another program's shards."""
    if not output.is_dir() or any((output / name).exists() for name in (LOG_FILE, Path(WORK) / "lock")):
        return
    found = sorted(path.name for path in output.iterdir() if not _of_nobody(path))
    if (output / WORK).is_dir() and any((output / WORK).iterdir()):  # one that is empty may be of a killed build
        found.append(WORK)
    if found and not (_is_dataset(output) or parts_of(output)):
        raise PreprocessError(
            f"--output {output} holds no dataset of `build`, and has {shown(found[0])}"
            f"{f' and {len(found) - 1:,} more' if found[1:] else ''}: give a new folder, or an empty one"
        )


def _of_nobody(path: Path) -> bool:
    """Whether a file may stand in a new output: a system's, what `--draw` has drawn, or what a shell has logged."""
    return hidden(path.name) or of_a_system(path.name) or is_plot(path, ours=False) or path.suffix in _LOGS


def _is_dataset(directory: Path) -> bool:
    """Whether there is a manifest, an index or the options of `build`."""
    for read in (
        lambda: load_manifest(directory),
        lambda: RowsFile(directory / INDEX),
        lambda: load_options(directory),
    ):
        with contextlib.suppress(DatasetError, PreprocessError):
            read()
            return True
    return False


def require_place(options: Options) -> None:
    """Checks that an output has room for a dataset, or for folders of several.

    Raises:
      PreprocessError: it holds the other, or a resolution that the build would leave behind, or files of someone else.
    """
    for each in dict.fromkeys((options.output, *(part.output for part in options.parts()))):
        _require_ours(Path(each))
    output, sides = Path(options.output), ",".join(map(str, options.resolutions or (options.resolution,)))
    if options.resolutions and (output / MANIFEST).exists():
        raise PreprocessError(
            f"--output {output} is a dataset of one resolution, and --resolution {sides} makes a folder of several. To "
            f"add resolutions to it, move it into a new folder under its own, as OUTPUT/512 if it is of 512 px"
        )
    there = parts_of(output)
    if there and not options.resolutions:
        raise PreprocessError(
            f"--output {output} holds datasets of {', '.join(map(str, there))} px in folders of their own: name all of "
            f"them, or one by its folder, as --output {output / str(options.resolution)}"
        )
    left = sorted(there.keys() - set(options.resolutions))
    if left:
        raise PreprocessError(
            f"--output {output} holds datasets of {', '.join(f'{side} px' for side in left)} as well, which "
            f"--resolution {sides} leaves out: name all of them, so that they stay the same images; or move "
            f"away what is not wanted any more ({output / str(left[0])})"
        )


@contextlib.contextmanager
def all_locked(options: Options) -> Iterator[None]:
    """Holds the locks of a build's output and of its parts. A build that fails before its first unit leaves no folder.

    Raises:
      PreprocessError: another process has one of them, or an output cannot be written.
    """
    outputs = list(dict.fromkeys([Path(options.output), *(Path(part.output) for part in options.parts())]))
    with contextlib.ExitStack() as held:
        for output in outputs:
            try:
                with disk_errors(output):
                    (output / WORK).mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise PreprocessError(f"--output {output} exists and is not a folder") from error
            held.enter_context(locked(output / WORK / "lock"))
        require_no_worker(outputs[0] / WORK)
        try:
            yield
        except PreprocessError:
            if all([path.name for path in (output / WORK).iterdir()] == ["lock"] for output in outputs):
                for output in reversed(outputs):
                    finish(output)
                    if output != outputs[0]:
                        with contextlib.suppress(OSError):  # it holds something
                            output.rmdir()
            raise
