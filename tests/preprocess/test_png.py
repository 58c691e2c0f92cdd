"""What stands beside the pixels of a PNG neither keeps the picture out nor fills the memory."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from image_fixtures import (
    LIMITS,
    UPRIGHT,
    animated,
    corners,
    encode,
    four_quarters,
    png_chunk,
    read,
    whole,
    with_chunks,
)
from PIL import Image, ImageCms, PngImagePlugin

from preprocess.decoding.images import Rejected, decode, read_header
from preprocess.decoding.png import MAX_INFLATED, Png

PLAIN = encode(four_quarters())
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
NOISE = np.random.default_rng(0).integers(33, 126, 1_500_000, np.uint8).tobytes()


def damaged(chunk: bytes) -> bytes:
    return chunk[:-4] + bytes(byte ^ 255 for byte in chunk[-4:])


def profile_chunk(data: bytes) -> bytes:
    return png_chunk(b"iCCP", b"name\0\0" + zlib.compress(data))


@pytest.mark.parametrize(
    "chunks",
    [
        [png_chunk(b"tEXt", b"workflow\0" + NOISE)],
        [png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(NOISE))],
        [png_chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(NOISE))],
        [png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + NOISE)],
        [png_chunk(b"tEXt", b"part %d\0" % i + NOISE) for i in range(50)],
        [png_chunk(b"tEXt", b"k\0")] * 20_000,
        [png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100_000_000), 9))],
        [png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(100_000_000), 9))] * 3,
        [png_chunk(b"zTXt", b"k\0\7" + b"no such method")],
        [png_chunk(b"tEXt", b"\xff\xfe without a keyword")],
        [png_chunk(b"prVt", b"private")],
        [png_chunk(b"pHYs", b"short")],
        [damaged(png_chunk(b"tEXt", b"k\0text")), damaged(png_chunk(b"gAMA", struct.pack(">I", 100_000)))],
        [damaged(png_chunk(b"pHYs", bytes(9))), damaged(png_chunk(b"tRNS", bytes(6)))],
    ],
    ids=[
        "text",
        "zTXt",
        "iTXt",
        "XMP",
        "75 MB",
        "20,000",
        "bomb",
        "3 bombs",
        "method",
        "keyword",
        "private",
        "short",
    ]
    + ["checksum", "checksums"],
)
@pytest.mark.parametrize("behind", [False, True])
def test_chunks_beside_the_pixels(chunks: list[bytes], behind: bool) -> None:
    data = with_chunks(PLAIN, *chunks, behind=behind)
    np.testing.assert_array_equal(whole(data), np.asarray(four_quarters()))


def test_as_a_program_writes_it() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", NOISE.decode(), zip=True)
    info.add_itxt("prompt", "prompt \u96ea " * 300_000, zip=True)
    assert corners(whole(encode(four_quarters(), pnginfo=info))) == UPRIGHT


@pytest.mark.parametrize("size", [1_200_000, 8_000_000])
def test_a_large_profile_counts(size: int) -> None:
    red = Image.new("RGB", (32, 32), (250, 10, 10))
    swapped = SRGB.replace(b"rXYZ", b"tmp1").replace(b"bXYZ", b"rXYZ").replace(b"tmp1", b"bXYZ")
    found = read(encode(red, icc_profile=swapped + np.random.default_rng(0).bytes(size)))
    assert not found.profile_ignored and found.pixels[16, 16, 2] > 200 > 60 > found.pixels[16, 16, 0]


@pytest.mark.parametrize("content", [SRGB + bytes(MAX_INFLATED), b""], ids=["bomb", "empty"])
def test_a_profile_that_cannot_be_read_is_ignored_and_counted(content: bytes) -> None:
    found = read(with_chunks(PLAIN, profile_chunk(content)))
    assert found.profile_ignored and corners(found.pixels) == UPRIGHT


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "1"])
def test_a_missing_end_is_no_damage_and_missing_pixels_are(mode: str) -> None:
    noise = Image.effect_noise((48, 32), 80)
    data = encode(noise.quantize(8) if mode == "P" else noise.convert(mode))
    complete = whole(data)
    text = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(NOISE))
    for source in (data, with_chunks(data, text), with_chunks(data, text, behind=True)):
        end = source.rindex(b"IEND") - 4
        for lacking in (
            source[: end + 8],
            source[:end],
            source[:-1],
            source + b"\0" * 100,
            source + b"trailing",
        ):
            np.testing.assert_array_equal(whole(lacking), complete)
    refused = 0
    for cut in range(13, 60):
        for source in (data, with_chunks(data, text)):
            try:
                np.testing.assert_array_equal(whole(source[:-cut]), complete)
            except Rejected as rejected:
                assert rejected.reason == "damaged image"
                refused += 1
    assert refused > 20


def test_damaged_pixels_stay_refused() -> None:
    position = PLAIN.index(b"IDAT")
    for data in (PLAIN[: position + 12], PLAIN[: position + 20] + b"\0\0\0\0" + PLAIN[position + 24 :]):
        with pytest.raises(Rejected) as caught:
            whole(data)
        assert caught.value.reason == "damaged image"
    size = png_chunk(b"IHDR", PLAIN[16:29])
    with pytest.raises(Rejected):
        whole(PLAIN.replace(size, damaged(size)))


def test_a_sound_file_is_given_on_as_it_is() -> None:
    assert Png.read(PLAIN).pixels is PLAIN and Png.read(PLAIN + b"behind").pixels == PLAIN + b"behind"
    data = with_chunks(PLAIN, png_chunk(b"tEXt", b"k\0text"), png_chunk(b"eXIf", b"MM"))
    assert Png.read(data).pixels == PLAIN and Png.read(data).chunks == {b"eXIf": b"MM"}


def test_frames_and_transparency_are_kept() -> None:
    data = with_chunks(animated("PNG"), png_chunk(b"tEXt", b"k\0text"))
    with pytest.raises(Rejected, match="animated"):
        read_header(data, LIMITS)
    clear = Image.new("P", (32, 32), 0)
    clear.putpalette([10, 20, 30, 200, 100, 50])
    data = with_chunks(encode(clear, transparency=0), png_chunk(b"tEXt", b"k\0text"))
    picture = decode(data, read_header(data, LIMITS), (32, 32), "resize")
    assert (picture.pixels == 255).all()
