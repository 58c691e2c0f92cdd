"""`python -m preprocess build`: a folder of images and captions to a dataset. Read it top to bottom."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from fluxdit_jax import records
from fluxdit_jax.allocator import keep_freed_memory
from fluxdit_jax.records import DatasetError, Manifest
from preprocess import PreprocessError
from preprocess.encode import Counts, Encoders, Encoding
from preprocess.encoders import load_text_encoder, load_vae, load_vision_encoder
from preprocess.encoders.device import choose_device
from preprocess.findings import Reject, Scan, counted
from preprocess.forecast import tell
from preprocess.journal import Journal
from preprocess.lock import locked
from preprocess.options import Options
from preprocess.plan import Fingerprints, NothingToBuild, Plan, Unit, make_plan
from preprocess.publish import LOG_FILE, Identities, publish, roll_forward, save_rejects
from preprocess.scan import scan
from preprocess.summary import tell_encoders, tell_gone, tell_plan, tell_result
from preprocess.units import SHARD_SUFFIX, WORK, Archive, Rows, UnitInfo, disk_errors, load_work
from preprocess.vectors import Vectors

_LOG_SECONDS = 30


@dataclasses.dataclass
class Result:
    """What a build did.

    Attributes:
      manifest: of the dataset.
      status: exit status: 0, or 3 with more rejects than `--max-rejects`.
      counts: what was encoded and what was taken over.
      seconds: wall time by part.
      changed: False if the dataset was up to date.
    """

    manifest: Manifest
    status: int
    counts: Counts
    seconds: dict[str, float]
    changed: bool


def build(options: Options, distrusted: frozenset[tuple[str, int]] = frozenset()) -> Result:
    """Builds, continues or updates a dataset.

    Args:
      options: what to do.
      distrusted: (shard file, row) of records that are damaged and must be encoded again (`verify --repair`).

    Raises:
      PreprocessError: the input, an option, an encoder or the disk does not allow it.
    """
    options = options.checked()
    output = Path(options.output)
    try:
        with disk_errors(output):
            (output / WORK).mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise PreprocessError(f"--output {output} exists and is not a folder") from error
    with locked(output / WORK / "lock"):
        return _build(options, output, Journal(output / LOG_FILE), distrusted)


def dry_run(options: Options) -> Plan:
    """Plans only: prints what `build` would do, and draws `plan.png` into the output folder.

    Raises:
      PreprocessError: as `build`.
    """
    options = options.checked()
    output = Path(options.output)
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    journal = Journal(None)
    plan = _plan(options, *_list(options, output), journal)
    tell(plan, journal.say)
    return plan


def _list(options: Options, output: Path) -> tuple[Scan, Vectors | None]:
    listing = scan(options.input, options.caption_field, output, options.allow_outside)
    if not options.vision_embeddings:
        return listing, None
    return listing, Vectors(options.vision_embeddings, (f.key for f in listing.found), options.vision_encoder)


def _plan(options: Options, listing: Scan, vectors: Vectors | None, journal: Journal) -> Plan:
    with journal.bar(len(listing.found[: options.limit or None]), "plan") as bar:
        try:
            plan = make_plan(listing, options, vectors, bar.update)
        except NothingToBuild as error:
            raise PreprocessError(f"{error}{_keep(Path(options.output), error.rejects)}") from error
    tell_plan(journal, plan, listing)
    return plan


def _keep(output: Path, rejects: list[Reject]) -> str:
    """Writes the rejects of a build that makes no dataset, and says where; an existing dataset keeps its own."""
    path = output / records.REJECTS
    if not rejects or (output / records.MANIFEST).exists():
        return ""
    with disk_errors(path):
        save_rejects(path, rejects)
    return f". Each with its reason: {path}"


def _build(
    options: Options, output: Path, journal: Journal, distrusted: frozenset[tuple[str, int]]
) -> Result:
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    journal.event("begin", options=options.to_dict())

    # ---- 1. Finish what a killed run had begun to publish; throw away what it had half written.
    if roll_forward(output):
        journal.say("Completed the publication that an earlier run had begun.")
    work = output / WORK
    work.mkdir(exist_ok=True)
    for leftover in work.glob("*.tmp"):
        leftover.unlink()

    # ---- 2. What there is, by name; and the encoders, so that a missing one is known before hours of reading.
    start = time.perf_counter()
    listing, vectors = _list(options, output)
    seconds["list"] = time.perf_counter() - start
    start = time.perf_counter()
    encoders = _load(options, vectors)
    identities = Identities(encoders.vae.identity, encoders.text.identity, encoders.vision_identity)
    prints = Fingerprints.of(options, identities.vae, identities.text, identities.vision)
    seconds["load encoders"] = time.perf_counter() - start

    # ---- 3. The plan: every file is read once.
    start = time.perf_counter()
    plan = _plan(options, listing, vectors, journal)
    del listing
    seconds["plan"] = time.perf_counter() - start
    tell_encoders(journal, identities)

    # ---- 4. What of it is done already: whole units, and tensors of other units.
    wanted = [(unit.uid(prints), unit) for unit in plan.units]
    uids = {uid for uid, _ in wanted}
    done = _finished(output, work, uids, distrusted, journal)
    tell_gone(journal, done.keys, plan)
    todo = [(uid, unit) for uid, unit in wanted if uid not in done.units]
    archive = done.archive(prints, [unit for _, unit in todo])

    # ---- 5. Encode the rest.
    start = time.perf_counter()
    encoding = Encoding(encoders, options, prints, archive, work, journal.event)
    if todo:
        with journal.bar(sum(len(unit.items) for _, unit in todo), "encode") as bar:
            for info in encoding.run(todo, _Progress(bar, encoding, journal, counted(plan.rejects))):
                done.add(Rows.load(work / f"{info.uid}.parquet"))
                journal.event("unit", uid=info.uid, split=info.split, records=info.records, bytes=info.bytes)
    seconds["encode"] = time.perf_counter() - start

    # ---- 6. Publish.
    start = time.perf_counter()
    finished = [(unit, *done.units[uid]) for uid, unit in wanted]
    manifest, changed = publish(output, plan, finished, identities)
    seconds["publish"] = time.perf_counter() - start

    seconds |= {f"encode: {what}": value for what, value in encoding.watch.seconds.items()}
    seconds["all"] = time.perf_counter() - began
    status = tell_result(journal, output, plan, manifest, finished, encoding.counts, seconds, changed)
    return Result(manifest, status, encoding.counts, seconds, changed)


def _load(options: Options, vectors: Vectors | None) -> Encoders:
    # What an encoder on a CPU allocates for each picture would else be faulted in anew: 1.4 to 1.8 times the images/s.
    keep_freed_memory(large_too=choose_device(options.device).type == "cpu")
    vision = None
    if vectors is None:
        vision = load_vision_encoder(options.vision_encoder, options.device, options.dtype)
    encoders = Encoders(
        vae=load_vae(options.vae, options.device, options.dtype, options.latent, options.seed),
        text=load_text_encoder(options.text_encoder, options.device, options.dtype, options.max_tokens),
        vision=vision,
        vectors=vectors,
    )
    if options.modulus % encoders.vae.factor:
        raise PreprocessError(
            f"--modulus {options.modulus} is not a multiple of the VAE's factor {encoders.vae.factor}"
        )
    return encoders


class _Progress:
    """Moves the bar, with each encoder's share of the time and the rejects; logs the same once in a while."""

    def __init__(self, bar: tqdm, encoding: Encoding, journal: Journal, rejects: int) -> None:
        self._bar, self._encoding, self._journal, self._rejects = bar, encoding, journal, rejects
        self._logged = time.monotonic()

    def __call__(self, images: int) -> None:
        seconds = self._encoding.watch.seconds
        total = sum(seconds.values()) or 1.0
        shares = {what: f"{seconds[what] / total:.0%}" for what in ("text", "vae", "vision")}
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


class _Finished:
    """Units that exist, in the dataset or in `.build`, and where else tensors can be found."""

    def __init__(self, output: Path, work: Path, distrusted: frozenset[tuple[str, int]], journal: Journal):
        self._output, self._work, self._distrusted, self._journal = output, work, distrusted, journal
        self.units: dict[str, tuple[UnitInfo, pa.Table]] = {}
        self.keys: set[str] = set()
        self._sources: list[Rows] = []

    def add(self, rows: Rows) -> None:
        self.units[rows.units[0].uid] = (rows.units[0], rows.table)

    def add_source(self, rows: Rows) -> None:
        self._sources.append(rows)

    def archive(self, prints: Fingerprints, units: list[Unit]) -> Archive:
        """Of every tensor that these units need and that exists."""
        wanted: set[str] = set()
        if self._sources:
            wanted = {name for unit in units for item in unit.items for name in prints.ids(item)}
        archive = Archive(wanted, self._report)
        for rows in self._sources:
            archive.add(rows, self._shard, self._distrusted)
        return archive

    def _shard(self, info: UnitInfo) -> Path:
        return self._output / info.file if info.file else self._work / (info.uid + SHARD_SUFFIX)

    def _report(self, message: str) -> None:
        self._journal.say(f"damaged: {message}")
        self._journal.event("damaged", message=message)


def _finished(
    output: Path, work: Path, uids: set[str], distrusted: frozenset[tuple[str, int]], journal: Journal
) -> _Finished:
    finished = _Finished(output, work, distrusted, journal)
    distrusted_files = {file for file, _ in distrusted}
    if (output / records.INDEX).exists():
        try:
            index = Rows.load(output / records.INDEX)
        except DatasetError as error:
            journal.say(f"damaged: {error}; what it described is encoded again")
            index = Rows(pa.table({}), [])
        if index.units:
            finished.add_source(index)
            finished.keys = set(index.table["key"].to_pylist())
        start = 0
        for info in index.units:
            table = index.table.slice(start, info.records).drop_columns(["split", "shard", "row"])
            start += info.records
            usable = info.final and info.file not in distrusted_files
            if info.uid in uids and usable and _complete(output / info.file, info):
                finished.add(Rows(table, [info]))
    for uid, rows in load_work(work).items():
        # Tensors of a unit of this very plan are not used for its other units: whether it was made before
        # or after a kill must make no difference to them.
        if uid not in uids or not rows.units[0].final:
            finished.add_source(rows)
        elif uid not in finished.units:
            finished.add(rows)
    return finished


def _complete(shard: Path, info: UnitInfo) -> bool:
    """Whether a shard is there in its full length; its content is the business of `verify`."""
    try:
        return not info.records or shard.stat().st_size == info.bytes
    except OSError:
        return False
