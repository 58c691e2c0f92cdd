"""The sheet of a whole set: what stands in which cell, and in which frame."""

import dataclasses

import numpy as np
import pytest
from gate_pictures import plain, set_of

from fluxdit_jax.dataset.grid import Place
from fluxdit_jax.gate.sheet import ROWS, draw_sheet
from fluxdit_jax.gate.verdict import Case, Verdict, not_judged

WORDS, HEAD, CELL, SIDE = 190, 24, 180, 84  # pixels: of the captions, of the names of the lights, of a cell, a picture
GREEN, RED, WHITE = (29, 127, 78), (192, 57, 43), (255, 255, 255)
# Two rows under two lights, of which one place is empty; the second row is wide.
TRUE = [plain((40, 0, 0)), plain((80, 0, 0)), plain((120, 0, 0), 8, 16)]
SET = set_of(TRUE, ["one", "one", "two"], [Place("p", "a", "dim"), Place("p", "a", "warm"), Place("q", "a", "warm")])
TESTS = ("memorisation", "vision_swap", "text_edit")


def case(answer: int, passed: bool, colour: tuple[int, int, int], size=(8, 8)) -> Case:
    return Case("", "", 0.0, passed, (("original", plain(0)), ("drawn", plain(colour, *size))), answer)


def verdict(name: str, *cases: Case) -> Verdict:
    return Verdict(name, name, "?", 1.0, 0.9, "", {}, (), (), cases)


def sheet(*cases_by_test: tuple[Case, ...]) -> np.ndarray:
    drawn = draw_sheet(SET, [verdict(name, *cases) for name, cases in zip(TESTS, cases_by_test)])
    assert drawn is not None and drawn.dtype == np.uint8
    return drawn


def place(row: int, light: int, x: int = 0, y: int = 0) -> tuple[int, int]:
    """Top left corner, (y, x), of a picture of a cell: x to the right and y down."""
    return HEAD + row * CELL + y * SIDE, WORDS + light * CELL + x * SIDE


def middle(image: np.ndarray, corner: tuple[int, int]) -> tuple[int, ...]:
    return tuple(int(v) for v in image[corner[0] + SIDE // 2, corner[1] + SIDE // 2])


def frame(image: np.ndarray, corner: tuple[int, int]) -> set[tuple[int, ...]]:
    """Colours on the outermost pixels of a square picture."""
    part = image[corner[0] : corner[0] + SIDE, corner[1] : corner[1] + SIDE].astype(int)
    edge = np.concatenate([part[0], part[-1], part[:, 0], part[:, -1]])
    return {tuple(int(v) for v in pixel) for pixel in edge}


def box(image: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(first row, last row, first column, last column) of the pixels of a colour."""
    rows, columns = np.nonzero((image == np.uint8(colour)).all(-1))
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


def test_rows_are_photographs_and_columns_lights():
    image = sheet((), (), ())
    assert image.shape == (HEAD + 2 * CELL, WORDS + 2 * CELL, 3)
    assert [middle(image, place(0, 0)), middle(image, place(0, 1))] == [(40, 0, 0), (80, 0, 0)]
    assert middle(image, place(1, 1)) == (120, 0, 0) and middle(image, place(1, 0)) == WHITE
    assert (image[: HEAD - 4, WORDS:] < 128).any() and (image[HEAD:, :WORDS] < 128).any()  # lights and captions
    assert frame(image, place(0, 0)) == {WHITE}
    for x, y in ((1, 0), (0, 1), (1, 1)):
        assert middle(image, place(0, 0, x, y)) == WHITE  # nothing was drawn


def test_what_was_drawn_stands_beside_the_truth_that_it_should_be():
    image = sheet(
        (case(0, True, (0, 10, 0)), case(1, False, (0, 20, 0))),
        (case(1, True, (0, 0, 10)),),
        (case(0, False, (0, 0, 20)),),
    )
    for corner, colour, edge in (
        (place(0, 0, 1, 0), (0, 10, 0), GREEN),
        (place(0, 1, 1, 0), (0, 20, 0), RED),
        (place(0, 1, 0, 1), (0, 0, 10), GREEN),
        (place(0, 0, 1, 1), (0, 0, 20), RED),
    ):
        assert middle(image, corner) == colour and frame(image, corner) == {edge}
    assert middle(image, place(0, 0, 0, 1)) == middle(image, place(0, 1, 1, 1)) == WHITE  # not asked for


def test_a_frame_of_three_pixels_is_around_the_picture_whatever_its_shape():
    wide = case(2, True, (0, 30, 0), (8, 16))
    y, x = place(1, 1, 1, 0)
    image = sheet((case(0, False, (0, 10, 0)), wide), (), ())
    assert box(image, GREEN) == (y + 19, y + 63, x, x + 83) and box(image, (0, 30, 0)) == (
        y + 22,
        y + 60,
        x + 3,
        x + 80,
    )
    y, x = place(0, 0, 1, 0)
    assert box(image, RED) == (y, y + 83, x, x + 83)
    assert box(image, (0, 10, 0)) == (y + 3, y + 80, x + 3, x + 80)


def test_a_row_has_its_name_and_below_it_its_caption():
    image = sheet((), (), ())
    soft = (106, 112, 122)
    for row in (0, 1):
        words = image[HEAD + row * CELL : HEAD + (row + 1) * CELL, :WORDS]
        (_, name_ends, _, _), (caption_starts, _, left, _) = box(words, soft), box(words, (0, 0, 0))
        assert name_ends < caption_starts < 40 and left < 20
    long = set_of(TRUE[:1], ["word " * 100], [Place("p", "a", "dim")])
    drawn = draw_sheet(long, [verdict(name) for name in TESTS])
    assert box(drawn[HEAD:, :WORDS], (0, 0, 0))[1] < 130 and (drawn[HEAD:, WORDS - 4 : WORDS] == 255).all()


def test_of_several_cases_the_first_is_shown():
    image = sheet((), (case(0, False, (0, 0, 10)), case(0, True, (0, 0, 20))), ())
    assert middle(image, place(0, 0, 0, 1)) == (0, 0, 10) and frame(image, place(0, 0, 0, 1)) == {RED}


def test_a_test_that_is_not_judged_leaves_its_place_empty():
    unjudged = [not_judged(name, name, "?", 0.8, "") for name in TESTS[1:]]
    image = draw_sheet(SET, [verdict("memorisation", case(0, True, (0, 10, 0))), *unjudged])
    assert middle(image, place(0, 0, 1, 0)) == (0, 10, 0) and middle(image, place(0, 0, 0, 1)) == WHITE


def test_a_set_that_is_no_grid_has_no_sheet():
    bare = dataclasses.replace(SET, grid={})
    assert draw_sheet(bare, [verdict(name) for name in TESTS]) is None


@pytest.mark.parametrize(("photographs", "rows"), [(ROWS, ROWS), (ROWS + 1, ROWS)])
def test_a_large_set_shows_its_first_rows(photographs, rows):
    places = [Place(f"p{k}", "a", "l") for k in range(photographs)]
    large = set_of([plain(5 * k) for k in range(photographs)], places=places)
    image = draw_sheet(large, [verdict(name) for name in TESTS])
    assert image.shape == (HEAD + rows * CELL, WORDS + CELL, 3)
    assert middle(image, place(rows - 1, 0)) == (5 * (rows - 1),) * 3


def test_captions_of_any_script_are_written():
    """Not as the same empty boxes: a character that no font has is written as its code point."""
    first, second = (
        draw_sheet(set_of(TRUE[:1], [text], [Place("p", "a", "dim")]), [verdict(name) for name in TESTS])
        for text in ("\u5c71", "\u5ddd")
    )
    assert first is not None and second is not None and (first != second).any()
