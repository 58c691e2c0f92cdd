"""Batches as a pure function of seed and position, and damage told by shard and row."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from training_helpers import (
    CHANNELS,
    TEXT_WIDTH,
    UNEVEN_SIZES,
    batch_layout,
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
from fluxdit_jax.dataset.shards import Shards
from fluxdit_jax.loader.reader import RecordSource, batches, collate, with_drawn_caption

pytest_plugins = ("training_fixtures",)

TRAIN = 24


@pytest.fixture(scope="module")
def source(tiny_dataset):
    return RecordSource(tiny_dataset, load_manifest(tiny_dataset), "train")


def identity(batch):
    """Which record each row is, by its vision vector."""
    return [row.tobytes() for row in batch["vision"]]


# ------------------------------------------------------------------------------------------------ reading records


def test_records_come_back_as_they_were_written(source):
    assert len(source) == TRAIN
    for index in (0, 11, 12, 23):
        record, written = source[index], make_record(index, UNEVEN_SIZES[index % 3])
        assert record.key == written.key and record.caption == written.caption
        for name in ("latent", "text", "vision"):
            assert getattr(record, name).tobytes() == getattr(written, name).tobytes()


def test_splits_are_apart(tiny_dataset):
    holdout = RecordSource(tiny_dataset, load_manifest(tiny_dataset), "holdout")
    assert len(holdout) == 6
    assert holdout[0].key == make_record(1000).key


@pytest.mark.parametrize("index", [-1, TRAIN, 10**9])
def test_an_index_outside_is_an_index_error(source, index):
    with pytest.raises(IndexError, match=naming(index, TRAIN)):
        source[index]


@pytest.fixture
def dataset(tmp_path):
    """A dataset of one's own, to damage: 10 records in 2 shards."""
    return tmp_path / "d", write_dataset(tmp_path / "d", train=10, holdout=0)


def test_more_shards_than_files_may_be_open(tmp_path):
    """Read from several threads; the manifest's word is held against a shard when it is opened."""
    manifest = write_dataset(tmp_path, train=40, holdout=0, shards=20)
    entries = manifest.shards["train"]
    shards = Shards(tmp_path, entries, most_open=3)
    with ThreadPoolExecutor(4) as pool:
        places = [(number * 7 % 20, number % 2) for number in range(200)]
        found = list(pool.map(lambda place: shards.read(*place), places))
    for (shard, row), data in zip(places, found, strict=True):
        number = 2 * shard + row
        assert data == encode_record(make_record(number, UNEVEN_SIZES[number % 3]))
    files = [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]
    assert sum(str(tmp_path) in file for file in files) == 3
    late = Shards(tmp_path, (*entries[:3], dataclasses.replace(entries[3], records=9)), most_open=3)
    with pytest.raises(DatasetError, match=naming(entries[3].file, 2, 9)):
        late.read(3, 0)


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


# ------------------------------------------------------------------------------------------------ order


def test_every_record_once_an_epoch_and_another_order_in_the_next(source):
    epochs = [whole(read(source, 6, start=TRAIN * epoch)) for epoch in range(3)]
    names = {make_record(i).vision.tobytes() for i in range(TRAIN)}
    orders = [identity(epoch) for epoch in epochs]
    for order in orders:
        assert len(order) == TRAIN and set(order) == names
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert identity(whole(read(source, 6, seed=4))) != orders[0]
    assert orders[0] != [make_record(i).vision.tobytes() for i in range(TRAIN)]


def test_the_order_of_a_seed_is_pinned(source):
    """With another one, a run that goes on would meet some pictures twice in an epoch, and others never."""
    numbers = {make_record(i).vision.tobytes(): i for i in range(TRAIN)}
    order = [numbers[name] for name in identity(whole(read(source, 12, seed=3)))]
    first = [4, 22, 16, 7, 21, 3, 18, 19, 20, 0, 2, 23, 14, 8, 11, 10, 9, 6, 1, 12, 15, 5, 17, 13]
    second = [23, 1, 15, 7, 21, 10, 16, 4, 2, 12, 11, 20, 6, 17, 8, 3, 18, 9, 19, 5, 0, 22, 13, 14]
    assert order == first + second


def test_batches_cross_the_end_of_an_epoch_without_a_remainder(source):
    order = identity(whole(read(source, 10, batch_size=5)))
    assert len(set(order[:TRAIN])) == TRAIN and len(set(order[TRAIN : 2 * TRAIN])) == TRAIN


def test_the_index_is_the_position_in_the_run(source):
    batch = whole(read(source, 3, start=40))
    assert batch["index"].dtype == np.uint32
    assert batch["index"].tolist() == list(range(40, 52))


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (3, 8)])
def test_batches_do_not_depend_on_threads_and_prefetch(source, threads, prefetch):
    for a, b in zip(read(source, 9), read(source, 9, threads=threads, prefetch=prefetch), strict=True):
        assert tree_equal(a, b)


@pytest.mark.parametrize("patch", [1, 2])
def test_batches_are_the_records_of_the_order(source, patch):
    batch = whole(read(source, 4, batch_size=6, layout=batch_layout(16, 5, patch)))
    numbers = {make_record(i).vision.tobytes(): i for i in range(TRAIN)}
    for row, name in enumerate(identity(batch)):
        number = numbers[name]
        expected = collate([make_record(number, UNEVEN_SIZES[number % 3])], [row], batch_layout(16, 5, patch))
        for field, array in expected.items():
            assert array[0].tobytes() == batch[field][row].tobytes(), field


def test_batches_do_not_depend_on_the_split(source):
    big = whole(read(source, 2, batch_size=12))
    for size in (1, 3, 4, 6):
        assert tree_equal(whole(read(source, 24 // size, batch_size=size)), big)


@pytest.mark.parametrize("start", [0, 1, 7, 24, 100, 10**6])
def test_resuming_anywhere_gives_the_same_samples(source, start):
    from_before = whole(read(source, 3, start=max(0, start - 5), batch_size=5))
    skipped = start - max(0, start - 5)
    resumed = whole(read(source, 2, start=start, batch_size=5))
    for name, array in resumed.items():
        assert array.tobytes() == from_before[name][skipped : skipped + 10].tobytes(), name


def test_processes_read_disjoint_parts_of_the_same_batch(source):
    together = read(source, 4, batch_size=6)
    parts = [read(source, 4, batch_size=6, process=process, processes=3) for process in range(3)]
    for number, batch in enumerate(together):
        assert tree_equal(whole([part[number] for part in parts]), batch)


def test_memory_is_used_again_only_when_nothing_refers_to_it(source):
    stream = batches(source, seed=0, start=0, batch_size=4, layout=batch_layout(), threads=1, prefetch=1)
    held = [next(stream) for _ in range(6)]
    for first, second in itertools.combinations(held, 2):
        assert not any(np.shares_memory(first[name], second[name]) for name in first)
    copies = [{name: array.copy() for name, array in batch.items()} for batch in held]
    on_device = [jax.device_put(batch) for batch in held]  # JAX may not copy, but it keeps a reference
    one_array = held[0]["text"][1:, 2:]
    addresses = {batch["latent"].ctypes.data for batch in held}
    del held, first, second
    for _ in range(20):
        next(stream)
    for copied, placed in zip(copies, on_device, strict=True):
        assert all(np.asarray(placed[name]).tobytes() == copied[name].tobytes() for name in copied)
    assert one_array.tobytes() == copies[0]["text"][1:, 2:].tobytes()
    del on_device, placed, one_array
    gc.collect()
    later = {next(stream)["latent"].ctypes.data for _ in range(30)}
    assert later & addresses and len(later) < 10


def test_the_captions_of_a_batch_are_those_of_its_seed_positions_and_weights(tmp_path):
    manifest = write_dataset(tmp_path, train=8, holdout=0, captions=(1, 3))
    batch = whole(read(RecordSource(tmp_path, manifest, "train"), 6, start=3, caption_weights=(1.0, 3.0)))
    written = [make_record(i, UNEVEN_SIZES[i % 3], captions=(1, 3)[i % 2]) for i in range(8)]
    numbers = {record.vision.tobytes(): i for i, record in enumerate(written)}
    for row, name in enumerate(identity(batch)):
        record = with_drawn_caption(written[numbers[name]], 3, 3 + row, (1.0, 3.0))
        length = batch["text_length"][row]
        assert batch["text"][row, :length].tobytes() == record.text.tobytes()
