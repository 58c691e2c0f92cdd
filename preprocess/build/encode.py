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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fluxdit_jax.dataset.manifest import EncoderIdentity
from fluxdit_jax.dataset.records import Record
from preprocess.buckets import Size
from preprocess.build.options import Options
from preprocess.build.plan import MAX_FILE_BYTES, Fingerprints, Item, Unit
from preprocess.build.units import Archive, UnitInfo, write_unit
from preprocess.decoding.images import Rejected, decode
from preprocess.encoders import TextEncoder, Vae, VisionEncoder
from preprocess.input.findings import Reject
from preprocess.input.vectors import Vectors

_AHEAD = 3  # batches of pixels that may wait for the encoders, at least


@dataclasses.dataclass
class Encoders:
    """The three encoders; `vision` is None if the vectors are precomputed."""

    vae: Vae
    text: TextEncoder
    vision: VisionEncoder | None
    vectors: Vectors | None = None

    @property
    def precomputed(self) -> Vectors:
        """The vectors that stand in for a vision encoder."""
        assert self.vectors is not None
        return self.vectors

    @property
    def vision_identity(self) -> EncoderIdentity:
        return self.precomputed.identity if self.vision is None else self.vision.identity

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """The picture as the vision encoder wants it, made in the loading threads if it can be."""
        prepare = getattr(self.vision, "prepare", None)
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
    """What was done: images decoded, tensors encoded by kind, tensors taken over from before, and so on."""

    pictures: int = 0
    latents: int = 0
    texts: int = 0
    visions: int = 0
    reused: int = 0
    rejected: int = 0
    truncated: int = 0
    profiles_ignored: int = 0


@dataclasses.dataclass
class _Job:
    """A unit being made.

    Attributes:
      tensors: of each item [latent, texts, vision], None where still to be made; the texts are a tuple with those
        of all its captions.
    """

    unit: Unit
    uid: str
    ids: list[tuple[str, str, str]]
    tensors: list[list[Any]]
    batches: list[list[int]]
    rejects: dict[int, Rejected] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Loaded:
    pixels: np.ndarray | None
    prepared: np.ndarray | None
    profile_ignored: bool


def _batches(unit: Unit, tensors: list[list[Any]], size: int) -> list[list[int]]:
    """Items whose picture is needed, in batches of one bucket and one kind of need."""
    groups: dict[tuple[Size, bool, bool], list[int]] = collections.defaultdict(list)
    for index, (item, (latent, _, vision)) in enumerate(zip(unit.items, tensors)):
        if latent is None or vision is None:
            groups[item.bucket, latent is None, vision is None].append(index)
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
        self._stop = threading.Event()
        self.watch, self.counts = Stopwatch(), Counts()

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
                    self._encode_texts(job)
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
                tensors = self._archive.fetch(ids)
                job = _Job(unit, uid, ids, tensors, _batches(unit, tensors, self._options.batch_size))
                if not self._put(feed, ("begin", job, None)):
                    return
                for batch in job.batches:
                    if self._stop.is_set():
                        return
                    loads = [pool.submit(self._load, unit.items[i], *self._needs(job, i)) for i in batch]
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

    @staticmethod
    def _needs(job: _Job, index: int) -> tuple[bool, bool]:
        latent, _, vision = job.tensors[index]
        return latent is None, vision is None

    # ------------------------------------------------------------------------------------ loading threads

    def _load(self, item: Item, latent: bool, vision: bool) -> _Loaded | Rejected:
        try:
            data = item.image.read(MAX_FILE_BYTES)
            if hashlib.sha256(data).hexdigest() != item.content:
                raise Rejected("changed during the build", "give the same command again", transient=True)
            if vision and self._encoders.vectors and not latent:
                return _Loaded(None, None, False)
            picture = decode(data, item.header, item.bucket, self._options.fit, item.content)
            prepared = self._encoders.prepare(picture.pixels) if vision and self._encoders.vision else None
            return _Loaded(picture.pixels, prepared, picture.profile_ignored)
        except Rejected as rejected:
            return rejected
        except MemoryError:
            return Rejected("out of memory", "while it was decoded", transient=True)

    # ----------------------------------------------------------------------------------- caller's thread

    def _encode_texts(self, job: _Job) -> None:
        missing = [i for i, (_, texts, _) in enumerate(job.tensors) if texts is None]
        for latent, texts, vision in job.tensors:
            self.counts.reused += (latent is not None) + len(texts or ()) + (vision is not None)
        if not missing:
            return
        before = self._encoders.text.truncated
        captions = [caption for i in missing for caption in job.unit.items[i].captions]
        with self.watch("text"):
            encoded = iter(self._encoders.text.encode(captions))
        self.counts.truncated += self._encoders.text.truncated - before
        self.counts.texts += len(captions)
        for index in missing:
            texts = tuple(itertools.islice(encoded, len(job.unit.items[index].captions)))
            self._take(job, index, 1, texts, "text encoder")

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
        need_latent, need_vision = self._needs(job, indices[0])
        if need_latent:
            with self.watch("vae"):
                pixels = [result.pixels for _, result in good if result.pixels is not None]
                latents = self._encoders.vae.encode(np.stack(pixels))
            self.counts.latents += len(good)
            for index, latent in zip(indices, latents, strict=True):
                self._take(job, index, 0, latent, "VAE")
        if need_vision and self._encoders.vision:
            with self.watch("vision"):
                prepared = [result.prepared for _, result in good if result.prepared is not None]
                vectors = self._encoders.vision.encode(np.stack(prepared))
            self.counts.visions += len(good)
            for index, vector in zip(indices, vectors, strict=True):
                self._take(job, index, 2, vector, "vision encoder")
        elif need_vision:
            for index in indices:
                self._take_vector(job, index)

    def _take_vector(self, job: _Job, index: int) -> None:
        item = job.unit.items[index]
        try:
            data, vector = self._encoders.precomputed.read(item.key)
            if hashlib.sha256(data).hexdigest() != item.vector:
                raise Rejected("changed during the build", "its vector", transient=True)
            job.tensors[index][2] = vector
        except Rejected as rejected:
            job.rejects[index] = rejected

    @staticmethod
    def _take(job: _Job, index: int, kind: int, made: np.ndarray | tuple[np.ndarray, ...], name: str) -> None:
        parts = made if isinstance(made, tuple) else (made,)
        if all(np.isfinite(part).all() for part in parts):
            job.tensors[index][kind] = made
        elif index not in job.rejects:
            count, size = sum(int((~np.isfinite(p)).sum()) for p in parts), sum(p.size for p in parts)
            job.rejects[index] = Rejected(f"the {name} returned NaN", f"{count} of {size} values")

    # ------------------------------------------------------------------------------------- writer thread

    def _write(self, job: _Job) -> UnitInfo:
        kept = [i for i in range(len(job.unit.items)) if i not in job.rejects]
        rows = [_row(job.unit.items[i], job.ids[i], job.tensors[i][1]) for i in kept]
        members = (_record(job.unit.items[i], *job.tensors[i]) for i in kept)
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
            text_width=self._encoders.text.identity.width,
            rejects=rejects,
        )
        for reject in rejects:
            self._report("reject", key=reject.key, reason=reject.reason, detail=reject.detail)
        return info


def _record(item: Item, latent: np.ndarray, texts: tuple[np.ndarray, ...], vision: np.ndarray) -> Record:
    return Record(
        key=item.key,
        caption=item.caption,
        latent=latent,
        text=texts[0],
        vision=vision,
        original_size=(item.header.height, item.header.width),
        encoded_size=item.bucket,
        content_hash=item.content,
        other_captions=item.captions[1:],
        other_texts=texts[1:],
    )


def _row(item: Item, ids: tuple[str, str, str], texts: tuple[np.ndarray, ...]) -> dict[str, Any]:
    return {
        "key": item.key,
        "caption": item.caption,
        "bucket_height": item.bucket[0],
        "bucket_width": item.bucket[1],
        "height": item.header.height,
        "width": item.header.width,
        "tokens": max(map(len, texts)),
        "content_hash": item.content,
        "source": item.key if item.image.size < 0 else item.image.path.rpartition("/")[2],
        "latent_id": ids[0],
        "text_id": ids[1],
        "vision_id": ids[2],
    }
