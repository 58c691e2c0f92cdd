"""What may be more than memory holds: databases, the images found, the rows of units; and that memory does not grow."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import rows as simulated
from fluxdit_jax.dataset.manifest import DatasetError
from preprocess.build.items import Item, Items
from preprocess.build.options import Options
from preprocess.build.rows import Rows, RowsFile
from preprocess.database import Database, StoredSet
from preprocess.decoding.images import Header, Rejected
from preprocess.input.byte_source import ByteSource
from preprocess.input.captions import Source
from preprocess.input.found import Found, InputImage

OPTIONS = Options("in", "out", resolution=128, modulus=16, holdout=0.0)


def test_a_set_has_what_was_put_into_it() -> None:
    texts = [f"{number} ü" for number in range(2500)]  # more than are written at once
    found = StoredSet(texts[::2])
    assert [text in found for text in texts] == [True, False] * 1250
    assert "\ud800" not in found and None not in found
    found.add("\x00")
    assert "\x00" in found and "" not in found and "x" not in StoredSet()


def test_a_full_disk_of_temporary_files_is_told(tmp_path: Path) -> None:
    """Beyond its cache a database is a file: here in a folder that takes none."""
    code = (
        "from preprocess.database import Database\n"
        "rows = Database('CREATE TABLE t (a TEXT)')\n"
        "rows.run_many('INSERT INTO t VALUES (?)', (('x' * 10_000,) for _ in range(10_000)))\n"
    )
    limited = f"ulimit -f 20000; trap '' XFSZ; exec {sys.executable} -c \"$CODE\""
    environment = os.environ | {"CODE": code, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(["bash", "-c", limited], env=environment, capture_output=True, text=True)
    assert ended.returncode == 1 and "PreprocessError: temporary files cannot be written or read (" in ended.stderr, (
        ended
    )
    assert "TMPDIR" in ended.stderr and not list(tmp_path.iterdir())


def test_a_database_gives_its_rows_while_more_are_written() -> None:
    rows = Database("CREATE TABLE a (n INTEGER)", "CREATE TABLE b (n INTEGER)")
    rows.run_many("INSERT INTO a VALUES (?)", ((n,) for n in range(5)))
    for (n,) in rows.rows("SELECT n FROM a ORDER BY n"):
        assert rows.run("INSERT INTO b VALUES (?)", n * n) == 1
    assert rows.one("SELECT SUM(n) FROM b") == (30,)
    assert rows.one("SELECT n FROM b WHERE n = 7") is None


# ---------------------------------------------------------------------------------------------- the images of an input


SOURCES = (
    Source("a.json", 0, ByteSource("/in/a.json"), ".json"),
    Source("a.1.txt", 1, ByteSource("/in/x.tar", 512, 9), ".txt", only=True),
)


def test_what_is_found_comes_back_by_key() -> None:
    odd = InputImage("ü.png", ByteSource("/in/\udcff/ü.png"), SOURCES)  # a folder whose name is not UTF-8
    images = [InputImage("b.png", ByteSource("/in/b.png")), odd, InputImage("a.png", ByteSource("/in/x.tar", 7, 5))]
    found = Found(images)
    assert list(found) == [images[2], images[0], odd] and len(found) == 3
    assert list(found.all_keys()) == ["a.png", "b.png", "ü.png"]
    assert list(found.first(1)) == [images[2]] and found["ü.png"] == odd
    assert "b.png" in found and "c.png" not in found and "\ud800" not in found
    assert not found.add(dataclasses.replace(odd, image=ByteSource("another"))) and found["ü.png"] == odd
    with pytest.raises(KeyError):
        found["c.png"]


def test_rows_of_tables_stand_behind_caption_files_in_a_group_a_table() -> None:
    found = Found([InputImage("a.png", ByteSource("a"), SOURCES), InputImage("b.png", ByteSource("b"))])
    for key in ("a.png", "b.png"):
        for table, line in (("t:1.csv", 2), ("t:1.csv", 4), ("sub/t.csv", 3)):
            found.add_row(key, table, line, (f"line {line}", "\ud800"))
    found.add_row("b.png", "sub/t.csv", 9, Rejected("empty caption", "of b", transient=True))
    groups = {image.key: [(source.name, source.group) for source in image.captions] for image in found}
    assert groups["a.png"] == [("a.json", 0), ("a.1.txt", 1), ("t:1.csv:2", 2), ("t:1.csv:4", 2), ("sub/t.csv:3", 3)]
    assert groups["b.png"] == [("t:1.csv:2", 0), ("t:1.csv:4", 0), ("sub/t.csv:3", 1), ("sub/t.csv:9", 1)]
    *_, last = found["b.png"].captions
    assert isinstance(last.texts, Rejected)
    assert (last.texts.reason, last.texts.detail, last.texts.transient) == ("empty caption", "of b", True)
    assert found["a.png"].captions[2].texts == ("line 2", "\ud800")


# ------------------------------------------------------------------------------------------------ the images of a plan


def items(count: int) -> list[Item]:
    sizes = [(64, 128), (100, 80), (70, 100)]
    return [
        Item(
            key=f"{n:04}.png",
            image=ByteSource(f"/in/{n:04}", n, 5),
            captions=("same", "ü") if n % 4 == 0 else (f"caption {n % 6}",),
            content=f"{n % 10:064x}",
            header=Header(*sizes[n % 3], 6, "JPEG", 2),
            bucket=(0, 0),
            seen=(0, 0),
            files=(("vision", f"{n}"),),
        )
        for n in range(count)
    ]


def test_a_plans_images_come_back_with_the_buckets_of_its_options() -> None:
    given = items(12)
    planned = Items(OPTIONS, given)
    buckets = [(112, 144), (144, 112), (112, 144)]
    expected = [dataclasses.replace(i, bucket=buckets[n % 3], seen=buckets[n % 3]) for n, i in enumerate(given)]
    assert list(planned) == expected and len(planned) == 12
    assert [planned[position] for position in (0, 11, -1)] == [expected[0], expected[11], expected[11]]
    assert planned.get("0003.png") == expected[3] and planned.get("3.png") is None
    assert [tuple(planned.sizes[which]) for which in planned.size_of[:3]] == [(64, 128), (100, 80), (70, 100)]
    larger = planned.at(dataclasses.replace(OPTIONS, resolution=256, modulus=32, vision_resolution=128))
    assert larger[1] == dataclasses.replace(expected[1], bucket=(288, 224)) and list(planned) == expected


def test_what_a_plans_images_have_in_common() -> None:
    planned = Items(OPTIONS, items(12))
    assert (planned.several, planned.captions, planned.wrong_extension) == (3, 15, 12)
    assert planned.duplicates() == [("0000.png", "0010.png"), ("0001.png", "0011.png")]
    assert planned.has_content("0" * 64) and not planned.has_content("f" * 64)
    assert planned.repeated() == (12, 7, 9, [("same", 3), ("caption 1", 2), ("caption 3", 2)])


def test_images_that_are_out_of_order_are_refused() -> None:
    for wrong in (items(3)[::-1], items(2)[:1] * 2):
        with pytest.raises(ValueError, match="behind"):
            Items(OPTIONS, wrong)


# ------------------------------------------------------------------------------------------------- the rows of shards


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of a dataset of 300 records in shards of 100 at most."""
    output = tmp_path_factory.mktemp("rows") / "data"
    list(simulated.build(300, output, shard_size=100))
    return output / "index.parquet"


def test_the_rows_of_one_shard_are_read_alone(published: Path) -> None:
    file, whole = RowsFile(published), Rows.load(published)
    assert len(file.units) > 2 and pq.ParquetFile(published).num_row_groups == len(file.units)
    start = 0
    for unit in file:
        assert unit.read().equals(whole.table.slice(start, unit.info.records))
        start += unit.info.records
    assert start == file.records == 300


def test_an_index_of_earlier_versions_is_read(published: Path, tmp_path: Path) -> None:
    """They wrote all rows as one group, and a dataset that is large several of any length."""
    table = pq.read_table(published)
    expected = Rows.load(published)
    for rows in (1_000_000, 70):
        pq.write_table(table, tmp_path / "old.parquet", row_group_size=rows)
        file = RowsFile(tmp_path / "old.parquet")
        assert Rows.load(tmp_path / "old.parquet").table.equals(expected.table)
        assert pa.concat_tables([unit.read() for unit in file]).equals(expected.table)


def test_a_unit_of_earlier_versions_without_records_is_read(published: Path, tmp_path: Path) -> None:
    """They wrote a row group of no rows."""
    table = pq.read_table(published).slice(0, 0)
    info = dataclasses.replace(RowsFile(published).units[0], records=0, moments=None)
    Rows(table, [info]).save(tmp_path / "new.parquet")
    pq.write_table(pq.read_table(tmp_path / "new.parquet"), tmp_path / "old.parquet")
    for name, groups in (("new", 0), ("old", 1)):
        path = tmp_path / f"{name}.parquet"
        assert pq.ParquetFile(path).num_row_groups == groups
        assert RowsFile(path).rows(0).num_rows == Rows.load(path).table.num_rows == 0


def test_rows_that_are_missing_are_damage(published: Path, tmp_path: Path) -> None:
    table = pq.read_table(published)
    pq.write_table(table.slice(1), tmp_path / "short.parquet")
    with pytest.raises(DatasetError, match="299 rows, not one for each record"):
        RowsFile(tmp_path / "short.parquet")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pictures(tmp_path: Path) -> None:
    """Python's and Arrow's memory; SQLite keeps to its cache. What grows: hashes and sizes, and what a shard needs."""
    peaks = []
    for count in (500, 2500):
        tracemalloc.start()
        list(simulated.build(count, tmp_path / str(count), shard_size=100))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert np.diff(peaks)[0] / 2000 < 200, peaks
