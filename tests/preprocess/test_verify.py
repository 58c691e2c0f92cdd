"""Damage of every kind is found, named, and repaired by encoding no more than was damaged."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from build_fixtures import contents, index, options, write_photos
from wording import lines_naming, naming

from fluxdit_jax.dataset.manifest import INDEX, MANIFEST, DatasetError, load_manifest
from preprocess import PreprocessError
from preprocess.build.build import build
from preprocess.build.comparison import WouldLose
from preprocess.build.lock import locked
from preprocess.build.publish import OPTIONS_FILE
from preprocess.build.rows import Rows
from preprocess.inspect.verify import WHOLE, Finding, repair, verify


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, draw_photo) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_photos(folder / "photos", 24, draw_photo)
    build(options(folder / "photos", folder / "data"))
    return folder


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built / "data", tmp_path / "data")
    return tmp_path / "data"


def flip(path: Path, position: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def encoded_by_repair(directory: Path, capsys: pytest.CaptureFixture) -> tuple[int, int, int]:
    """Repairs and returns how many latents, captions and vectors were encoded."""
    capsys.readouterr()
    repair(directory, {directory: verify(directory)})
    line = next(line for line in capsys.readouterr().out.splitlines() if "encoded" in line and "latents" in line)
    words = line.replace(",", "").split()
    return int(words[1]), int(words[3]), int(words[5])


def test_a_sound_dataset(copied: Path) -> None:
    assert verify(copied) == []


def test_a_flipped_bit_is_found_at_its_row_and_only_that_record_is_made_again(
    built: Path, copied: Path, capsys: pytest.CaptureFixture
) -> None:
    row = index(copied)[11]
    shard = copied / row["shard"]
    flip(shard, shard.read_bytes().index(row["caption"].encode()))
    findings = verify(copied)
    assert {f.file for f in findings} == {shard.name}
    assert [f.row for f in findings if f.row >= 0] == [row["row"]]
    assert any("sha256" in f.what for f in findings)
    assert encoded_by_repair(copied, capsys) == (1, 1, 1)
    assert verify(copied) == [] and contents(copied) == contents(built / "data")


def test_random_flips_anywhere_are_found_and_repaired(built: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    names = sorted(p.name for p in (built / "data").iterdir() if p.name not in ("build.json", "build_log.jsonl"))
    for trial in range(24):
        name = names[trial % len(names)]
        size = (built / "data" / name).stat().st_size
        if not size:
            continue
        directory = tmp_path / "data"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(built / "data", directory)
        flip(directory / name, rng.randrange(size), 1 << rng.randrange(8))
        try:
            findings = verify(directory)
        except DatasetError as error:
            assert name == MANIFEST and name in str(error)
            continue
        if name == INDEX and not findings:  # in what is written for other readers: it says the same
            assert Rows.load(directory / INDEX).table.equals(Rows.load(built / "data" / INDEX).table)
            continue
        assert [f for f in findings if f.file == name], f"a flip in {name} was not noticed"


@pytest.mark.parametrize("how", ["shorter", "longer", "gone", "empty"])
def test_a_shard_of_another_length(how: str, built: Path, copied: Path, capsys: pytest.CaptureFixture) -> None:
    manifest = load_manifest(copied)
    shard = manifest.shards["train"][1]
    path = copied / shard.file
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"shorter": data[: len(data) // 2], "longer": data + b"x", "empty": b""}[how])
    assert shard.file in {f.file for f in verify(copied)}
    latents, _, _ = encoded_by_repair(copied, capsys)
    assert latents <= shard.records
    assert verify(copied) == [] and contents(copied) == contents(built / "data")


@pytest.mark.parametrize("name", ["index.parquet", "rejects.jsonl", "features.json", "dataset_info.json"])
def test_other_files_are_written_anew_without_encoding(
    name: str, built: Path, copied: Path, capsys: pytest.CaptureFixture
) -> None:
    (copied / name).unlink()
    assert [f.file for f in verify(copied)] == [name]
    assert encoded_by_repair(copied, capsys) == (0, 0, 0)
    assert verify(copied) == [] and contents(copied) == contents(built / "data")


def test_a_damaged_index_is_salvaged_from_the_records(built: Path, copied: Path, capsys: pytest.CaptureFixture) -> None:
    flip(copied / INDEX, (copied / INDEX).stat().st_size // 2)
    assert encoded_by_repair(copied, capsys) == (0, 0, 0)
    assert contents(copied) == contents(built / "data")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("caption", "another one"), ("key", "another.png"), ("content_hash", "0" * 64), ("tokens", 99),
        ("height", 1), ("width", 1), ("bucket_height", 16), ("bucket_width", 16),
    ],
)  # fmt: skip
def test_an_index_that_says_something_else_of_a_record(copied: Path, column: str, value: object) -> None:
    """Written whole, with right checksums."""
    rows = Rows.load(copied / INDEX)
    values = rows.table[column].to_pylist()
    values[5] = value
    at = rows.table.schema.get_field_index(column)
    rows.table = rows.table.set_column(at, rows.table.schema.field(at), pa.array(values, rows.table.schema.types[at]))
    rows.save(copied / INDEX)
    row = rows.table.slice(5, 1).to_pylist()[0]
    findings = verify(copied)
    assert {f.file for f in findings} == {row["shard"]}
    if not column.startswith("bucket"):  # which are held against the manifest's as a whole
        assert [(f.row, repr(value) in f.what) for f in findings] == [(row["row"], True)]


def test_a_foreign_shard_and_a_swapped_one(copied: Path) -> None:
    first, second = (shard.file for shard in load_manifest(copied).shards["train"][:2])
    (copied / "stray.array_record-00000-of-00001").write_bytes(b"x")
    assert [f.file for f in verify(copied)] == ["stray.array_record-00000-of-00001"]
    (copied / "stray.array_record-00000-of-00001").unlink()
    a, b = (copied / first).read_bytes(), (copied / second).read_bytes()
    (copied / first).write_bytes(b)
    (copied / second).write_bytes(a)
    findings = verify(copied)
    assert {f.file for f in findings} == {first, second}
    assert any("index.parquet" in f.what for f in findings)


def test_the_command_line(built: Path, copied: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "preprocess", *arguments], capture_output=True, text=True)

    digit = (copied / MANIFEST).read_text().index('"latent_count": ') + len('"latent_count": ')
    flip(copied / MANIFEST, digit)
    found = run("verify", str(copied))
    assert found.returncode == 1 and lines_naming(found.stderr, MANIFEST, "checksum")
    mended = run("verify", str(copied), "--repair")
    assert mended.returncode == 0, mended.stderr
    assert lines_naming(mended.stdout, str(copied), "every record")
    assert contents(copied) == contents(built / "data")


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "damaged"])
def test_without_its_index_a_dataset_is_not_replaced(
    lost: bool, built: Path, copied: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of pictures that are gone from the input it has the only records; `verify --repair` writes the index anew."""
    flip(copied / INDEX, 2000)
    if lost:
        (copied / INDEX).unlink()
    pictures = [path for path in (built / "photos").rglob("p*") if path.suffix != ".json"]
    for path in pictures[2:]:
        path.rename(path.with_suffix(".away"))
    before = contents(copied)
    try:
        with pytest.raises(PreprocessError, match=naming(INDEX, "verify --repair", copied, "--replace")):
            build(options(built / "photos", copied))
        assert contents(copied) == before
        with pytest.raises(WouldLose):
            repair(copied, {copied: verify(copied)})
    finally:
        for path in pictures[2:]:
            path.with_suffix(".away").rename(path)
    assert {**contents(copied), INDEX: b""} == {**before, INDEX: b""}
    assert build(options(built / "photos", copied)).counts.made == {}
    assert contents(copied) == contents(built / "data")


def test_a_dataset_that_was_moved_keeps_the_names_that_its_runs_know(built: Path, copied: Path) -> None:
    moved = copied.rename(copied.with_name("elsewhere"))
    build(options(built / "photos", moved))
    assert contents(moved) == contents(built / "data")


def test_a_repair_that_cannot_begin_leaves_all_as_it_is(copied: Path) -> None:
    """So that the next one knows what is damaged."""
    shard = copied / load_manifest(copied).shards["train"][0].file
    flip(shard, 70_000)
    mine = copied / "backup.array_record-old"
    mine.write_text("mine")
    findings, before = verify(copied), contents(copied)
    (copied / ".build").mkdir()
    with locked(copied / ".build" / "lock"), pytest.raises(PreprocessError, match="being written"):
        repair(copied, {copied: findings})
    shutil.rmtree(copied / ".build", ignore_errors=True)
    assert contents(copied) == before and verify(copied) == findings
    repair(copied, {copied: findings})
    assert verify(copied) == [] and mine.read_text() == "mine"


def test_without_a_manifest_damaged_shards_are_made_again(built: Path, copied: Path) -> None:
    shard = copied / load_manifest(copied).shards["train"][0].file
    flip(shard, 70_000)
    (copied / MANIFEST).unlink()
    repair(copied, {copied: [Finding(MANIFEST, WHOLE, "is missing")]})
    assert verify(copied) == [] and contents(copied) == contents(built / "data")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("x")], ids=["gone", "broken"])
@pytest.mark.parametrize("missing", [MANIFEST, OPTIONS_FILE])
def test_without_an_index_nothing_is_thrown_away(built: Path, copied: Path, damage: Callable, missing: str) -> None:
    """Nothing tells what the shards hold, as after a copy that was broken off."""
    for name in (missing, INDEX):
        damage(copied / name)
    before = {path.name for path in copied.glob("*.array_record*")}
    with pytest.raises(PreprocessError, match=naming(copied / INDEX, missing, "--replace")) as refused:
        build(options(built / "photos", copied))
    assert "--repair" not in str(refused.value), "which could not help"
    with pytest.raises(PreprocessError, match=naming(missing)):
        repair(copied, {copied: [Finding(MANIFEST, WHOLE, "is damaged"), Finding(INDEX, WHOLE, "is damaged")]})
    assert {path.name for path in copied.glob("*.array_record*")} == before
    build(options(built / "photos", copied), replace=True)
    assert verify(copied) == []


def test_shards_of_a_moved_dataset_keep_their_names_without_a_manifest(copied: Path, tmp_path: Path) -> None:
    moved = copied.rename(tmp_path / "elsewhere")
    name = load_manifest(moved).name
    (moved / MANIFEST).write_text("x")
    repair(moved, {moved: [Finding(MANIFEST, WHOLE, "is damaged")]})
    assert verify(moved) == [] and load_manifest(moved).name == name != "elsewhere"


def test_repair_without_the_sources_says_so(copied: Path) -> None:
    text = (copied / "build.json").read_text()
    moved = json.loads(text.replace("photos", "gone"))
    (copied / "build.json").write_text(json.dumps(moved))
    shard = copied / load_manifest(copied).shards["train"][0].file
    flip(shard, 70_000)
    findings = verify(copied)
    with pytest.raises(PreprocessError, match="build.json.*checksum"):
        repair(copied, {copied: findings})
    (copied / "build.json").write_text(json.dumps({"options": moved["options"]}))
    with pytest.raises(PreprocessError, match=f"--input {moved['options']['input']}"):
        repair(copied, {copied: findings})
    (copied / "build.json").unlink()
    with pytest.raises(PreprocessError, match="build.json.*No such file"):
        repair(copied, {copied: findings})
