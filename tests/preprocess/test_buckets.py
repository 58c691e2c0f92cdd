"""The bucket table and how pictures are brought to it."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from wording import naming

from preprocess import PreprocessError
from preprocess.buckets import (
    Geometry,
    bucket_table,
    default_modulus,
    distortion,
    enlargement,
    geometry,
    nearest,
    tokens,
)


@given(st.integers(8, 80), st.sampled_from([16, 32, 64]), st.floats(1, 6))
@settings(deadline=None)
def test_every_bucket_keeps_the_promises(cells: int, modulus: int, max_aspect: float) -> None:
    resolution = cells * modulus
    table = bucket_table(resolution, modulus, max_aspect)
    assert (resolution, resolution) in table
    for height, width in table:
        assert height % modulus == width % modulus == 0
        assert 0.94 * resolution**2 <= height * width <= resolution**2
        assert max(height, width) <= max_aspect * min(height, width)
        assert (width, height) in table
    assert len(set(table)) == len(table)
    assert [w / h for h, w in table] == sorted(w / h for h, w in table)


def test_the_production_table() -> None:
    table = bucket_table(1024, 64)
    assert len(table) == 23 and table[0] == (2048, 512) and table[-1] == (512, 2048)
    assert max(tokens(size) for size in table) == tokens((1024, 1024)) == 4096
    # Photographs in the usual formats are bent by less than 4 %, and nothing within 4:1 by more than 12 %.
    for width, height in ((3, 2), (4, 3), (16, 9), (1, 1), (2, 3), (9, 16), (5, 4)):
        assert distortion((height * 100, width * 100), nearest(table, height, width)) < 1.04
    worst = max(distortion((1000, width), nearest(table, 1000, width)) for width in range(250, 4001))
    assert worst < 1.12


def test_the_demonstration_table() -> None:
    assert bucket_table(128, 16) == ((256, 64), (144, 112), (128, 128), (112, 144), (64, 256))


def test_limits_belong_to_what_is_allowed() -> None:
    assert bucket_table(16384, 16384) == ((16384, 16384),)
    assert bucket_table(64, 64, 1) == ((64, 64),)
    assert (752, 800) in bucket_table(800, 16)  # 94 % exactly
    assert (160, 16000) in bucket_table(1600, 16, 100) and (160, 16000) not in bucket_table(1600, 16, 99)
    assert (16000, 160) in bucket_table(1600, 160, 100)


@pytest.mark.parametrize(
    ("resolution", "modulus"),
    [(2048, 64), (1024, 64), (1023, 48), (768, 48), (512, 32), (511, 16), (256, 16), (128, 16)],
)
def test_default_modulus(resolution: int, modulus: int) -> None:
    assert default_modulus(resolution) == modulus


@pytest.mark.parametrize(
    ("resolution", "modulus", "aspect", "named"),
    [
        (1024, 24, 4, ["--modulus", 16, 24]),
        (1024, 0, 4, ["--modulus", 16, 0]),
        (32, 64, 4, ["--resolution", "--modulus", 64, 32]),
        (16385, 16, 1, ["--resolution", 16384, 16385]),
        (1024, 64, 0.5, ["--max-aspect", 1, 100, 0.5]),
        (1024, 64, 100.5, ["--max-aspect", 1, 100, 100.5]),
        (100, 64, 4, ["--resolution", "--modulus", 64, "94%", "100x100"]),
    ],
)
def test_impossible_tables_are_named(resolution: int, modulus: int, aspect: float, named: list) -> None:
    with pytest.raises(PreprocessError, match=naming(*named)):
        bucket_table(resolution, modulus, aspect)


SIZES = st.tuples(st.integers(16, 5000), st.integers(16, 5000))


@given(SIZES)
@settings(deadline=None)
def test_nearest_is_nearest_in_log_aspect(size: tuple[int, int]) -> None:
    table = bucket_table(1024, 64)
    chosen = nearest(table, *size)
    best = min(distortion(size, bucket) for bucket in table)
    assert distortion(size, chosen) <= best * (1 + 1e-9)


@given(SIZES, st.sampled_from(["resize", "crop", "pad"]))
@settings(deadline=None)
def test_geometry(size: tuple[int, int], fit: str) -> None:
    assume(max(size) <= 4 * min(size))
    bucket = nearest(bucket_table(512, 32), *size)
    plan = geometry(size, bucket, fit)
    left, top, right, bottom = plan.box
    assert 0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]
    if fit == "resize":
        assert plan.box == (0, 0, size[1], size[0]) and plan.size == bucket and plan.offset == (0, 0)
    if fit == "crop":
        assert plan.size == bucket and plan.offset == (0, 0)
        assert math.isclose((right - left) / (bottom - top), bucket[1] / bucket[0], rel_tol=1e-6)
        assert math.isclose(right - left, size[1]) or math.isclose(bottom - top, size[0])
        assert math.isclose(left + right, size[1]) and math.isclose(top + bottom, size[0])
    if fit == "pad":
        assert plan.box == (0, 0, size[1], size[0])
        assert plan.size[0] == bucket[0] or plan.size[1] == bucket[1]
        assert plan.offset == ((bucket[0] - plan.size[0]) // 2, (bucket[1] - plan.size[1]) // 2)


@pytest.mark.parametrize(
    ("fit", "size", "box", "inner", "offset"),
    [
        ("resize", (100, 300), (0, 0, 300, 100), (64, 128), (0, 0)),
        ("crop", (100, 300), (50, 0, 250, 100), (64, 128), (0, 0)),
        ("crop", (300, 200), (0, 100, 200, 200), (64, 128), (0, 0)),
        ("pad", (100, 300), (0, 0, 300, 100), (43, 128), (10, 0)),
        ("pad", (300, 200), (0, 0, 200, 300), (64, 43), (0, 42)),
    ],
)
def test_what_is_cut_or_filled_is_halved(fit: str, size: tuple, box: tuple, inner: tuple, offset: tuple) -> None:
    assert geometry(size, (64, 128), fit) == Geometry(box, inner, offset)


def test_enlargement() -> None:
    assert enlargement((512, 512), (1024, 1024)) == 2 and enlargement((2048, 2048), (1024, 1024)) == 0.5
    assert enlargement((256, 1024), (512, 512)) == 1 == enlargement((512, 512), (256, 1024))


def test_of_equally_near_buckets_the_largest_is_taken() -> None:
    assert nearest(((448, 448), (512, 512)), 100, 100) == (512, 512) == nearest(((512, 512), (448, 448)), 100, 100)
    # between the two in log aspect
    assert nearest(((200, 800), (512, 512)), 100, 200) == (512, 512) == nearest(((800, 200), (512, 512)), 200, 100)


def test_a_line_of_pixels_is_padded_and_not_lost() -> None:
    assert geometry((1, 5000), (64, 64), "pad").size == (1, 64) and geometry((5000, 1), (64, 64), "pad").size == (64, 1)
