"""`build --worker I/N`: one of N processes, on one machine or many, that make the shards of one build.

    build --worker 1/3 ─ plans, stores the plan ─┐
    build --worker 2/3 ─ waits for it ───────────┼─ each makes every third task ─► OUTPUT/.build ─► build: publishes
    build --worker 3/3 ─ waits for it ───────────┘

All see the input and the output at the same paths. A worker that died is started again, or its shards are made by the
`build` without `--worker` that publishes. The bytes are those that one process makes on a device of the same kind.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fluxdit_jax.dataset.manifest import MANIFEST
from fluxdit_jax.shared.lock import holder_of
from preprocess import PreprocessError
from preprocess.build.archive import Archive
from preprocess.build.build import Prepared, Progress, prepare
from preprocess.build.encode import Counts, Encoding
from preprocess.build.jobs import Task
from preprocess.build.journal import Journal
from preprocess.build.loading import device_name, load_encoders
from preprocess.build.options import Options
from preprocess.build.parts import all_locked, require_place
from preprocess.build.publish import LOG_FILE
from preprocess.build.stored_plan import StoredPlan, versions_here
from preprocess.build.units import WORK, load_unit
from preprocess.build.workers import note_device, worker_locked
from preprocess.input.precomputed import folders_of_plan

# Options of each machine; that encoders and their dtype make the same bytes is checked by what they are.
_OWN = ("device", "dtype", "workers", "vae", "text_encoder", "vision_encoder")
_POLL, _TELL = 1.0, 60.0  # seconds between two looks for the plan, and between two lines about it
_PATIENCE = 900.0  # seconds without a plan and without anybody who makes it
_SETTLING = 5.0  # seconds that the process that planned may need to let go of the output


def work(options: Options, number: int, count: int, replace: bool = False) -> int:
    """Makes every `count`-th task of the build, from the `number`-th on; the first plans if there is no plan yet.

    Args:
      options: of the build; device and threads are this machine's, the rest must be the plan's.
      replace: as of `build`.

    Returns:
      Exit status.

    Raises:
      PreprocessError: as `build`; or this machine would make other bytes than the plan asks for.
    """
    options = Options.from_dict(options.checked().to_dict(), "--output")  # with absolute paths
    require_place(options)
    output = Path(options.output)
    journal = Journal(output / LOG_FILE)
    if number == 1 and StoredPlan.load(output) is None:
        with all_locked(options):
            store_plan(prepare(options, journal, replace=replace))
    plan = _awaited(output, journal, count)
    if plan is None:
        journal.say(f"worker {number} of {count}: {output} was published meanwhile, by a build without workers")
        return 0
    _require_same(plan, options)
    with worker_locked(output / WORK, f"{number}-of-{count}"):
        worker = Worker(plan, options, journal)
        note_device(output / WORK, worker.device)
        own = range(number - 1, len(plan.images), count)
        who = f"worker {number} of {count}"
        journal.say(f"{who} on {worker.device}: {len(own)} of {len(plan.images)} tasks")
        made = worker.make(own)
    journal.say(
        f"{who}: its shards are there, {made.pictures} pictures were encoded. When all workers are done, publish with "
        f"python -m preprocess build --output {output}"
    )
    return 0


def store_plan(prepared: Prepared) -> StoredPlan:
    """Stores what a build has to encode, for other processes."""
    options, images = prepared.options, tuple(len(task.items) for task in prepared.todo)
    plan = StoredPlan(options, prepared.identities, versions_here(options), images)
    plan.save(prepared.todo, prepared.archive)
    return plan


class Worker:
    """Encoders on a device, ready for the tasks of a plan.

    Attributes:
      device: its name.
    """

    def __init__(self, plan: StoredPlan, options: Options, journal: Journal):
        """Raises `PreprocessError` if an encoder cannot be loaded or is not the plan's."""
        self._plan, self._journal = plan, journal
        self._options = _here(plan.options, options)
        precomputed = folders_of_plan(options.condition, options.vision_embeddings, plan.identities)
        self._encoders = load_encoders(self._options, precomputed)
        plan.require_like(self._encoders.identities, versions_here(self._options))
        self.device = device_name(self._options)

    def make(self, numbers: Sequence[int]) -> Counts:
        """Makes the shards of these tasks that are not there yet; returns what was done for it."""
        archive = Archive(lambda what: self._journal.say(f"damaged: {what}"))
        encoding = Encoding(self._encoders, self._options, self._plan.prints, archive, self._journal.event)
        with self._journal.bar(sum(self._plan.images[number] for number in numbers), "encode") as bar:

            def tasks() -> Iterator[Task]:
                for number in numbers:
                    task, places = self._plan.task(number)
                    if all(load_unit(target.folder, target.uid) for target in task.targets):
                        bar.update(len(task.items))
                    else:
                        archive.learn(places)
                        yield task

            for _, info in encoding.run(tasks(), Progress(bar, encoding, self._journal, 0)):
                self._journal.event("unit", uid=info.uid, split=info.split, records=info.records, bytes=info.bytes)
        return encoding.counts


def _here(planned: Options, here: Options) -> Options:
    """The plan's options with what is this machine's own."""
    return dataclasses.replace(planned, **{name: getattr(here, name) for name in _OWN})


def _require_same(plan: StoredPlan, options: Options) -> None:
    planned, given = plan.options.to_dict(), options.to_dict()
    own = {*_OWN, "max_rejects"}
    differing = [name for name, value in planned.items() if name not in own and given[name] != value]
    if differing:
        lines = [f"  --{name.replace('_', '-')} {given[name]}, planned with {planned[name]}" for name in differing]
        raise PreprocessError(
            f"{plan.options.output} is being built with other options:\n" + "\n".join(lines) + "\nLeave them out, or "
            f"finish that build: python -m preprocess build --output {plan.options.output}"
        )


def _manifests(output: Path) -> dict[Path, int]:
    """When each dataset of a build was published."""
    places = [output / MANIFEST, *output.glob(f"*/{MANIFEST}")]
    return {path: path.stat().st_mtime_ns for path in places if path.exists()}


def _awaited(output: Path, journal: Journal, count: int) -> StoredPlan | None:
    """The plan, once it is there; None if a build of all resolutions has published instead."""
    told, last = 0.0, time.monotonic()
    before = _manifests(output)
    while (plan := StoredPlan.load(output)) is None:
        now = time.monotonic()
        if holder_of(output / WORK / "lock"):
            last = now
        elif _manifests(output) != before:
            return None
        elif now - last > _PATIENCE:
            raise PreprocessError(
                f"{output} has no plan, and for {_PATIENCE / 60:.0f} minutes nobody has been making one: start worker "
                f"1/{count}, or see why it ended"
            )
        if now - told > _TELL:
            journal.say(f"waiting for the plan in {output / WORK}: worker 1/{count} makes it")
            told = now
        time.sleep(_POLL)
    settled = time.monotonic() + _SETTLING
    while holder_of(output / WORK / "lock") and time.monotonic() < settled:
        time.sleep(_POLL)
    return plan
