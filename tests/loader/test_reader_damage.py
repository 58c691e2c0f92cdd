"""Damage of a data set, told by shard and row: what stops the reader, and what it passes over if asked to."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from training_helpers import (
    CHANNELS,
    TEXT_WIDTH,
    UNEVEN_SIZES,
    identity,
    make_record,
    tree_equal,
    write_dataset,
    write_shard,
)
from training_helpers import joined as whole
from training_helpers import read_batches as read
from wording import naming

from fluxdit_jax.dataset.fields import BF16
from fluxdit_jax.dataset.manifest import DatasetError, load_manifest
from fluxdit_jax.dataset.records import encode_record, serialize_unchecked
from fluxdit_jax.loader.reader import RecordSource

pytest_plugins = ("training_fixtures",)


@pytest.fixture
def dataset(tmp_path):
    """A dataset of one's own, to damage: 10 records in 2 shards."""
    return tmp_path / "d", write_dataset(tmp_path / "d", train=10, holdout=0)


def test_an_empty_split_is_refused(dataset):
    directory, manifest = dataset
    with pytest.raises(DatasetError, match=naming(str(directory), "'holdout'")):
        RecordSource(directory, manifest, "holdout")


def test_a_missing_shard_is_named(dataset):
    directory, manifest = dataset
    lost = directory / manifest.shards["train"][1].file
    lost.unlink()
    with pytest.raises(DatasetError, match=naming(str(lost), 5)):
        RecordSource(directory, manifest, "train")


@pytest.mark.parametrize("change", [lambda data: data[:-100], lambda data: data + b"x", lambda data: b""])
def test_a_shard_of_another_length_is_named(dataset, change):
    directory, manifest = dataset
    path = directory / manifest.shards["train"][0].file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DatasetError) as refusal:
        RecordSource(directory, manifest, "train")
    for word in (str(path), str(path.stat().st_size), "truncated", "python -m preprocess verify"):
        assert word in str(refusal.value)


def test_a_shard_with_another_number_of_records_is_named(dataset):
    directory, manifest = dataset
    first, second = manifest.shards["train"]
    wrong = dataclasses.replace(
        manifest, shards={"train": (dataclasses.replace(first, records=4), second), "holdout": ()}
    )
    with pytest.raises(DatasetError) as refusal:
        RecordSource(directory, wrong, "train")
    assert first.file in str(refusal.value) and "5 records" in str(refusal.value)


def test_a_shard_that_is_no_array_record_is_named(dataset):
    directory, manifest = dataset
    path = directory / manifest.shards["train"][0].file
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DatasetError, match=path.name):
        source = RecordSource(directory, manifest, "train")
        source[0]


def test_a_damaged_record_is_named_by_shard_and_row_and_the_others_still_read(dataset):
    directory, manifest = dataset
    path = directory / manifest.shards["train"][1].file
    data = bytearray(path.read_bytes())
    at = bytes(data).index(make_record(7, UNEVEN_SIZES[7 % 3]).vision.tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    source = RecordSource(directory, manifest, "train")
    with pytest.raises(DatasetError) as refusal:
        source[7]
    assert f"{path} row 2 (record 7)" in str(refusal.value)
    assert source[6].key == make_record(6).key and source[8].key == make_record(8).key


def test_damage_that_comes_after_the_first_read_is_found(dataset):
    """Values are looked at once, the checksum of the bytes at every read."""
    directory, manifest = dataset
    source = RecordSource(directory, manifest, "train")
    wanted = source[1].vision.tobytes()
    assert source[1].vision.tobytes() == wanted
    path = directory / manifest.shards["train"][0].file
    at = path.read_bytes().index(wanted)
    with path.open("r+b") as file:  # in place: the file that the source has open
        file.seek(at)
        file.write(bytes([wanted[0] ^ 1]))
    with pytest.raises(DatasetError, match=rf"{path.name} row 1 \(record 1\)"):
        source[1]


def test_a_record_of_another_text_width_is_named(dataset):
    directory, manifest = dataset
    wider = manifest.encoders | {"text": dataclasses.replace(manifest.text, width=TEXT_WIDTH + 3)}
    other = dataclasses.replace(manifest, encoders=wider)
    with pytest.raises(DatasetError, match=r"row 0 \(record 0\).*\b11\b"):
        RecordSource(directory, other, "train")[0]


def test_damage_reaches_the_loop_as_a_dataset_error(dataset):
    directory, manifest = dataset
    path = directory / manifest.shards["train"][0].file
    write_shard(path, [b"rubbish"] + [encode_record(make_record(i)) for i in range(1, 5)])
    shard = dataclasses.replace(manifest.shards["train"][0], bytes=path.stat().st_size)
    manifest = dataclasses.replace(manifest, shards={"train": (shard, manifest.shards["train"][1])})
    with pytest.raises(DatasetError, match=f"{path.name} row 0"):
        read(RecordSource(directory, manifest, "train"), 3)


# ------------------------------------------------------------------------------------------------ on_corrupt


def flip(directory, *numbers):
    """Flips a bit in the payload of these training records of `write_dataset`; gives the manifest."""
    manifest = load_manifest(directory)
    for number in numbers:
        vision = make_record(number, UNEVEN_SIZES[number % 3]).vision.tobytes()
        for shard in manifest.shards["train"]:
            path = directory / shard.file
            data = bytearray(path.read_bytes())
            if (at := bytes(data).find(vision)) >= 0:
                data[at] ^= 1
                path.write_bytes(data)
    return manifest


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A dataset of 200 records of which 2 (the most that is passed over) are damaged."""
    directory = tmp_path_factory.mktemp("damaged") / "d"
    write_dataset(directory, train=200, holdout=0)
    return directory, flip(directory, 7, 130)


def skipping(damaged):
    return RecordSource(*damaged, "train", "skip")


def test_a_damaged_record_gives_its_place_to_the_next_of_its_epoch(damaged, package_log):
    bad = [make_record(i, UNEVEN_SIZES[i % 3]).vision.tobytes() for i in (7, 130)]
    undamaged = {make_record(i, UNEVEN_SIZES[i % 3]).vision.tobytes() for i in range(200)} - set(bad)
    source = skipping(damaged)
    for epoch in range(2):
        batch = whole(read(source, 50, start=200 * epoch))
        order = identity(batch)
        places = np.flatnonzero(batch["replaced"])
        assert len(places) == 2 and set(order) == undamaged
        for place in places:
            assert order[place] == order[(place + 1) % 200]
        assert batch["index"].tolist() == list(range(200 * epoch, 200 * epoch + 200))
    assert sorted(source.damaged) == [7, 130]
    named = [line for line in package_log if line.startswith("WARNING") and "damaged" in line]
    assert len(named) == 2
    first, second = (shard.file for shard in damaged[1].shards["train"])
    assert any(f"{first} row 7 (record 7)" in line for line in named)
    assert any(f"{second} row 30 (record 130)" in line for line in named)


def test_replacements_do_not_depend_on_split_threads_processes_or_start(damaged):
    expected = whole(read(skipping(damaged), 30, batch_size=20))
    assert expected["replaced"].sum() == 6
    for size in (1, 4, 15):
        assert tree_equal(whole(read(skipping(damaged), 600 // size, batch_size=size)), expected)
    assert tree_equal(whole(read(skipping(damaged), 30, batch_size=20, threads=4, prefetch=8)), expected)
    parts = [read(skipping(damaged), 30, batch_size=20, process=process, processes=2) for process in (0, 1)]
    assert tree_equal(whole([part[i] for i in range(30) for part in parts]), expected)
    for place in np.flatnonzero(expected["replaced"]).tolist():
        for start in (place - 1, place, place + 1):
            resumed = whole(read(skipping(damaged), 1, start=start, batch_size=5))
            for name, array in resumed.items():
                assert array.tobytes() == expected[name][start : start + 5].tobytes(), name


def test_damaged_records_at_an_epochs_end_and_side_by_side_are_replaced(tmp_path):
    write_dataset(tmp_path / "d", train=200, holdout=0)
    whole_epoch = identity(whole(read(RecordSource(tmp_path / "d", load_manifest(tmp_path / "d"), "train"), 50)))
    number = {make_record(i, UNEVEN_SIZES[i % 3]).vision.tobytes(): i for i in range(200)}
    manifest = flip(tmp_path / "d", *(number[whole_epoch[place]] for place in (198, 199)))
    batch = whole(read(RecordSource(tmp_path / "d", manifest, "train", "skip"), 50))
    assert np.flatnonzero(batch["replaced"]).tolist() == [198, 199]
    assert identity(batch) == whole_epoch[:198] + 2 * whole_epoch[:1]


@pytest.mark.parametrize(("records", "bound"), [(40, 1), (200, 2)])
def test_too_much_damage_stops_all_the_same(tmp_path, records, bound):
    write_dataset(tmp_path / "d", train=records, holdout=0)
    manifest = flip(tmp_path / "d", *range(10, 10 + bound))
    assert len(read(RecordSource(tmp_path / "d", manifest, "train", "skip"), records // 4)) == records // 4
    flip(tmp_path / "d", 5)
    with pytest.raises(DatasetError) as refusal:
        read(RecordSource(tmp_path / "d", manifest, "train", "skip"), records // 4)
    assert re.search(naming(bound + 1, records, bound, "'train'", "row", "--repair"), str(refusal.value))


def test_without_skip_the_message_tells_of_it(damaged):
    with pytest.raises(DatasetError, match=naming("row", "python -m preprocess verify --repair", "on_corrupt=skip")):
        read(RecordSource(*damaged, "train"), 50)
    with pytest.raises(ValueError, match=naming("on_corrupt", "'ignore'", "stop, skip")):
        RecordSource(*damaged, "train", "ignore")


def test_a_choice_of_records_leaves_the_damaged_out(damaged):
    source = skipping(damaged)
    assert [number for number, _ in source.iter_valid([5, 6, 7, 8, 130])] == [5, 6, 8]
    with pytest.raises(DatasetError, match=naming(str(damaged[0]), "'train'")):
        list(source.iter_valid([7, 130]))
    with pytest.raises(DatasetError, match="row 7"):
        list(RecordSource(*damaged, "train").iter_valid([5, 6, 7, 8]))


def nan(array):
    changed = array.copy()
    changed.reshape(-1)[array.size // 2] = np.nan
    return changed


def conditions(record, **changed):
    return {"conditions": record.conditions | changed}


UNFIT = {
    "latent.*finite": lambda r: {"latent": nan(r.latent)},
    "text.*finite": lambda r: conditions(r, text=nan(r.text)),
    "vision.*finite": lambda r: conditions(r, vision=r.vision * np.float32("inf")),
    r"vision.*norm.*\b0\.0": lambda r: conditions(r, vision=r.vision * 0),
    r"vision.*norm.*\b2\.0": lambda r: conditions(r, vision=r.vision * 2),
    r"vision.*\b1\b": lambda r: conditions(r, vision=np.ones(1, np.float32)),
    "64x64.*bucket": lambda r: {
        "latent": np.ones((CHANNELS, 8, 8), BF16),
        "encoded_size": (64, 64),
    },
    "latent.*2, 2.*32x32": lambda r: {"latent": np.ones((CHANNELS, 2, 2), BF16)},
    "latent.*5, 4, 4": lambda r: {"latent": np.ones((5, 4, 4), BF16)},
    r"text.*\b6\b.*\b5\b|\b6\b.*text.*\b5\b": lambda r: conditions(r, text=np.ones((6, TEXT_WIDTH), BF16)),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_record_that_another_program_wrote_wrong_is_damaged_too(dataset, what):
    """Its checksum is right: only its content tells. `encode_record` would refuse to write most of these."""
    directory, manifest = dataset
    written = [make_record(i) for i in range(5)]
    written[2] = dataclasses.replace(written[2], **UNFIT[what](written[2]))
    path = directory / manifest.shards["train"][0].file
    write_shard(path, [serialize_unchecked(record) for record in written])
    shard = dataclasses.replace(manifest.shards["train"][0], bytes=path.stat().st_size)
    manifest = dataclasses.replace(manifest, shards={"train": (shard, manifest.shards["train"][1])})
    source = RecordSource(directory, manifest, "train")
    for _ in range(2):  # it stays damaged
        with pytest.raises(DatasetError, match=rf"row 2 \(record 2\).*{what}"):
            source[2]
    source = RecordSource(directory, manifest, "train", "skip")
    batch = whole(read(source, 5, batch_size=2))
    assert list(source.damaged) == [2] and batch["replaced"].sum() == 1
    assert np.isfinite(batch["latent"].astype(np.float32)).all()
