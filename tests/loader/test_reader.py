"""Batches as a pure function of seed and position."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from training_helpers import UNEVEN_SIZES, batch_layout, identity, make_record, tree_equal, write_dataset
from training_helpers import joined as whole
from training_helpers import read_batches as read
from wording import naming

from fluxdit_jax.dataset.manifest import DatasetError, load_manifest
from fluxdit_jax.dataset.records import encode_record
from fluxdit_jax.dataset.shards import Shards
from fluxdit_jax.loader.reader import RecordSource, batches, collate, with_drawn_caption

pytest_plugins = ("training_fixtures",)

TRAIN = 24


@pytest.fixture(scope="module")
def source(tiny_dataset):
    return RecordSource(tiny_dataset, load_manifest(tiny_dataset), "train")


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
