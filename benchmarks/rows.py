"""Time and memory of a build of very many pictures, beside reading them and encoding: both are simulated.

    python -m benchmarks.rows 100000 1000000 10000000

Each count runs in a process of its own through what a build does with every picture: listing, planning, naming shards,
comparing with what there is, the rows of finished shards (which workers write), publishing; and of the same build given
again, which finds everything done. Captions have 300 characters.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.environment import table, write
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


class Watch:
    """Seconds and the peak of memory by step; a step's name is given when it has ended."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[float, float]] = {}
        self._begun = time.perf_counter()
        self._before = _peak()

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        self.steps[step] = now - self._begun, _peak() - self._before
        self._begun = now


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


def build(count: int, output: Path, shard_size: int = Options.shard_size) -> dict[str, tuple[float, float]]:
    """Everything twice; returns seconds and peak MB (above the start's) by step."""
    watch = Watch()
    options = Options("in", str(output), shard_size=shard_size).checked()
    prints, journal = Fingerprints.of(options, IDENTITIES), Journal(None)
    (output / WORK).mkdir(parents=True)
    found = Found(listed(count))
    watch("list")
    for again in ("", " again"):
        items = Items(options, judged(found))
        units = make_units(items, options.shard_size)
        plan = Plan(options, items, units, [], items.duplicates(), collections.Counter(), 0)
        items.repeated()
        watch("plan" + again)
        wanted = [(unit.uid(prints), unit) for unit in units]
        watch("name" + again)
        done = Existing.load(output, {uid for uid, _ in wanted}, journal)
        known = StoredSet(done.usable())
        result = comparison.compare(plan, prints, done, known, prints)
        assert (result.kept, result.new) == ((count, 0) if again else (0, count))
        watch("compare" + again)
        if not again:
            for uid, unit in wanted:
                finish(output / WORK, uid, unit, prints)
                made = load_unit(output / WORK, uid)
                assert made is not None
                done.add(made)
            watch("rows of shards")
        else:
            done.add_to(Archive(print))
            watch("all tensors again")
        _, changed = publish(output, plan, [done.units[uid] for uid, _ in wanted], IDENTITIES)
        assert changed == (not again)
        watch("publish" + again)
    return watch.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=int, nargs="+")
    parser.add_argument("--work", default=tempfile.gettempdir(), help="folder for the datasets, 0.5 KB a picture")
    parser.add_argument("--name", default="rows", help="of the result")
    arguments = parser.parse_args()
    results = []
    for count in arguments.counts:
        folder = tempfile.mkdtemp(dir=arguments.work)
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                steps = pool.submit(build, count, Path(folder) / "data").result()
        finally:
            shutil.rmtree(folder)
        results.append({"count": count, "steps": steps})
        write(arguments.name, results)
        rows = [[step, f"{s:.1f}", f"{s / count * 1e6:.0f}", f"{mb:.0f}"] for step, (s, mb) in steps.items()]
        print(f"{count:,} pictures\n{table(['step', 's', 'us a picture', 'peak MB so far'], rows)}", flush=True)


if __name__ == "__main__":
    main()
