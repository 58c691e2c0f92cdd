"""The plan of a build: which records there will be, in which shard, and what each depends on.

Every file is read and hashed, so a change is noticed by content and never by name or time. Nothing is
decoded beyond headers.

Shards are the leaves of a binary tree over the hash of the key: a leaf with more than `shard_size` images is
split by the next bit. So the plan is a function of the set of images alone, and one image more or less
touches one shard (or splits it in two), where numbering them through would shift all the shards behind it.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from fluxdit_jax.dataset.fields import CAPTION, FILE, IMAGE, LATENT, field_named, ordered
from fluxdit_jax.dataset.grid import Grid
from fluxdit_jax.dataset.manifest import SPLITS, EncoderIdentity, json_checksum
from fluxdit_jax.dataset.records import WRITER_OPTIONS
from preprocess import PreprocessError
from preprocess.buckets import Size, nearest
from preprocess.build.items import Item, Items, leaves
from preprocess.build.options import Options
from preprocess.decoding.images import Rejected, read_header
from preprocess.input import captions
from preprocess.input.findings import Reject, Scan
from preprocess.input.found import InputImage
from preprocess.input.precomputed import Folder

MAX_FILE_BYTES = 512_000_000
PIXELS_VERSION = 1  # raised when `images.decode` gives other pixels for all files; for some, `Header.version`
Identities = dict[str, EncoderIdentity]  # by `Field.encoder`
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Fingerprints:
    """What the tensors of a record depend on, beside the image, the captions and the files; short hashes.

    `prints` has one for each field, by name, in the order of the table.
    """

    prints: dict[str, str]

    @classmethod
    def of(cls, options: Options, identities: Identities) -> Fingerprints:
        pixels = [PIXELS_VERSION, options.fit]
        fields = [LATENT, *map(field_named, ordered(identities.keys() - {LATENT.encoder}))]
        return cls(
            {
                field.name: digest(
                    field.name, *([pixels] if field.made_from == IMAGE else []), _weights(identities[field.encoder])
                )
                for field in fields
            }
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the fields."""
        return tuple(self.prints)

    def ids(self, item: Item) -> tuple[str, ...]:
        """Names of the tensors of an item, by what they are made from, one for each field."""
        return self.ids_of(item.content, item.bucket, item.seen, item.captions, item.files, item.header.version)

    def ids_of(
        self,
        content: str,
        bucket: Size,
        seen: Size,
        captions: tuple[str, ...],
        files: tuple[tuple[str, str], ...] = (),
        version: int = 1,
    ) -> tuple[str, ...]:
        """The same of a record; `version` is its header's, so that only files of a new reading get new names."""
        file_of = dict(files)

        def sources(name: str) -> list[Any]:
            if name in file_of:
                return [file_of[name]]
            if field_named(name).made_from == IMAGE:
                return [content, bucket if name == LATENT.name else seen, *([version] if version != 1 else [])]
            return {CAPTION: list(captions), FILE: [""]}[field_named(name).made_from]

        return tuple(digest(own, *sources(name)) for name, own in self.prints.items())


def _weights(identity: EncoderIdentity) -> list[Any]:
    """What decides an encoder's output; not its name, which changes when a directory is moved."""
    return [identity.sha256, identity.dtype, identity.width, identity.options]


def digest(*parts: object) -> str:
    """32 hex digits that name whatever the parts are; they must be JSON."""
    return json_checksum(parts)[:32]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A unit of work: one shard.

    Attributes:
      split: "train" or "holdout".
      items: in the order of the records, by key; read anew each time, before `loaded`.
    """

    split: str
    items: Sequence[Item]

    def loaded(self) -> Unit:
        """The unit with its items in memory."""
        return Unit(self.split, tuple(self.items))

    def uid(self, prints: Fingerprints) -> str:
        """A hash over everything that decides the shard's bytes."""
        rows = [[item.key, item.content, *prints.ids(item)] for item in self.items]
        return digest(WRITER_OPTIONS, self.split, rows)


class NothingToBuild(PreprocessError):
    """No input can become a record to train on; `rejects` says of each why."""

    def __init__(self, message: str, rejects: list[Reject]) -> None:
        super().__init__(message)
        self.rejects = rejects


@dataclasses.dataclass
class Plan:
    """All items by key, their division into units, and the inputs that were refused so far.

    Attributes:
      duplicates: groups of keys whose image files are equal, byte by byte.
      passed_over: captions that were not taken because another one was, counted by reason.
      bytes_read: of images.
      grid: of a gate set, by key; empty of other inputs.
    """

    options: Options
    items: Items
    units: list[Unit]
    rejects: list[Reject]
    duplicates: list[tuple[str, ...]]
    passed_over: collections.Counter[str]
    bytes_read: int
    grid: Grid = dataclasses.field(default_factory=dict)

    def at(self, options: Options) -> Plan:
        """The plan of the same images at another resolution, that of the options."""
        items = self.items.at(options)
        units = make_units(items, options.shard_size)
        return dataclasses.replace(self, options=options, items=items, units=units)


def make_plan(
    scan: Scan,
    options: Options,
    folders: Sequence[Folder] = (),
    progress: Callable[[int], None] = lambda n: None,
) -> Plan:
    """Reads and judges every input found.

    Args:
      options: checked ones.
      folders: of precomputed conditions.
      progress: called with the number of inputs done since the last call.

    Raises:
      NothingToBuild: nothing is left to train on.
    """
    count = scan.found.within(options.limit)
    rejects = list(scan.rejects)
    passed_over = scan.passed_over.copy()
    size = 0

    def taken() -> Iterator[Item]:
        nonlocal size
        for result in _in_threads(lambda f: _examine(f, options, folders), scan.found.first(count), options.workers):
            if isinstance(result, Reject):
                rejects.append(result)
            else:
                item, bytes_read, not_taken = result
                passed_over.update(not_taken)
                size += bytes_read
                yield item
            progress(1)

    items = Items(options, taken())
    units = make_units(items, options.shard_size)
    if not any(unit.split == "train" for unit in units):
        raise NothingToBuild(_nothing(scan, count, len(items), rejects, options), rejects)
    return Plan(
        options=options,
        items=items,
        units=units,
        rejects=rejects,
        duplicates=items.duplicates(),
        passed_over=passed_over,
        bytes_read=size,
    )


def _examine(
    found: InputImage, options: Options, folders: Sequence[Folder]
) -> tuple[Item, int, collections.Counter[str]] | Reject:
    try:
        texts, passed_over = captions.choose(found.captions, captions.fields(options.caption_field))
        data = found.image.read(MAX_FILE_BYTES)
        header = read_header(data, options.limits())
        files = tuple((each.field.name, hashlib.sha256(each.read(found.key)[0]).hexdigest()) for each in folders)
        item = Item(
            key=found.key,
            image=found.image,
            captions=texts,
            content=hashlib.sha256(data).hexdigest(),
            header=header,
            bucket=nearest(options.buckets(), header.height, header.width),
            seen=nearest(options.seen_buckets(), header.height, header.width),
            files=files,
        )
    except Rejected as rejected:
        return Reject.of(found.key, found.image.path, rejected)
    return item, len(data), passed_over


def _in_threads(work: Callable[[_Job], _Result], jobs: Iterable[_Job], threads: int) -> Iterator[_Result]:
    """`map` in threads, in order, with a bounded number of jobs and results waiting."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[Future[_Result]] = collections.deque()
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) >= 16 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def make_units(items: Items, shard_size: int) -> list[Unit]:
    """Divides items into units of at most `shard_size`, train first."""
    return [Unit(split, leaf) for split in SPLITS for leaf in leaves(items, split, shard_size)]


def _nothing(scan: Scan, count: int, items: int, rejects: list[Reject], options: Options) -> str:
    if items:
        return (
            f"--holdout {options.holdout} puts all {items} images into the holdout split and leaves none to "
            "train on; use --holdout 0"
        )
    others = ", ".join(f"{name} {count}" for name, count in scan.ignored.most_common(6))
    ignored = f"; not looked at: {others}" if others else ""
    what = f"none of {count} images" if count else f"no image in {scan.root}"
    if not rejects:
        return f"--input {options.input}: {what}{ignored}"
    reasons = collections.Counter(reject.reason for reject in rejects).most_common(6)
    told = "; ".join(f"{reason}: {count}" for reason, count in reasons)
    example = min(rejects, key=lambda reject: (not reject.counted, reject.reason != reasons[0][0]))
    return (
        f"--input {options.input}: {what} can be used ({told}{ignored}). For example {example.file}: "
        f"{example.detail or example.reason}"
    )
