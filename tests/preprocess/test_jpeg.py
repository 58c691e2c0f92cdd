"""A JPEG without its end is read if no pixel is missing, and never if one is."""

from __future__ import annotations

import numpy as np
import pytest
from image_fixtures import LIMITS, encode, whole
from PIL import Image

from preprocess.decoding.images import Rejected, decode, read_header

WAYS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "4:4:4": {"subsampling": 0, "quality": 95},
    "optimized": {"optimize": True, "quality": 100},
    "restart after rows": {"restart_marker_rows": 1},
    "restart after blocks": {"restart_marker_blocks": 1},
    "progressive, restarts": {"progressive": True, "restart_marker_blocks": 3},
}


@pytest.fixture(scope="module")
def photo(draw_photo) -> Image.Image:
    return Image.fromarray(draw_photo(90, 130, 3))


def read_or_none(data: bytes) -> np.ndarray | None:
    try:
        header = read_header(data, LIMITS)
    except Rejected as rejected:  # Pillow 12, where the first scan's own header is cut
        assert rejected.reason == "not an image"
        return None
    try:
        return decode(data, header, (header.height, header.width), "resize").pixels
    except Rejected as rejected:
        assert rejected.reason == "damaged image"
        return None


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("way", WAYS)
def test_only_the_end_is_missing(way: str, mode: str, photo: Image.Image) -> None:
    data = encode(photo.convert(mode), "JPEG", **WAYS[way])
    assert data.endswith(b"\xff\xd9")
    complete = whole(data)
    content = data[:-2]
    for lacking in (data[:-1], content, content + bytes(1), content + bytes(500), content + b"\xff"):
        np.testing.assert_array_equal(read_or_none(lacking), complete)
    for trailing in (b"\0" * 300, b"camera notes", b"\xff", data):
        np.testing.assert_array_equal(read_or_none(data + trailing), complete)


@pytest.mark.parametrize("way", WAYS)
def test_missing_pixels_are_never_made_up(way: str, photo: Image.Image) -> None:
    data = encode(photo, "JPEG", **WAYS[way])
    complete, refused = whole(data), 0
    scan = data.rindex(b"\xff\xda")
    for cut in [*range(3, 12), 20, 40, 100, 300, 1000, len(data) - scan - 20, len(data) - scan]:
        for tail in (b"", b"\0" * cut, b"\0" * 3):
            pixels = read_or_none(data[:-cut] + tail)
            refused += pixels is None
            if pixels is not None:  # what was cut off says that nothing changes
                np.testing.assert_array_equal(pixels, complete)
    assert refused > 30


def test_a_file_cut_between_two_scans_lacks_the_next(photo: Image.Image) -> None:
    data = encode(photo, "JPEG", progressive=True)
    starts = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    assert len(starts) > 5
    for start in starts[1:]:
        end = max(data.rfind(b"\xff\xc4", 0, start), data.rfind(b"\xff\xda", 0, start - 1))
        between = end if data[end + 1] == 0xC4 else start  # before the tables of the scan, if it has any
        assert read_or_none(data[:between]) is None
        assert read_or_none(data[:start]) is None


def test_a_file_that_ends_between_restart_intervals_lacks_the_next(photo: Image.Image) -> None:
    data = encode(photo, "JPEG", restart_marker_blocks=1)
    scan = data.rindex(b"\xff\xda")
    marks = [i for i in range(scan, len(data)) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]
    assert len(marks) > 20
    for mark in marks[-9:]:
        assert read_or_none(data[:mark]) is None and read_or_none(data[: mark + 2]) is None
