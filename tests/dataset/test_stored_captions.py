"""Several captions of one picture: which one a sample is trained on, by (seed, sample number)."""

from __future__ import annotations

import collections
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from training_helpers import (
    UNEVEN_SIZES,
    batch_layout,
    joined,
    make_record,
    read_batches,
    tree_equal,
    write_config,
    write_dataset,
)
from training_helpers import tiny_config as make_config

from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.captions import draw
from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.loader.reader import RecordSource, batches
from fluxdit_jax.run import run_directory
from fluxdit_jax.train import train

pytest_plugins = ("training_fixtures",)

COUNTS = (1, 3, 2, 5)  # captions of record i, counted round


# ------------------------------------------------------------------------------------------------ the draw


def shares(weights, count):
    """What `draw` is to give, in closed form."""
    known = [*weights[:count]] or [1.0]
    known += known[-1:] * (count - len(known))
    return np.array(known) / sum(known)


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
@pytest.mark.parametrize(
    ("weights", "count"),
    [
        ((), 1), ((), 5), ((3.0,), 4), ((1.0, 0.5), 2), ((1.0, 0.5), 4), ((0.0, 1.0), 3), ((1, 0), 4),
        ((2.0, 0.0, 1.0), 3), ((5e-324, 5e-324), 2), ((1e6, 1e-6), 2), ((1.0,) * 100, 100), ((9.0, 1.0, 1.0, 7.0), 2),
    ],
)  # fmt: skip
def test_captions_are_drawn_as_often_as_their_weights_say(seed, weights, count):
    total = 20_000
    found = collections.Counter(draw(seed, number, count, weights) for number in range(total))
    expected = shares(weights, count)
    assert set(found) <= set(np.flatnonzero(expected))
    for caption, share in enumerate(expected):
        deviation = math.sqrt(total * share * (1 - share))
        assert abs(found[caption] - total * share) <= 5 * deviation, caption
    met = expected > 0
    chi = sum((found[int(k)] - total * expected[k]) ** 2 / (total * expected[k]) for k in np.flatnonzero(met))
    freedom = int(met.sum()) - 1
    assert chi <= freedom + 6 * math.sqrt(2 * freedom) + 6


def test_draws_of_neighbours_of_seeds_and_of_numbers_are_independent():
    table = np.array([[draw(seed, number, 2) for number in range(4000)] for seed in range(4)])
    for one, two in [*itertools.combinations(table, 2), *((row[1:], row[:-1]) for row in table)]:
        assert abs((one == two).mean() - 0.5) < 5 * 0.5 / math.sqrt(len(one))


@pytest.mark.parametrize("weights", [(0.0,), (0.0, 0.0, 1.0)])
def test_where_all_weights_are_zero_it_is_the_first(weights):
    assert {draw(0, number, 2, weights) for number in range(100)} == {0}


def test_the_draw_is_pinned():
    """Another draw would make a resumed run meet other captions than before: a change must be made on purpose."""
    assert [draw(3, number, 4, (1.0, 0.5)) for number in range(12)] == [0, 1, 1, 3, 2, 3, 2, 3, 3, 1, 3, 1]


# ------------------------------------------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """24 training and 6 holdout records of 1, 3, 2 and 5 captions."""
    directory = tmp_path_factory.mktemp("captions") / "mixed"
    write_dataset(directory, captions=COUNTS)
    return directory


@pytest.fixture(scope="module")
def source(mixed):
    return RecordSource(mixed, load_manifest(mixed), "train")


def read(source, count, **changes):
    """The first `count` micro-batches from a position, joined."""
    return joined(read_batches(source, count, **changes))


def met(batch):
    """(record, caption, both from 0) of each row, by the vision vector and the tokens."""
    known = [make_record(i, UNEVEN_SIZES[i % 3], captions=COUNTS[i % 4]) for i in range(24)]
    by_vision = {record.vision.tobytes(): number for number, record in enumerate(known)}
    found = []
    for vision, text, length in zip(batch["vision"], batch["text"], batch["text_length"]):
        number = by_vision[vision.tobytes()]
        texts = [tokens.tobytes() for tokens in known[number].texts]
        found.append((number, texts.index(text[:length].tobytes())))
        assert not text[length:].any()
    return found


def test_a_sample_meets_the_caption_of_its_seed_and_number(source):
    weights = (2.0, 1.0)
    batch = read(source, 60, caption_weights=weights)
    found = met(batch)
    for index, (record, caption) in zip(batch["index"].tolist(), found, strict=True):
        assert caption == draw(3, index, COUNTS[record % 4], weights)
    assert {caption for record, caption in found if record % 4 == 3} == set(range(5))
    assert [c for _, c in met(read(source, 60, seed=4))] != [c for _, c in met(read(source, 60))]


def test_all_captions_are_met_over_the_epochs_as_often_as_the_weights_say(source):
    epochs = 60
    found = collections.Counter(met(read(source, 6 * epochs, caption_weights=(3.0, 1.0))))
    for record in range(24):
        expected = shares((3.0, 1.0), COUNTS[record % 4])
        assert sum(found[record, caption] for caption in range(len(expected))) == epochs
        for caption, share in enumerate(expected):
            assert abs(found[record, caption] - epochs * share) <= 5 * math.sqrt(epochs * share), caption


@pytest.mark.parametrize("weights", [(), (1.0, 0.25)])
def test_captions_do_not_depend_on_split_threads_processes_or_start(source, weights):
    expected = read(source, 5, batch_size=24, caption_weights=weights)
    for size in (1, 3, 12):
        assert tree_equal(read(source, 120 // size, batch_size=size, caption_weights=weights), expected)
    assert tree_equal(read(source, 5, batch_size=24, threads=4, prefetch=8, caption_weights=weights), expected)
    parts = [
        batches(
            source, seed=3, start=0, batch_size=24, layout=batch_layout(), threads=1, prefetch=1,
            caption_weights=weights, process=process, processes=3,
        )
        for process in range(3)
    ]  # fmt: skip
    together = [next(part) for _ in range(5) for part in parts]
    assert tree_equal({name: np.concatenate([p[name] for p in together]) for name in expected}, expected)
    for start in (1, 7, 23, 24, 100):
        resumed = read(source, 4, start=start, batch_size=5, caption_weights=weights)
        for name, array in resumed.items():
            assert array.tobytes() == expected[name][start : start + 20].tobytes(), name


def test_with_one_caption_every_batch_is_the_same_whatever_the_weights(tiny_dataset):
    source = RecordSource(tiny_dataset, load_manifest(tiny_dataset), "train")
    expected = read(source, 12)
    for weights in ((0.0, 1.0), (1.0,), (0.3, 0.0, 7.0)):
        assert tree_equal(read(source, 12, caption_weights=weights), expected)


def test_what_stands_in_for_damage_meets_the_caption_of_the_sample(tmp_path):
    manifest = write_dataset(tmp_path, captions=COUNTS)
    shard = tmp_path / manifest.shards["train"][0].file
    data = shard.read_bytes()
    at = data.index(make_record(5, UNEVEN_SIZES[2], captions=3).vision.tobytes())
    shard.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    batch = read(RecordSource(tmp_path, manifest, "train", "skip"), 30)
    assert batch["replaced"].sum() == 5
    for index, (record, caption) in zip(batch["index"].tolist(), met(batch), strict=True):
        assert caption == draw(3, index, COUNTS[record % 4])


# ------------------------------------------------------------------------------------------------ the command


def losses(workdir: Path) -> dict[int, float]:
    from fluxdit_jax.run.metrics import read_metrics

    return {e["step"]: e["loss"] for e in read_metrics(workdir / "metrics.jsonl") if "loss" in e}


def test_weights_on_the_command_line_decide_and_are_kept(mixed, tmp_path, train_command, quick_compile):
    def config(workdir: str, **changes):
        c = make_config(mixed, tmp_path / workdir)
        c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
        return c

    file = write_config(tmp_path / "config.py", config("b"))
    done = train_command.run("--config.data.caption_weights=(1.0, 0.5)", "--config.train.steps=4", config=file)
    assert done.returncode == 0, done.stderr
    assert train(config("a", train__steps=4)) == train(config("c", data__caption_weights=(1.0, 0.5))) == 0
    with pytest.raises(run_directory.RunError, match=r"data\.caption_weights: \(1\.0, 0\.5\) -> \(\)"):
        train(config("b"))
    assert train(config("b", data__caption_weights=(1, 0.5), data__micro_batch_size=8)) == 0
    assert losses(tmp_path / "a")[4] != losses(tmp_path / "c")[4]
    one, two = losses(tmp_path / "b"), losses(tmp_path / "c")
    assert one.keys() == two.keys() and len(one) == 8
    assert all(one[step] == pytest.approx(two[step], rel=1e-5) for step in two)
    assert run_directory.load_config(tmp_path / "c").data.caption_weights == (1.0, 0.5)
    with pytest.raises(ConfigError, match=r"config\.data\.caption_weights"):
        train(config("d", data__caption_weights=(math.nan, 1.0)))
    assert not (tmp_path / "d").exists()
