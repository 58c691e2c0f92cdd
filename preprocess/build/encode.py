"""Encoding: threads decode and resize ahead, this thread drives the encoders, one thread writes.

    feeder thread            pool of threads        caller's thread              writer thread
    old tensors, batches ──► read, decode, ──────► T5, VAE, DINO ─────────────► shard, checksum,
    of the next units        resize, hash          (the device never waits)      statistics, rows

What a batch contains is settled before anything is decoded, from the units of all resolutions and from what was there
before. So a unit that is made again after a kill goes through the same batches and comes out the same, byte by byte. A
unit that grew by one image encodes that image in a batch of its own: torch may round its last bits otherwise than a
build from nothing, where it has company (the built-in encoders do not).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from fluxdit_jax.dataset.cells import factors_of
from fluxdit_jax.dataset.fields import CAPTION, CELLS, IMAGE, LATENT, Layout, field_named
from fluxdit_jax.dataset.records import Record
from preprocess.build.archive import Archive
from preprocess.build.items import Item
from preprocess.build.jobs import Job, Loaded, Target, Task, batches, field_of
from preprocess.build.options import Options
from preprocess.build.plan import MAX_FILE_BYTES, Fingerprints, Identities
from preprocess.build.rows import UnitInfo, index_row
from preprocess.build.units import write_unit
from preprocess.decoding.images import Rejected, decode_at
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
        """Those of these names under which it is held what an encoder makes from the picture."""
        return [n for n in names if field_of(n) in self.by_field and field_named(field_of(n)).made_from == IMAGE]

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

    def __iadd__(self, other: Counts) -> Counts:
        for name, count in other.made.items():
            self.made[name] = self.made.get(name, 0) + count
        for name in ("pictures", "reused", "rejected", "truncated", "profiles_ignored"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


class Encoding:
    """Makes units.

    Args:
      encoders: loaded.
      options: checked ones.
      prints: what the encoders make of an item depends on.
      archive: tensors that exist already.
      report: called with a line for the log about anything odd.
    """

    def __init__(
        self,
        encoders: Encoders,
        options: Options,
        prints: Fingerprints,
        archive: Archive,
        report: Callable[..., None],
    ) -> None:
        self._encoders, self._options, self._prints = encoders, options, prints
        self._archive, self._report = archive, report
        self._of_captions = [name for name in prints.names if field_named(name).made_from == CAPTION]
        self._others = [name for name in prints.names if name not in (LATENT.name, *self._of_captions)]
        self._layout: Layout = {
            name: encoders.identities[field_named(name).encoder].width if field_named(name).in_rows else None
            for name in prints.names
            if name != LATENT.name
        }
        self._stop = threading.Event()
        self.watch, self.counts = Stopwatch(), Counts()

    @property
    def encoders(self) -> list[str]:
        """Their names, which are those of their times in `watch`."""
        return [field_named(name).encoder for name in self._encoders.by_field]

    def run(self, tasks: Iterable[Task], progress: Callable[[int], None]) -> Iterator[tuple[Target, UnitInfo]]:
        """Makes the targets of tasks in order, and yields each, with what is known of it, when it is on disk.

        Raises:
          PreprocessError: disk full, device out of memory.
        """
        # Room for every loading thread to work on the next picture while one waits.
        ahead = max(_AHEAD, -(-2 * self._options.workers // self._options.batch_size))
        feed: queue.Queue[Any] = queue.Queue(ahead)
        pool = ThreadPoolExecutor(self._options.workers, "decode")
        writer = ThreadPoolExecutor(1, "write")
        feeder = threading.Thread(target=self._feed, args=(tasks, pool, feed), name="feed", daemon=True)
        feeder.start()
        writing: Future[list[tuple[Target, UnitInfo]]] | None = None
        try:
            while (entry := self._next(feed)) is not None:
                kind, job, payload = entry
                if kind == "begin":
                    self._encode_captions(job)
                    progress(len(job.task.items) - sum(len(batch) for batch in job.batches))
                elif kind == "batch":
                    before = len(job.rejects)
                    self._encode_batch(job, *payload)
                    self.counts.rejected += len(job.rejects) - before
                    progress(len(payload[0]))
                else:
                    if writing is not None:
                        with self.watch("waiting for the writer"):
                            done = writing.result()
                        yield from done
                    writing = writer.submit(self._write, job)
            if writing is not None:
                with self.watch("waiting for the writer"):
                    done = writing.result()
                writing = None
                yield from done
        finally:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while feeder.is_alive():  # it may be waiting for room
                with contextlib.suppress(queue.Empty):
                    feed.get(timeout=0.05)
            writer.shutdown(wait=True)

    # ------------------------------------------------------------------------------------- feeder thread

    def _feed(self, tasks: Iterable[Task], pool: ThreadPoolExecutor, feed: queue.Queue[Any]) -> None:
        try:
            for planned in tasks:
                task = planned.loaded()
                ids = task.ids(self._prints)
                tensors = self._archive.fetch(ids, field_of)
                size = self._options.batch_size
                job = Job(task, ids, tensors, batches(task, tensors, self._of_pictures(task), size))
                if not self._put(feed, ("begin", job, None)):
                    return
                for batch in job.batches:
                    if self._stop.is_set():
                        return
                    loads = [pool.submit(self._load, task, i, self._needs(job, i)) for i in batch]
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

    def _of_pictures(self, task: Task) -> list[str]:
        """Under which names it is held what is to be made, besides that of captions."""
        return [*(target.latent for target in task.targets), *self._others]

    def _needs(self, job: Job, index: int) -> list[str]:
        """What of it an image lacks."""
        return [name for name in self._of_pictures(job.task) if name not in job.tensors[index]]

    def _made(self, name: str, count: int) -> None:
        self.counts.made[name] = self.counts.made.get(name, 0) + count

    # ------------------------------------------------------------------------------------ loading threads

    def _load(self, task: Task, index: int, needs: list[str]) -> Loaded | Rejected:
        item = task.items[index]
        try:
            data = item.image.read(MAX_FILE_BYTES)
            if hashlib.sha256(data).hexdigest() != item.content:
                raise Rejected("changed during the build", "give the same command again", transient=True)
            names = self._encoders.of_images(needs)
            if not names:
                return Loaded(None, False)
            sizes = {name: task.size(index, name) for name in names}
            pictures = decode_at(data, item.header, dict.fromkeys(sizes.values()), self._options.fit, item.content)
            pixels = {name: self._encoders.prepared(field_of(name), pictures[sizes[name]].pixels) for name in names}
            return Loaded(pixels, any(picture.profile_ignored for picture in pictures.values()))
        except Rejected as rejected:
            return rejected
        except MemoryError:
            return Rejected("out of memory", "while it was decoded", transient=True)

    # ----------------------------------------------------------------------------------- caller's thread

    def _encode_captions(self, job: Job) -> None:
        for there in job.tensors:
            self.counts.reused += sum(len(there[name]) if name in self._of_captions else 1 for name in there)
        for name in self._of_captions:
            missing = [i for i, there in enumerate(job.tensors) if name not in there]
            if not missing:
                continue
            encoder, field = self._encoders.by_field[name], field_named(name)
            before = encoder.truncated
            captions = [caption for i in missing for caption in job.task.items[i].captions]
            with self.watch(field.encoder):
                encoded = iter(encoder.encode(captions))
            self.counts.truncated += encoder.truncated - before
            self._made(name, len(captions))
            for index in missing:
                made = tuple(itertools.islice(encoded, len(job.task.items[index].captions)))
                self._take(job, index, name, made)

    def _encode_batch(self, job: Job, batch: list[int], loads: list[Future[Loaded | Rejected]]) -> None:
        with self.watch("waiting for pictures"):
            loaded = [load.result() for load in loads]
        good: list[tuple[int, Loaded]] = []
        for index, result in zip(batch, loaded):
            if isinstance(result, Rejected):
                job.rejects[index] = result
            else:
                good.append((index, result))
                self.counts.pictures += result.pixels is not None
                if result.profile_ignored:
                    self.counts.profiles_ignored += 1
                    self._report("profile_ignored", key=job.task.items[index].key)
        if not good:
            return
        indices = [index for index, _ in good]
        needs = self._needs(job, indices[0])
        for name in self._encoders.of_images(needs):
            field = field_of(name)
            with self.watch(field_named(field).encoder):
                pixels = [result.pixels[name] for _, result in good if result.pixels is not None]
                made = self._encoders.by_field[field].encode(np.stack(pixels))
            self._made(field, len(good))
            for index, tensor in zip(indices, made, strict=True):
                self._take(job, index, name, tensor)
        for name in needs:
            if folder := self._encoders.folders.get(name):
                for index in indices:
                    self._take_file(job, index, folder)

    def _take_file(self, job: Job, index: int, folder: Folder) -> None:
        item, name = job.task.items[index], folder.field.name
        try:
            data, array = folder.read(item.key)
            if hashlib.sha256(data).hexdigest() != dict(item.files)[name]:
                raise Rejected("changed during the build", f"its {name} file", transient=True)
            job.tensors[index][name] = array
        except Rejected as rejected:
            job.rejects[index] = rejected

    @staticmethod
    def _take(job: Job, index: int, name: str, made: np.ndarray | tuple[np.ndarray, ...]) -> None:
        parts = made if isinstance(made, tuple) else (made,)
        if field_named(field_of(name)).kind == CELLS:
            parts = tuple(map(factors_of, parts))
        if all(np.isfinite(part).all() for part in parts):
            job.tensors[index][name] = made
        elif index not in job.rejects:
            count, size = sum(int((~np.isfinite(p)).sum()) for p in parts), sum(p.size for p in parts)
            maker = field_named(field_of(name)).maker
            job.rejects[index] = Rejected(f"the {maker} returned NaN", f"{count} of {size} values")

    # ------------------------------------------------------------------------------------- writer thread

    def _write(self, job: Job) -> list[tuple[Target, UnitInfo]]:
        rejects = tuple(
            Reject.of(job.task.items[i].key, job.task.items[i].image.path, why)
            for i, why in sorted(job.rejects.items())
        )
        kept = [i for i in range(len(job.task.items)) if i not in job.rejects]
        done = [(target, self._write_target(job, target, kept, rejects)) for target in job.task.targets]
        for reject in rejects:
            self._report("reject", key=reject.key, reason=reject.reason, detail=reject.detail)
        return done

    def _write_target(self, job: Job, target: Target, kept: list[int], rejects: tuple[Reject, ...]) -> UnitInfo:
        members, rows = [], []
        for i in kept:
            item = target.unit.items[i]
            member = self._record(item, job.tensors[i][target.latent], job.tensors[i])
            ids = job.ids[i]
            own = {name: ids[target.latent if name == LATENT.name else name] for name in self._prints.names}
            members.append(member)
            rows.append(index_row(member, own, _source(item)))
        return write_unit(
            folder=target.folder,
            uid=target.uid,
            split=target.unit.split,
            members=members,
            rows=rows,
            layout=self._layout,
            rejects=rejects,
        )

    def _record(self, item: Item, latent: np.ndarray, tensors: dict[str, Any]) -> Record:
        of_captions = {name: tensors[name] for name in self._of_captions}
        conditions = {name: of_captions[name][0] if name in of_captions else tensors[name] for name in self._layout}
        several = len(item.captions) > 1
        return Record(
            key=item.key,
            caption=item.caption,
            latent=latent,
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
