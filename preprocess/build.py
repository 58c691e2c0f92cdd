"""`python -m preprocess build`: a folder of images and captions to a dataset. Read it top to bottom."""

from __future__ import annotations

import collections
import dataclasses
import time
from pathlib import Path

import pyarrow as pa

from fluxdit_jax import records
from fluxdit_jax.records import DatasetError, Manifest
from preprocess import PreprocessError, buckets
from preprocess.encode import Counts, Encoders, Encoding
from preprocess.encoders import load_text_encoder, load_vae, load_vision_encoder
from preprocess.forecast import tell
from preprocess.journal import Journal
from preprocess.lock import locked
from preprocess.options import Options
from preprocess.plan import Fingerprints, Plan, Unit, make_plan
from preprocess.publish import LOG_FILE, Identities, publish, roll_forward
from preprocess.scan import Scan, scan
from preprocess.units import SHARD_SUFFIX, WORK, Archive, Rows, UnitInfo, disk_errors, load_work
from preprocess.vectors import Vectors

MANY_REJECTS = 3  # exit status


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
    plan, _ = _plan(options, output, journal)
    tell(plan, journal.say)
    return plan


def _plan(options: Options, output: Path, journal: Journal) -> tuple[Plan, Vectors | None]:
    listing = scan(options.input, options.caption_field, exclude=output)
    vectors = None
    if options.vision_embeddings:
        vectors = Vectors(options.vision_embeddings, (f.key for f in listing.found), options.vision_encoder)
    with journal.bar(len(listing.found[: options.limit or None]), "plan") as bar:
        plan = make_plan(listing, options, vectors, bar.update)
    _tell_plan(journal, plan, listing)
    return plan, vectors


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

    # ---- 2. What there is.
    start = time.perf_counter()
    plan, vectors = _plan(options, output, journal)
    seconds["plan"] = time.perf_counter() - start

    # ---- 3. The encoders.
    start = time.perf_counter()
    encoders = Encoders(
        vae=load_vae(options.vae, options.device, options.dtype, options.latent, options.seed),
        text=load_text_encoder(options.text_encoder, options.device, options.dtype, options.max_tokens),
        vision=None
        if vectors
        else load_vision_encoder(options.vision_encoder, options.device, options.dtype),
        vectors=vectors,
    )
    identities = Identities(encoders.vae.identity, encoders.text.identity, encoders.vision_identity)
    if options.modulus % encoders.vae.factor:
        raise PreprocessError(
            f"--modulus {options.modulus} is not a multiple of the VAE's factor {encoders.vae.factor}"
        )
    prints = Fingerprints.of(options, identities.vae, identities.text, identities.vision)
    seconds["load encoders"] = time.perf_counter() - start
    _tell_encoders(journal, identities)

    # ---- 4. What of it is done already: whole units, and tensors of other units.
    wanted = [(unit.uid(prints), unit) for unit in plan.units]
    uids = {uid for uid, _ in wanted}
    done = _finished(output, work, uids, distrusted, journal)
    _tell_gone(journal, done.keys, plan)
    todo = [(uid, unit) for uid, unit in wanted if uid not in done.units]
    archive = done.archive(prints, [unit for _, unit in todo])

    # ---- 5. Encode the rest.
    start = time.perf_counter()
    encoding = Encoding(encoders, options, prints, archive, work, journal.event)
    rejected = len(plan.rejects)
    with journal.bar(sum(len(unit.items) for _, unit in todo), "encode") as bar:
        for info in encoding.run(todo, bar.update):
            rejected += len(info.rejects)
            bar.set_postfix(_shares(encoding, rejected), refresh=False)
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
    status = _tell_result(journal, output, plan, manifest, finished, encoding.counts, seconds, changed)
    return Result(manifest, status, encoding.counts, seconds, changed)


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


def _shares(encoding: Encoding, rejected: int) -> dict[str, str]:
    seconds = encoding.watch.seconds
    total = sum(seconds.values()) or 1.0
    shares = {what: f"{seconds[what] / total:.0%}" for what in ("text", "vae", "vision")}
    return shares | {"rejects": str(rejected)}


def _tell_plan(journal: Journal, plan: Plan, listing: Scan) -> None:
    options = plan.options
    journal.say(
        f"{len(plan.items):,} images to encode in {len(plan.units)} shards, {len(plan.rejects):,} rejected so far, "
        f"{len(options.buckets())} buckets of modulus {options.modulus} at {options.resolution} px"
    )
    if listing.ignored:
        others = ", ".join(f"{name} {count}" for name, count in listing.ignored.most_common(6))
        journal.say(f"  other files, not looked at: {others}")
    if plan.duplicates:
        group = plan.duplicates[0]
        journal.say(
            f"  {sum(len(g) - 1 for g in plan.duplicates):,} images are copies of another, byte by byte "
            f"(for example {group[0]} = {group[1]}); each is a record of its own"
        )
    if plan.wrong_extension:
        journal.say(
            f"  {plan.wrong_extension:,} images have another format than their extension says; read by content"
        )
    enlarged = [i for i in plan.items if buckets.enlargement(_size(i), i.bucket) > options.max_upscale]
    if enlarged:
        worst = max(enlarged, key=lambda i: buckets.enlargement(_size(i), i.bucket))
        journal.say(
            f"  warning: {len(enlarged):,} images are enlarged more than {options.max_upscale:g} times (worst "
            f"{worst.key}, {buckets.enlargement(_size(worst), worst.bucket):.1f} times): they will look soft"
        )
    journal.event(
        "plan",
        items=len(plan.items),
        units=len(plan.units),
        rejects=len(plan.rejects),
        duplicates=plan.duplicates,
        enlarged=len(enlarged),
        wrong_extension=plan.wrong_extension,
    )
    for reject in plan.rejects:
        journal.event("reject", key=reject.key, reason=reject.reason, detail=reject.detail)


def _tell_gone(journal: Journal, before: set[str], plan: Plan) -> None:
    """Says which records of the finished dataset will not be in the new one."""
    gone = sorted(before - {item.key for item in plan.items})
    if gone:
        journal.say(
            f"  {len(gone):,} of {len(before):,} records of the dataset are no longer in the input and are left out "
            f"(for example {gone[0]})"
        )
        journal.event("gone", keys=gone)


def _size(item) -> buckets.Size:  # noqa: ANN001
    return item.header.height, item.header.width


def _tell_encoders(journal: Journal, identities: Identities) -> None:
    for name, identity in dataclasses.asdict(identities).items():
        journal.say(
            f"  {name:6} {identity['id']} ({identity['dtype']}, width {identity['width']}, "
            f"sha256 {identity['sha256'][:12] or 'none'})"
        )


def _tell_result(
    journal: Journal,
    output: Path,
    plan: Plan,
    manifest: Manifest,
    finished: list[tuple[Unit, UnitInfo, pa.Table]],
    counts: Counts,
    seconds: dict[str, float],
    changed: bool,
) -> int:
    splits = ", ".join(f"{split} {manifest.records(split):,}" for split in manifest.shards)
    total = sum(manifest.records(split) for split in manifest.shards)
    reasons = collections.Counter(reject.reason for reject in plan.rejects)
    reasons.update(reject.reason for _, info, _ in finished for reject in info.rejects)
    journal.say(f"\n{'Done' if changed else 'Up to date'}: {total:,} records ({splits}) in {output}")
    journal.say(
        f"  encoded {counts.latents:,} latents, {counts.texts:,} captions, {counts.visions:,} vision vectors; "
        f"{counts.reused:,} tensors taken over from before"
    )
    if counts.truncated:
        journal.say(
            f"  {counts.truncated:,} captions were longer than {plan.options.max_tokens} tokens and were cut"
        )
    if counts.profiles_ignored:
        journal.say(f"  {counts.profiles_ignored:,} unusable colour profiles were ignored")
    if reasons:
        journal.say(f"  {manifest.rejects:,} rejected, each with its reason in {output / records.REJECTS}:")
        for reason, count in reasons.most_common():
            journal.say(f"    {count:7,}  {reason}")
    busy = sum(seconds.get(f"encode: {what}", 0.0) for what in ("text", "vae", "vision"))
    parts = ", ".join(f"{what.removeprefix('encode: ')} {value:.1f} s" for what, value in seconds.items())
    journal.say(f"  time: {parts}")
    if counts.pictures:
        journal.say(
            f"  encoders busy for {busy / max(seconds['encode'], 1e-9):.0%} of the encoding, "
            f"{counts.pictures / max(seconds['encode'], 1e-9):.2f} images/s"
        )
    journal.event(
        "end",
        records=total,
        rejects=dict(reasons),
        counts=dataclasses.asdict(counts),
        seconds={what: round(value, 3) for what, value in seconds.items()},
        changed=changed,
    )
    journal.say(f"Look at it:  python -m preprocess inspect {output}")
    journal.say(
        f"Train on it: python -m fluxdit_jax.train --config=configs/nano.py --config.data.path={output}"
    )
    share = manifest.rejects / max(1, manifest.rejects + total)
    if share > plan.options.max_rejects:
        journal.say(
            f"error: {share:.1%} of the inputs were rejected, more than --max-rejects {plan.options.max_rejects:g}; "
            "the dataset is complete without them"
        )
        return MANY_REJECTS
    return 0
