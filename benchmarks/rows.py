"""Time and memory of a build of very many pictures, beside reading them and encoding: both are simulated.

    python -m benchmarks.rows 100000 1000000 10000000

Each count runs in a process of its own through what a build does with every picture: listing, planning, naming shards,
comparing with what there is, the rows of finished shards (which workers write), publishing; and of the same build given
again, which finds everything done. Captions have 300 characters.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.environment import write
from fluxdit_jax.dataset.manifest import EncoderIdentity
from preprocess.build import comparison
from preprocess.build.archive import Archive
from preprocess.build.existing import Existing
from preprocess.build.items import Item, Items
from preprocess.build.journal import Journal
from preprocess.build.options import Options
from preprocess.build.plan import Fingerprints, Plan, Unit, make_units
from preprocess.build.publish import publish
from preprocess.build.rows import UnitInfo, rows_schema, write_rows
from preprocess.build.statistics import Moments
from preprocess.build.units import SHARD_SUFFIX, WORK, load_unit
from preprocess.database import StoredSet
from preprocess.decoding.images import Header
from preprocess.input.byte_source import ByteSource
from preprocess.input.captions import Source
from preprocess.input.found import Found, InputImage

LAYOUT = {"text": 1024, "vision": None}
IDENTITIES = {
    name: EncoderIdentity("simulated", "", "0" * 64, "bfloat16", width, options)
    for name, width, options in (
        ("vae", 16, {"factor": 8, "latent": "mean"}),
        ("text", 1024, {"max_tokens": 512}),
        ("vision", 1024, {}),
    )
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that has ended: its seconds, and the peak of memory since the start, MB above what the start took."""

    name: str
    seconds: float
    peak: float


class Watch:
    """Gives the `Step`s of a process as they end."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._before = _peak()

    def __call__(self, name: str) -> Step:
        begun, self._begun = self._begun, time.perf_counter()
        return Step(name, self._begun - begun, _peak() - self._before)


def _peak() -> float:
    """MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def listed(count: int) -> Iterator[InputImage]:
    """Photographs in folders of a thousand, each with a caption file."""
    for number in range(count):
        key = f"{number // 1000:05}/{number:08}.jpg"
        caption = Source(f"{number:08}.json", 0, ByteSource(f"/data/photos/{key[:-4]}.json"), ".json")
        yield InputImage(key, ByteSource(f"/data/photos/{key}"), (caption,))


def judged(found: Found) -> Iterator[Item]:
    """What reading them would give."""
    for number, image in enumerate(found):
        content = hashlib.sha256(image.key.encode()).hexdigest()
        header = Header(1000 + number % 500, 1200, 1, "JPEG")
        caption = f"{number:08} " + "word " * 58
        yield Item(image.key, image.image, (caption,), content, header, (0, 0), (0, 0))


def finish(work: Path, uid: str, unit: Unit, prints: Fingerprints) -> None:
    """The rows of a unit and an empty shard, as a worker leaves them."""
    rows = [
        {"key": i.key, "caption": i.caption, "bucket_height": i.bucket[0], "bucket_width": i.bucket[1],
         "height": i.header.height, "width": i.header.width, "tokens": 70, "content_hash": i.content, "source": i.key}
        | {f"{name}_id": own for name, own in zip(prints.names, prints.ids(i), strict=True)}
        for i in unit.items
    ]  # fmt: skip
    moments = Moments(len(rows), np.zeros(16), np.ones(16) * len(rows))
    (work / (uid + SHARD_SUFFIX)).touch()
    info = UnitInfo(uid, unit.split, "0" * 64, 0, len(rows), LAYOUT, moments, ())
    schema = rows_schema(["latent", *LAYOUT])
    write_rows(work / f"{uid}.parquet", schema, [info], [pa.Table.from_pylist(rows, schema)])


def build(count: int, output: Path, shard_size: int = Options.shard_size) -> Iterator[Step]:
    """Everything twice."""
    watch = Watch()
    options = Options("in", str(output), shard_size=shard_size).checked()
    prints, journal = Fingerprints.of(options, IDENTITIES), Journal(None)
    (output / WORK).mkdir(parents=True)
    found = Found(listed(count))
    yield watch("list")
    for again in ("", " again"):
        items = Items(options, judged(found))
        units = make_units(items, options.shard_size)
        plan = Plan(options, items, units, [], items.duplicates(), collections.Counter(), 0)
        items.repeated()
        yield watch("plan" + again)
        wanted = [(unit.uid(prints), unit) for unit in units]
        yield watch("name" + again)
        done = Existing.load(output, {uid for uid, _ in wanted}, journal)
        known = StoredSet(done.usable())
        result = comparison.compare(plan, prints, done, known, prints)
        assert (result.kept, result.new) == ((count, 0) if again else (0, count))
        yield watch("compare" + again)
        if not again:
            for uid, unit in wanted:
                finish(output / WORK, uid, unit, prints)
                made = load_unit(output / WORK, uid)
                assert made is not None
                done.add(made)
            yield watch("rows of shards")
        else:
            done.add_to(Archive(print))
            yield watch("all tensors again")
        _, changed = publish(output, plan, [done.units[uid] for uid, _ in wanted], IDENTITIES)
        assert changed == (not again)
        yield watch("publish" + again)


def measured(count: int, folder: Path) -> Iterator[Step]:
    """`build` in a process of its own."""
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_send, args=(sender, count, folder))
    process.start()
    sender.close()
    with contextlib.suppress(EOFError):
        while True:
            yield receiver.recv()
    process.join()
    if process.exitcode:
        sys.exit(f"the build of {count} pictures ended with status {process.exitcode}")


def _send(sender: Connection, count: int, folder: Path) -> None:
    for step in build(count, folder / "data"):
        sender.send(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=int, nargs="+")
    parser.add_argument("--work", default=tempfile.gettempdir(), help="folder for the datasets, 0.5 KB a picture")
    parser.add_argument("--name", default="rows", help="of the result")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    for count in arguments.counts:
        steps: dict[str, tuple[float, float]] = {}
        results.append({"count": count, "steps": steps})
        print(f"{count:,} pictures", flush=True)
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            for step in measured(count, Path(folder)):
                steps[step.name] = step.seconds, step.peak
                write(arguments.name, results)  # a run of hours that is stopped leaves what it has measured
                each = step.seconds / count * 1e6
                print(f"{step.name:20}{step.seconds:9.1f} s{each:6.0f} us each{step.peak:6.0f} MB peak", flush=True)


if __name__ == "__main__":
    main()
