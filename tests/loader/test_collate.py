"""Micro-batches of records: patches, padding, and the memory that is used again."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import (
    CHANNELS,
    TEXT_WIDTH,
    UNEVEN_SIZES,
    VISION_WIDTH,
    batch_layout,
    make_record,
    tree_equal,
)

from fluxdit_jax.dataset.captions import draw
from fluxdit_jax.dataset.fields import BF16
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.loader.batch_memory import BatchMemory
from fluxdit_jax.loader.reader import collate, with_drawn_caption
from fluxdit_jax.model.patches import patchify, unpatchify


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_unpatchify_is_the_inverse_of_patchify(rows, columns, channels, patch):
    latent = np.arange(channels * rows * columns * patch**2, dtype=np.float32)
    latent = latent.reshape(channels, rows * patch, columns * patch)
    tokens = patchify(latent, patch)
    assert tokens.shape == (rows * columns, patch**2 * channels)
    padded = np.concatenate([tokens, np.full((3, tokens.shape[1]), -1, np.float32)])
    np.testing.assert_array_equal(unpatchify(padded, (rows, columns), patch), latent)


def test_the_layout_of_a_patch():
    latent = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    tokens = patchify(latent, 2)
    for token in range(6):
        row, column = divmod(token, 3)
        expected = [latent[c, 2 * row + y, 2 * column + x] for y in range(2) for x in range(2) for c in range(2)]
        assert tokens[token].tolist() == expected


def test_collate_pads_with_zeros_and_cuts_the_text():
    records = [make_record(i, UNEVEN_SIZES[i % 3]) for i in range(5)]  # texts of 1, 2, 3, 4, 5 tokens
    batch = collate(records, [7, 8, 9, 10, 11], batch_layout(6, 3))
    assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
        "latent": (BF16, (5, 6, 4 * CHANNELS)),
        "grid": (np.int32, (5, 2)),
        "text": (BF16, (5, 3, TEXT_WIDTH)),
        "text_length": (np.int32, (5,)),
        "vision": (np.float32, (5, VISION_WIDTH)),
        "index": (np.uint32, (5,)),
        "replaced": (bool, (5,)),
    }
    assert batch["text_length"].tolist() == [1, 2, 3, 3, 3]
    assert batch["index"].tolist() == [7, 8, 9, 10, 11] and not batch["replaced"].any()
    assert batch["grid"].tolist() == [[2, 2], [1, 3], [3, 1], [2, 2], [1, 3]]
    for row, record in enumerate(records):
        count = int(batch["grid"][row].prod())
        np.testing.assert_array_equal(batch["latent"][row, :count], patchify(record.latent, 2))
        assert not batch["latent"][row, count:].any()
        length = batch["text_length"][row]
        np.testing.assert_array_equal(batch["text"][row, :length], record.text[:length])
        assert not batch["text"][row, length:].any()


@pytest.mark.parametrize(("size", "tokens"), [((3, 4), 4), ((4, 3), 4), ((4, 6), 4)])
def test_a_latent_that_does_not_fit_is_named(size, tokens):
    with pytest.raises(DatasetError) as refusal:
        collate([make_record(3, size)], [0], batch_layout(tokens, 4))
    for word in ("image_003.png", f"{size[1]}x{size[0]}", "side 2"):
        assert word in str(refusal.value)


@pytest.mark.parametrize("patch", [1, 3])
def test_patches_of_any_side_hold_its_square_of_values_of_each_channel(patch):
    record = make_record(2, (6, 3))
    batch = collate([record], [0], batch_layout(18, 5, patch))
    tokens = 18 // patch**2
    assert batch["latent"].shape == (1, 18, CHANNELS * patch**2)
    assert batch["grid"].tolist() == [[6 // patch, 3 // patch]]
    np.testing.assert_array_equal(batch["latent"][0, :tokens], patchify(record.latent, patch))
    assert not batch["latent"][0, tokens:].any()


def test_a_sample_has_the_one_caption_that_is_drawn_for_it():
    one, three = make_record(0), make_record(1, captions=3)
    assert with_drawn_caption(one, 5, 7, ()) is one
    met = set()
    for number in range(50):
        drawn = draw(5, number, 3, (1.0, 2.0))
        found = with_drawn_caption(three, 5, number, (1.0, 2.0))
        assert found.captions == (three.captions[drawn],) and len(found.texts) == 1
        assert found.text is three.texts[drawn] and found.latent is three.latent
        met.add(drawn)
    assert met == {0, 1, 2}


def test_memory_used_again_is_padded_with_zeros_and_cannot_be_written():
    sizes = ((4, 4), (2, 2))
    memory = BatchMemory(2, batch_layout(6, 5).shapes(2), 2)
    for numbers in ((4, 3), (0, 1), (3, 0), (1, 4)):  # long texts and short ones, in either row
        records = [make_record(i, sizes[i % 2]) for i in numbers]
        batch = collate(records, [0, 1], batch_layout(6, 5), memory=memory)
        assert tree_equal(batch, collate(records, [0, 1], batch_layout(6, 5)))
        for array in batch.values():
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0
        with pytest.raises(DatasetError, match="8x8"):
            collate([records[0], make_record(9, (8, 8))], [0, 1], batch_layout(6, 5), memory=memory)
        del batch, array


@pytest.mark.parametrize(
    "uses",
    [
        ((0, (4, 6)), (0, (2, 2))),  # number, whose text has 1 + number % 5 tokens, and the size of the latent
        ((4, (2, 2)), (0, (2, 2))),
        ((4, (2, 2)), (0, (4, 6)), (0, (2, 2))),
        ((0, (4, 6)), (4, (2, 2)), (0, (2, 4))),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_padding_is_zero_whatever_was_there(uses, fails):
    memory = BatchMemory(2, batch_layout(6, 5).shapes(2), 2)
    addresses = set()
    for number, size in uses:
        records = [make_record(number, size), make_record(0, (2, 2))]
        batch = collate(records, [0, 1], batch_layout(6, 5), memory=memory)
        addresses.add(batch["latent"].ctypes.data)
        assert tree_equal(batch, collate(records, [0, 1], batch_layout(6, 5)))
        del batch
        if fails:  # after its first row is full
            with contextlib.suppress(DatasetError):
                collate([make_record(4, (4, 6)), make_record(9, (8, 8))], [0, 1], batch_layout(6, 5), memory=memory)
    assert len(addresses) == 1  # one memory for all
