"""Sheets of pictures: every picture in its row and column, upright, in its own shape; decoding in order."""

from __future__ import annotations

import numpy as np

from fluxdit_jax.shared import image_grid
from fluxdit_jax.vae.decoder import decode_all
from preprocess.encoders.builtin import DctVae

MARGIN, CELL = 6, 40


def flat(height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def test_a_sheet_fits_each_picture_into_its_cell() -> None:
    wide = flat(10, 20, (200, 0, 0))
    wide[:, :10] = 0, 200, 0  # its left half
    rows = [[wide, flat(20, 20, (0, 0, 200))], [flat(20, 10, (90, 90, 0)), flat(80, 80, (0, 90, 90))]]
    rows[1].append(flat(8, 8, (7, 7, 7)))
    sheet = np.asarray(image_grid.grid(rows, cell=CELL))
    step = CELL + MARGIN
    assert sheet.shape == (2 * step + MARGIN, 3 * step + MARGIN, 3)

    def at(row: int, column: int, down: float, right: float) -> tuple[int, ...]:
        y, x = (MARGIN + place * step + round(share * CELL) for place, share in ((row, down), (column, right)))
        return tuple(int(value) for value in sheet[y, x])

    paper = tuple(int(value) for value in sheet[0, 0])
    assert at(0, 0, 0.5, 0.2) == (0, 200, 0) and at(0, 0, 0.5, 0.8) == (200, 0, 0)
    assert at(0, 0, 0.1, 0.5) == at(0, 0, 0.9, 0.5) == paper, "a wide picture leaves room above and below"
    assert at(1, 0, 0.1, 0.5) == (90, 90, 0) and at(1, 0, 0.5, 0.1) == at(1, 0, 0.5, 0.9) == paper
    assert (at(0, 1, 0.5, 0.5), at(1, 1, 0.05, 0.95)) == ((0, 0, 200), (0, 90, 90))
    assert at(1, 2, 0.5, 0.5) == (7, 7, 7) and at(0, 2, 0.5, 0.5) == paper


def test_titles_make_room_for_themselves() -> None:
    rows = [[flat(8, 8, (200, 0, 0))], [flat(8, 8, (0, 200, 0))]]
    plain = np.asarray(image_grid.grid(rows, cell=CELL))
    titled = np.asarray(image_grid.grid(rows, cell=CELL, column_titles=["above"], row_titles=["first", "second"]))
    top, left = (titled.shape[axis] - plain.shape[axis] for axis in range(2))
    assert top > 0 and left > 0
    np.testing.assert_array_equal(titled[top + MARGIN :, left + MARGIN :], plain[MARGIN:, MARGIN:])
    above = [(titled[a:b, :left] < 100).any() for a, b in ((top, top + CELL), (top + CELL + MARGIN, None))]
    assert above == [True, True] and (titled[:top, left:] < 100).any()


def test_latents_of_mixed_sizes_are_decoded_in_order() -> None:
    rng, vae = np.random.default_rng(0), DctVae()
    sizes = [(2, 4), (4, 2), (2, 4), (3, 3), (4, 2)]
    latents = [rng.normal(size=(16, *size)).astype(np.float32) / 4 for size in sizes]
    for latent, image in zip(latents, decode_all(vae, latents), strict=True):
        assert image.shape == (8 * latent.shape[1], 8 * latent.shape[2], 3)
        np.testing.assert_array_equal(image, vae.decode(latent[None])[0])
