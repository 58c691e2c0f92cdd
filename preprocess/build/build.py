"""`python -m preprocess build`: a folder of images and captions to a dataset. Read it top to bottom."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Set
from pathlib import Path

from tqdm import tqdm

from fluxdit_jax.dataset.fields import PATCHES
from fluxdit_jax.dataset.grid import INPUT_GRID, read_grid
from fluxdit_jax.dataset.manifest import MANIFEST, REJECTS, DatasetError, EncoderIdentity, Manifest, load_manifest
from preprocess import PreprocessError
from preprocess.build import comparison, repeat
from preprocess.build.archive import Archive
from preprocess.build.encode import Counts, Encoders, Encoding
from preprocess.build.jobs import Task
from preprocess.build.journal import Journal
from preprocess.build.loading import are_here, device_name, load_encoders, torch_device
from preprocess.build.options import Options, option_of
from preprocess.build.parts import Part, all_locked, load_parts, require_place, tasks
from preprocess.build.plan import Fingerprints, Identities, NothingToBuild, Plan, make_plan
from preprocess.build.publish import (
    LOG_FILE,
    OPTIONS_FILE,
    finish,
    load_options,
    publish,
    roll_forward,
    save_options,
    save_rejects,
)
from preprocess.build.stored_plan import StoredPlan, versions_here
from preprocess.build.summary import (
    MANY_REJECTS,
    Published,
    report_encoders,
    report_plan,
    report_result,
    too_many_rejects,
)
from preprocess.build.units import WORK, disk_errors, load_unit
from preprocess.build.workers import devices_noted, note_device
from preprocess.encoders import check_arguments
from preprocess.input.findings import Reject, Scan, counted
from preprocess.input.precomputed import Folder, folders
from preprocess.input.scan import scan

_LOG_SECONDS = 30


@dataclasses.dataclass
class Result:
    """What a build did.

    Attributes:
      manifests: of its datasets, ascending by resolution.
      status: exit status: 0, or 3 with more rejects than `--max-rejects`.
      counts: what was encoded and what was taken over.
      seconds: wall time by part.
      changed: False if all was up to date.
    """

    manifests: tuple[Manifest, ...]
    status: int
    counts: Counts
    seconds: dict[str, float]
    changed: bool

    @property
    def manifest(self) -> Manifest:
        """Of the dataset, of several the largest."""
        return self.manifests[-1]


def build(
    options: Options,
    damaged: frozenset[tuple[str, int]] | None = None,
    replace: bool = False,
    engine: Engine | None = None,
) -> Result:
    """Builds, continues or updates a dataset, or those of several resolutions.

    Args:
      options: what to do.
      damaged: of a repair (`verify --repair`), (shard file, row) of records that must be encoded again.
      replace: records that exist may be dropped or encoded again, however many, and by other options.
      engine: makes the shards in other processes; None: this one does.

    Raises:
      PreprocessError: the input, an option, an encoder or the disk does not allow it, or a finished dataset would
        lose more than a few records.
    """
    options = options.checked()
    require_place(options)
    with all_locked(options):
        return _build(options, Journal(Path(options.output) / LOG_FILE), damaged, replace, engine)


Forecast = Callable[[list[Part], Encoders | None, Callable[[str], None]], None]


def plan_only(options: Options, forecast: Forecast, replace: bool = False) -> list[Part]:
    """Prints what `build` would do and writes nothing.

    Args:
      forecast: prints what the parts would make; its last argument prints a line.
      replace: as of `build`.

    Raises:
      PreprocessError: the input or an option does not allow it.
    """
    options = options.checked()
    require_place(options)
    output = Path(options.output)
    journal = Journal(None)
    listing, precomputed = _list(options, output)
    plan = _plan(options, listing, precomputed, journal, keep=False)
    beyond = _beyond(listing, options)
    interrupted = repeat.unfinished(output)
    encoders = load_encoders(options, precomputed) if are_here(options) else None
    if encoders is None:
        earlier = [interrupted, *(repeat.published(Path(part.output)) for part in options.parts())]
        identities = _likely_identities(options, precomputed, earlier)
    else:
        identities = encoders.identities
    prints = Fingerprints.of(options, identities)
    parts = load_parts(plan, options, prints, journal, beyond)
    for part in parts:
        comparison.tell(journal, part.found, part.plan)
    report_plan(journal, parts[-1].plan, listing, beyond, of_several=len(parts) > 1)
    forecast(parts, encoders, journal.say)
    rejects = sum(reject.counted for reject in plan.rejects)
    if too_many := too_many_rejects(rejects, len(plan.items), options.max_rejects):
        journal.say(f"\nwarning: the build will end with status {MANY_REJECTS}: {too_many}")
    if not repeat.permitted(options, replace, interrupted):
        try:
            _require_kept(parts)
        except PreprocessError as error:
            journal.say(f"\nwarning: without --replace the build will be refused: {error}")
    return parts


def _require_kept(parts: list[Part], repairing: bool = False) -> None:
    """Raises `PreprocessError` where a finished dataset has other options or would lose more than a few records."""
    for part in parts:
        if part.done.unreadable:  # also where it was to be repaired, and could not be
            raise PreprocessError(f"{part.done.unreadable}. {_ways_on(part.options.output)}; nothing was changed")
        if part.before is not None:
            differences = repeat.require_same(part.options, part.before, part.options.output)
            comparison.require_kept(part.found, part.options.output, differences, repairing)


def _ways_on(directory: str) -> str:
    """What to do about a dataset without a usable index."""
    anew = "everything is encoded again with `build --replace`, and pictures that are gone from the input go"
    try:
        load_manifest(directory)
        load_options(Path(directory))
    except (DatasetError, PreprocessError) as error:
        return f"It cannot be written anew from the shards either ({error}): bring back these files, or {anew}"
    return f"`python -m preprocess verify --repair {directory}` writes it anew from the shards. Or {anew}"


def _likely_identities(options: Options, folders: list[Folder], earlier: list[repeat.Earlier | None]) -> Identities:
    """Of encoders that would have to be downloaded: those that were used under the same names, if they were."""
    check_arguments(options.dtype, options.latent)
    device = torch_device(options)
    from preprocess.encoders.device import choose_dtype, dtype_name

    dtype = dtype_name(choose_dtype(options.dtype, device))
    found = {}
    for part, spec in options.specs().items():
        found[part] = EncoderIdentity(spec, "", "not known", dtype, 0)
        for before in earlier:
            known = before.identities or {} if before else {}
            if before and part in known and before.values.get(option_of(part)) == spec:
                identity = known[part]
                if part == PATCHES.encoder:
                    identity = dataclasses.replace(
                        identity, options=identity.options | {"cells": options.vision_patches}
                    )
                found[part] = dataclasses.replace(
                    identity, dtype=identity.dtype if spec.startswith("builtin:") else dtype
                )
                break
    return found | {folder.field.encoder: folder.identity for folder in folders}


def _beyond(listing: Scan, options: Options) -> Set[str]:
    """Keys of the input that `--limit` leaves out."""
    return listing.found.beyond(listing.found.within(options.limit))


def _list(options: Options, output: Path) -> tuple[Scan, list[Folder]]:
    listing = scan(options.input, options.caption_field, output, options.allow_outside)
    return listing, folders(
        options.condition, options.vision_embeddings, listing.found.all_keys, options.vision_encoder
    )


def _plan(options: Options, listing: Scan, precomputed: list[Folder], journal: Journal, keep: bool = True) -> Plan:
    try:
        grid = read_grid(listing.root / INPUT_GRID)
    except DatasetError as error:
        raise PreprocessError(str(error)) from error
    with journal.bar(listing.found.within(options.limit), "plan") as bar:
        try:
            plan = make_plan(listing, options, precomputed, bar.update)
        except NothingToBuild as error:
            kept = _keep(Path(options.output), error.rejects) if keep else ""
            raise PreprocessError(f"{error}{kept}") from error
    return dataclasses.replace(plan, grid=grid)


def _keep(output: Path, rejects: list[Reject]) -> str:
    """Writes the rejects of a build that makes no dataset, and says where; an existing dataset keeps its own."""
    path = output / REJECTS
    if not rejects or (output / MANIFEST).exists():
        return ""
    with disk_errors(path):
        save_rejects(path, rejects)
    return f". Each with its reason: {path}"


@dataclasses.dataclass
class Prepared:
    """A build before its first shard.

    Attributes:
      rejects: inputs that count as refused.
      todo: what is to be encoded. archive: tensors of it that exist.
      seconds: wall time by part.
    """

    options: Options
    encoders: Encoders
    identities: Identities
    prints: Fingerprints
    parts: list[Part]
    rejects: int
    todo: list[Task]
    archive: Archive
    seconds: dict[str, float]


def prepare(
    options: Options, journal: Journal, damaged: frozenset[tuple[str, int]] | None = None, replace: bool = False
) -> Prepared:
    """Plans a build whose outputs are locked, and says what will be done; arguments as of `build`."""
    seconds: dict[str, float] = {}
    output, datasets = Path(options.output), options.parts()
    journal.event("begin", options=options.to_dict())

    # ---- 1. Finish what a killed run had begun to publish; throw away what it had half written.
    for own in datasets:
        if roll_forward(Path(own.output)):
            journal.say(f"Completed the publication of {own.output} that an earlier run had begun.")
        work = Path(own.output) / WORK
        work.mkdir(exist_ok=True)
        for leftover in work.glob("*.tmp"):
            leftover.unlink()

    # ---- 2. What there is, by name; and the encoders, so that a missing one is known before hours of reading.
    interrupted = repeat.unfinished(output)
    replace = repeat.permitted(options, replace, interrupted)
    for own in datasets:
        if not replace and (before := repeat.published(Path(own.output))):
            repeat.require_same(own, before, own.output)
    start = time.perf_counter()
    listing, precomputed = _list(options, output)
    seconds["list"] = time.perf_counter() - start
    start = time.perf_counter()
    encoders = load_encoders(options, precomputed)
    identities = encoders.identities
    prints = Fingerprints.of(options, identities)
    if not replace and (stored := StoredPlan.load(output)):
        stored.require_like(identities, versions_here(options))
    seconds["load encoders"] = time.perf_counter() - start

    # ---- 3. The plan: every file is read once.
    start = time.perf_counter()
    plan = _plan(options, listing, precomputed, journal)
    beyond = _beyond(listing, options)
    seconds["plan"] = time.perf_counter() - start

    # ---- 4. What of it is done already, whole units and tensors of other units; and what would be lost.
    parts = load_parts(plan, options, prints, journal, beyond, damaged or frozenset())
    for part in parts:
        comparison.tell(journal, part.found, part.plan)
    report_plan(journal, parts[-1].plan, listing, beyond, of_several=len(parts) > 1)
    report_encoders(journal, identities)
    if not replace:
        _require_kept(parts, repairing=damaged is not None)
    repeat.begin(output, options, identities, replace)
    todo = tasks(parts)
    archive = Archive(parts[0].done.report)
    for part in parts if todo else ():  # at whatever resolution a tensor was made
        part.done.add_to(archive)
    return Prepared(options, encoders, identities, prints, parts, counted(plan.rejects), todo, archive, seconds)


Engine = Callable[[Prepared, Journal], Counts]


def _encode(prepared: Prepared, journal: Journal) -> Counts:
    """Makes the shards in this process, with its times among those of the build."""
    encoding = Encoding(prepared.encoders, prepared.options, prepared.prints, prepared.archive, journal.event)
    with journal.bar(sum(len(task.items) for task in prepared.todo), "encode") as bar:
        for _, info in encoding.run(prepared.todo, Progress(bar, encoding, journal, prepared.rejects)):
            journal.event("unit", uid=info.uid, split=info.split, records=info.records, bytes=info.bytes)
    prepared.seconds |= {f"encode: {what}": value for what, value in encoding.watch.seconds.items()}
    return encoding.counts


def _build(
    options: Options,
    journal: Journal,
    damaged: frozenset[tuple[str, int]] | None,
    replace: bool,
    engine: Engine | None,
) -> Result:
    began = time.perf_counter()
    prepared = prepare(options, journal, damaged, replace)
    parts, seconds, output = prepared.parts, prepared.seconds, Path(options.output)

    # ---- 5. Encode the rest.
    start = time.perf_counter()
    counts = (engine or _encode)(prepared, journal) if prepared.todo else Counts()
    for target in (target for task in prepared.todo for target in task.targets):
        made = load_unit(target.folder, target.uid)
        if made is None:
            raise PreprocessError(f"{target.folder}: unit {target.uid} is lost or damaged: give the same command again")
        parts[target.number].done.add(made)
    seconds["encode"] = time.perf_counter() - start

    # ---- 6. Publish.
    start = time.perf_counter()
    if prepared.todo and engine is None and devices_noted(output / WORK):
        note_device(output / WORK, device_name(options))
    StoredPlan.discard(output)
    if len(devices := devices_noted(output / WORK)) > 1:
        journal.say(f"note: made on different devices, which round differently: {'; '.join(devices)}")
    published, anew = [], damaged is not None
    for part in parts:
        finished = [part.done.units[uid] for uid, _ in part.wanted]
        published.append(
            Published(part, finished, *publish(part.output, part.plan, finished, prepared.identities, anew))
        )
    if options.resolutions:
        save_options(output / OPTIONS_FILE, options)
        finish(output)
    seconds["publish"] = time.perf_counter() - start

    seconds["all"] = time.perf_counter() - began
    status = report_result(journal, options, published, counts, seconds)
    manifests, changed = tuple(each.manifest for each in published), any(each.changed for each in published)
    return Result(manifests, status, counts, seconds, changed)


class Progress:
    """Moves the bar, with each encoder's share of the time and the rejects; logs the same once in a while."""

    def __init__(self, bar: tqdm, encoding: Encoding, journal: Journal, rejects: int) -> None:
        self._bar, self._encoding, self._journal, self._rejects = bar, encoding, journal, rejects
        self._logged = time.monotonic()

    def __call__(self, images: int) -> None:
        seconds = self._encoding.watch.seconds
        total = sum(seconds.values()) or 1.0
        shares = {what: f"{seconds.get(what, 0.0) / total:.0%}" for what in sorted(self._encoding.encoders)}
        rejects = self._rejects + self._encoding.counts.rejected
        self._bar.set_postfix(shares | {"rejects": rejects}, refresh=False)
        self._bar.update(images)
        if time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            rate = self._bar.format_dict["rate"]
            self._journal.event(
                "progress",
                done=self._bar.n,
                total=self._bar.total,
                images_per_s=rate,
                rejects=rejects,
                **shares,
            )
