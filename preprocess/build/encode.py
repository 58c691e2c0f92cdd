"""Encoding units: threads decode and resize ahead, this thread drives the encoders, one thread writes.

    feeder thread            pool of threads        caller's thread              writer thread
    old tensors, batches ──► read, decode, ──────► T5, VAE, DINO ─────────────► shard, checksum,
    of the next units        resize, hash          (the device never waits)      statistics, rows

What a batch contains is settled before anything is decoded, from the unit and from what was there before. So a
unit that is made again after a kill goes through the same batches and comes out the same, byte by byte. A unit
that grew by one image encodes that image in a batch of its own: torch may round its last bits otherwise than a
build from nothing, where it has company (the built-in encoders do not).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fluxdit_jax.dataset.fields import CAPTION, IMAGE, LATENT, SEQUENCE, Layout, field_named
from fluxdit_jax.dataset.records import Record
from preprocess.buckets import Size
from preprocess.build.options import Options
from preprocess.build.plan import MAX_FILE_BYTES, Fingerprints, Identities, Item, Unit
from preprocess.build.units import Archive, UnitInfo, index_row, write_unit
from preprocess.decoding.images import Rejected, decode
from preprocess.encoders import Vae
from preprocess.input.findings import Reject
from preprocess.input.precomputed import Folder

_AHEAD = 3  # batches of pixels that may wait for the encoders, at least


@dataclasses.dataclass
class Encoders:
    """What makes the fields of a record.

    Attributes:
      by_field: encoders of images and of captions, by name of the field.
      folders: of precomputed conditions, by name of the field.
    """

    by_field: dict[str, Any]
    folders: dict[str, Folder] = dataclasses.field(default_factory=dict)

    @property
    def vae(self) -> Vae:
        return self.by_field[LATENT.name]

    @property
    def identities(self) -> Identities:
        """Of all of them."""
        return {field_named(name).encoder: maker.identity for name, maker in (self.by_field | self.folders).items()}

    def of_images(self, names: Iterable[str]) -> list[str]:
        """Those of these fields that an encoder makes from the picture."""
        return [name for name in names if name in self.by_field and field_named(name).made_from == IMAGE]

    def prepared(self, name: str, pixels: np.ndarray) -> np.ndarray:
        """The picture as the field's encoder wants it, made in the loading threads if it can be."""
        prepare = getattr(self.by_field[name], "prepare", None)
        return prepare(pixels) if prepare else pixels


@dataclasses.dataclass
class Stopwatch:
    """Wall seconds of the encoding thread, by what it did."""

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


@dataclasses.dataclass
class Counts:
    """What was done: images decoded, tensors made by field, tensors taken over from before, and so on."""

    pictures: int = 0
    made: dict[str, int] = dataclasses.field(default_factory=dict)
    reused: int = 0
    rejected: int = 0
    truncated: int = 0
    profiles_ignored: int = 0


@dataclasses.dataclass
class _Job:
    """A unit being made.

    Attributes:
      tensors: of each item by field, those that there are; what is made from captions is a tuple, of all of them.
    """

    unit: Unit
    uid: str
    ids: list[tuple[str, ...]]
    tensors: list[dict[str, Any]]
    batches: list[list[int]]
    rejects: dict[int, Rejected] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Loaded:
    """A picture, as each encoder wants it; None if no encoder needs it."""

    pixels: dict[str, np.ndarray] | None
    profile_ignored: bool


def _batches(unit: Unit, tensors: list[dict[str, Any]], names: Sequence[str], size: int) -> list[list[int]]:
    """Items that need more than captions, in batches of one bucket and one kind of need; `names` of those fields."""
    groups: dict[tuple[Size, tuple[bool, ...]], list[int]] = collections.defaultdict(list)
    for index, (item, there) in enumerate(zip(unit.items, tensors)):
        needs = tuple(name not in there for name in names)
        if any(needs):
            groups[item.bucket, needs].append(index)
    return [
        members[start : start + size] for _, members in sorted(groups.items()) for start in range(0, len(members), size)
    ]


class Encoding:
    """Makes units.

    Args:
      encoders: loaded.
      options: checked ones.
      prints: what the encoders make of an item depends on.
      archive: tensors that exist already.
      folder: `.build`.
      report: called with a line for the log about anything odd.
    """

    def __init__(
        self,
        encoders: Encoders,
        options: Options,
        prints: Fingerprints,
        archive: Archive,
        folder: Path,
        report: Callable[..., None],
    ) -> None:
        self._encoders, self._options, self._prints = encoders, options, prints
        self._archive, self._folder, self._report = archive, folder, report
        self._of_captions = [name for name in prints.names if field_named(name).made_from == CAPTION]
        self._others = [name for name in prints.names if name not in self._of_captions]
        self._layout: Layout = {
            name: encoders.identities[field_named(name).encoder].width if field_named(name).kind == SEQUENCE else None
            for name in prints.names
            if name != LATENT.name
        }
        self._stop = threading.Event()
        self.watch, self.counts = Stopwatch(), Counts()

    @property
    def encoders(self) -> list[str]:
        """Their names, which are those of their times in `watch`."""
        return [field_named(name).encoder for name in self._encoders.by_field]

    def run(self, units: list[tuple[str, Unit]], progress: Callable[[int], None]) -> Iterator[UnitInfo]:
        """Makes units (uid, unit) in order and yields what is known of each when it is on disk.

        Raises:
          PreprocessError: disk full, device out of memory.
        """
        # Room for every loading thread to work on the next picture while one waits.
        ahead = max(_AHEAD, -(-2 * self._options.workers // self._options.batch_size))
        feed: queue.Queue[Any] = queue.Queue(ahead)
        pool = ThreadPoolExecutor(self._options.workers, "decode")
        writer = ThreadPoolExecutor(1, "write")
        feeder = threading.Thread(target=self._feed, args=(units, pool, feed), name="feed", daemon=True)
        feeder.start()
        writing: Future[UnitInfo] | None = None
        try:
            while (entry := self._next(feed)) is not None:
                kind, job, payload = entry
                if kind == "begin":
                    self._encode_captions(job)
                    progress(len(job.unit.items) - sum(len(batch) for batch in job.batches))
                elif kind == "batch":
                    before = len(job.rejects)
                    self._encode_batch(job, *payload)
                    self.counts.rejected += len(job.rejects) - before
                    progress(len(payload[0]))
                else:
                    if writing is not None:
                        with self.watch("waiting for the writer"):
                            done = writing.result()
                        yield done
                    writing = writer.submit(self._write, job)
            if writing is not None:
                with self.watch("waiting for the writer"):
                    done = writing.result()
                writing = None
                yield done
        finally:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while feeder.is_alive():  # it may be waiting for room
                with contextlib.suppress(queue.Empty):
                    feed.get(timeout=0.05)
            writer.shutdown(wait=True)

    # ------------------------------------------------------------------------------------- feeder thread

    def _feed(self, units: list[tuple[str, Unit]], pool: ThreadPoolExecutor, feed: queue.Queue[Any]) -> None:
        try:
            for uid, unit in units:
                ids = [self._prints.ids(item) for item in unit.items]
                tensors = self._archive.fetch(self._prints.names, ids)
                batches = _batches(unit, tensors, self._others, self._options.batch_size)
                job = _Job(unit, uid, ids, tensors, batches)
                if not self._put(feed, ("begin", job, None)):
                    return
                for batch in job.batches:
                    if self._stop.is_set():
                        return
                    loads = [pool.submit(self._load, unit.items[i], self._needs(job, i)) for i in batch]
                    if not self._put(feed, ("batch", job, (batch, loads))):
                        return
                if not self._put(feed, ("end", job, None)):
                    return
            self._put(feed, None)
        except BaseException as error:  # noqa: BLE001  it is raised again in the caller's thread
            self._put(feed, error)

    def _put(self, feed: queue.Queue[Any], entry: Any) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                feed.put(entry, timeout=0.1)
                return True
        return False

    def _next(self, feed: queue.Queue[Any]) -> Any:
        with self.watch("waiting for old tensors"):
            entry = feed.get()
        if isinstance(entry, BaseException):
            raise entry
        return entry

    def _needs(self, job: _Job, index: int) -> list[str]:
        """Fields of an item that are to be made, besides those of captions."""
        return [name for name in self._others if name not in job.tensors[index]]

    def _made(self, name: str, count: int) -> None:
        self.counts.made[name] = self.counts.made.get(name, 0) + count

    # ------------------------------------------------------------------------------------ loading threads

    def _load(self, item: Item, needs: list[str]) -> _Loaded | Rejected:
        try:
            data = item.image.read(MAX_FILE_BYTES)
            if hashlib.sha256(data).hexdigest() != item.content:
                raise Rejected("changed during the build", "give the same command again", transient=True)
            names = self._encoders.of_images(needs)
            if not names:
                return _Loaded(None, False)
            picture = decode(data, item.header, item.bucket, self._options.fit, item.content)
            pixels = {name: self._encoders.prepared(name, picture.pixels) for name in names}
            return _Loaded(pixels, picture.profile_ignored)
        except Rejected as rejected:
            return rejected
        except MemoryError:
            return Rejected("out of memory", "while it was decoded", transient=True)

    # ----------------------------------------------------------------------------------- caller's thread

    def _encode_captions(self, job: _Job) -> None:
        for there in job.tensors:
            self.counts.reused += sum(len(there[name]) if name in self._of_captions else 1 for name in there)
        for name in self._of_captions:
            missing = [i for i, there in enumerate(job.tensors) if name not in there]
            if not missing:
                continue
            encoder, field = self._encoders.by_field[name], field_named(name)
            before = encoder.truncated
            captions = [caption for i in missing for caption in job.unit.items[i].captions]
            with self.watch(field.encoder):
                encoded = iter(encoder.encode(captions))
            self.counts.truncated += encoder.truncated - before
            self._made(name, len(captions))
            for index in missing:
                made = tuple(itertools.islice(encoded, len(job.unit.items[index].captions)))
                self._take(job, index, name, made)

    def _encode_batch(self, job: _Job, batch: list[int], loads: list[Future[_Loaded | Rejected]]) -> None:
        with self.watch("waiting for pictures"):
            loaded = [load.result() for load in loads]
        good: list[tuple[int, _Loaded]] = []
        for index, result in zip(batch, loaded):
            if isinstance(result, Rejected):
                job.rejects[index] = result
            else:
                good.append((index, result))
                self.counts.pictures += result.pixels is not None
                if result.profile_ignored:
                    self.counts.profiles_ignored += 1
                    self._report("profile_ignored", key=job.unit.items[index].key)
        if not good:
            return
        indices = [index for index, _ in good]
        needs = self._needs(job, indices[0])
        for name in self._encoders.of_images(needs):
            with self.watch(field_named(name).encoder):
                pixels = [result.pixels[name] for _, result in good if result.pixels is not None]
                made = self._encoders.by_field[name].encode(np.stack(pixels))
            self._made(name, len(good))
            for index, tensor in zip(indices, made, strict=True):
                self._take(job, index, name, tensor)
        for name in needs:
            if folder := self._encoders.folders.get(name):
                for index in indices:
                    self._take_file(job, index, folder)

    def _take_file(self, job: _Job, index: int, folder: Folder) -> None:
        item, name = job.unit.items[index], folder.field.name
        try:
            data, array = folder.read(item.key)
            if hashlib.sha256(data).hexdigest() != dict(item.files)[name]:
                raise Rejected("changed during the build", f"its {name} file", transient=True)
            job.tensors[index][name] = array
        except Rejected as rejected:
            job.rejects[index] = rejected

    @staticmethod
    def _take(job: _Job, index: int, name: str, made: np.ndarray | tuple[np.ndarray, ...]) -> None:
        parts = made if isinstance(made, tuple) else (made,)
        if all(np.isfinite(part).all() for part in parts):
            job.tensors[index][name] = made
        elif index not in job.rejects:
            count, size = sum(int((~np.isfinite(p)).sum()) for p in parts), sum(p.size for p in parts)
            job.rejects[index] = Rejected(f"the {field_named(name).maker} returned NaN", f"{count} of {size} values")

    # ------------------------------------------------------------------------------------- writer thread

    def _write(self, job: _Job) -> UnitInfo:
        kept = [i for i in range(len(job.unit.items)) if i not in job.rejects]
        members = [self._record(job.unit.items[i], job.tensors[i]) for i in kept]
        rows = [
            index_row(member, dict(zip(self._prints.names, job.ids[i], strict=True)), _source(job.unit.items[i]))
            for i, member in zip(kept, members, strict=True)
        ]
        rejects = tuple(
            Reject.of(job.unit.items[i].key, job.unit.items[i].image.path, why)
            for i, why in sorted(job.rejects.items())
        )
        info = write_unit(
            folder=self._folder,
            uid=job.uid,
            split=job.unit.split,
            members=members,
            rows=rows,
            layout=self._layout,
            rejects=rejects,
        )
        for reject in rejects:
            self._report("reject", key=reject.key, reason=reject.reason, detail=reject.detail)
        return info

    def _record(self, item: Item, tensors: dict[str, Any]) -> Record:
        of_captions = {name: tensors[name] for name in self._of_captions}
        conditions = {name: of_captions[name][0] if name in of_captions else tensors[name] for name in self._layout}
        several = len(item.captions) > 1
        return Record(
            key=item.key,
            caption=item.caption,
            latent=tensors[LATENT.name],
            conditions=conditions,
            original_size=(item.header.height, item.header.width),
            encoded_size=item.bucket,
            content_hash=item.content,
            other_captions=item.captions[1:],
            other_conditions={name: made[1:] for name, made in of_captions.items()} if several else {},
        )


def _source(item: Item) -> str:
    """The name of the file that an image came from."""
    return item.key if item.image.size < 0 else item.image.path.rpartition("/")[2]
