"""Decoding: every mode, orientation and profile comes out as the right sRGB pixels; bad files say why."""

from __future__ import annotations

import contextlib
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest
from image_fixtures import LIMITS, TURNED, UPRIGHT, animated, corners, encode, four_quarters, png_chunk, whole
from PIL import Image, ImageCms

from preprocess.decoding import images
from preprocess.decoding.images import Rejected, decode, read_header


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format: str, orientation: int) -> None:  # noqa: A002
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if format in ("JPEG", "WEBP", "AVIF") else {}
    options |= {"subsampling": 0} if format == "JPEG" else {}
    if format == "WEBP":
        options = {"lossless": True}
    data = encode(four_quarters(), format, exif=exif, **options)
    header = read_header(data, LIMITS)
    assert (header.height, header.width) == ((48, 32) if orientation >= 5 else (32, 48))
    for fit in ("resize", "crop", "pad"):
        pixels = decode(data, header, (header.height, header.width), fit).pixels
        assert pixels.shape == (header.height, header.width, 3)
        assert corners(pixels) == TURNED[orientation]


def test_png_orientation_behind_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encode(four_quarters())
    end = plain.rindex(b"IEND") - 4
    data = plain[:end] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + plain[end:]
    assert corners(whole(data)) == TURNED[6]


# Pillow 12 reads no uncompressed YCbCr in a TIFF: such a file is a reject.
OF_PILLOW_13 = pytest.mark.skipif(PIL.__version__ < "13", reason="Pillow 12 does not read it")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", pytest.param("YCbCr", marks=OF_PILLOW_13), "RGBX"])
def test_colour_modes(mode: str) -> None:
    image = four_quarters()
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    format = "PNG" if mode in ("RGB", "RGBA", "P") else "TIFF"  # noqa: A001
    assert corners(whole(encode(image, format))) == UPRIGHT


@pytest.mark.parametrize("format", ["JPEG", "BMP", "WEBP", "AVIF", "TIFF", "PNG"])
def test_formats(format: str) -> None:  # noqa: A002
    options = {"quality": 100} if format in ("JPEG", "WEBP", "AVIF") else {}
    options |= {"subsampling": 0} if format == "JPEG" else {}
    options |= {"subsampling": "4:4:4"} if format == "AVIF" else {}
    assert corners(whole(encode(four_quarters(), format, **options))) == UPRIGHT


def test_cmyk_jpeg() -> None:
    assert corners(whole(encode(four_quarters().convert("CMYK"), "JPEG", quality=100))) == UPRIGHT


@pytest.mark.parametrize("mode", ["L", "I;16", "1", "LA", "I"])
def test_grey_modes_and_16_bits(mode: str) -> None:
    ramp = np.tile(np.linspace(0, 255, 64), (16, 1))
    if mode in ("I;16", "I"):
        values = np.round(ramp / 255 * 65535)
        image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
        data = encode(image, "PNG" if mode == "I;16" else "TIFF")
    else:
        image = Image.fromarray(np.round(ramp).astype(np.uint8)).convert(mode)
        data = encode(image)
    pixels = whole(data)
    assert pixels.shape == (16, 64, 3) and (pixels == pixels[..., :1]).all()
    if mode == "1":
        assert set(np.unique(pixels)) == {0, 255}
    else:
        assert np.abs(pixels[0, :, 0].astype(float) - np.round(ramp[0])).max() <= 1


def tiff(bits: int, photometric: int, values: np.ndarray) -> bytes:
    """One channel, uncompressed; of 12 bits two values stand in three bytes."""
    height, width = values.shape
    if bits == 12:
        first, second = values.ravel()[::2].astype(int), values.ravel()[1::2].astype(int)
        data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    else:
        data = values.astype("<u2").tobytes()
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
            (277, 3, 1), (278, 3, height), (279, 4, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(("bits", "photometric", "version"), [(16, 1, 1), (16, 0, 3), (12, 1, 3)])
def test_a_tiff_of_more_than_8_bits_says_what_is_white(bits: int, photometric: int, version: int) -> None:
    ramp = np.tile(np.linspace(0, 1, 64), (16, 1))
    stored = np.round((ramp if photometric else 1 - ramp) * (2**bits - 1))
    data = tiff(bits, photometric, stored)
    assert np.abs(whole(data)[0, :, 0].astype(float) - 255 * ramp[0]).max() <= 1
    assert read_header(data, LIMITS).version == version


def test_a_transparent_value_of_a_16_bit_png_is_white() -> None:
    rows = (b"\0" + struct.pack(">2H", 0, 40_000) * 32) * 16
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">2I5B", 64, 16, 16, 0, 0, 0, 0))
    data += png_chunk(b"tRNS", struct.pack(">H", 0))
    data += png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    pixels = whole(data)
    assert (pixels[:, ::2] == 255).all() and (pixels[:, 1::2] == 156).all()


def test_16_bit_colour_png() -> None:
    rows = b"".join(
        b"\0" + b"".join(struct.pack(">3H", x * 1024, 65535 - x * 1024, 32768) for x in range(64)) for _ in range(16)
    )
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">2I5B", 64, 16, 16, 2, 0, 0, 0))
    data += png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    pixels = whole(data)
    expected = np.array([[x * 1024 / 257, (65535 - x * 1024) / 257, 127.5] for x in range(64)])
    assert np.abs(pixels[3] - expected).max() <= 1


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 16, 32))
    image.paste((0, 0, 0, 128), (16, 0, 32, 16))
    for data in (encode(image), encode(image, "WEBP", lossless=True)):
        pixels = whole(data)
        assert tuple(pixels[8, 4]) == (0, 0, 255) and tuple(pixels[28, 28]) == (255, 255, 255)
        assert np.abs(pixels[4, 28].astype(int) - 127).max() <= 1


def test_transparent_palette_and_colour_key() -> None:
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.paste(1, (16, 0, 32, 32))
    pixels = whole(encode(palette, "PNG", transparency=0))
    assert tuple(pixels[8, 4]) == (255, 255, 255) and tuple(pixels[8, 28]) == (200, 100, 50)
    keyed = Image.new("RGB", (32, 32), (1, 2, 3))
    keyed.paste((200, 100, 50), (16, 0, 32, 32))
    pixels = whole(encode(keyed, "PNG", transparency=(1, 2, 3)))
    assert tuple(pixels[8, 4]) == (255, 255, 255) and tuple(pixels[8, 28]) == (200, 100, 50)


def swapped_profile() -> bytes:
    """An RGB profile whose red and blue primaries are exchanged: sRGB's with two tags renamed."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = data.replace(b"rXYZ", b"tmp1").replace(b"bXYZ", b"rXYZ").replace(b"tmp1", b"bXYZ")
    start = swapped.index("sRGB".encode("utf-16-be")) if "sRGB".encode("utf-16-be") in swapped else -1
    return swapped[:start] + "xRGB".encode("utf-16-be") + swapped[start + 8 :] if start >= 0 else swapped


def test_colour_profile_is_applied() -> None:
    image = Image.new("RGB", (32, 32), (250, 10, 10))
    red = whole(encode(image))[16, 16]
    blue = whole(encode(image, icc_profile=swapped_profile()))[16, 16]
    assert red[0] > 200 > 60 > red[2] and blue[2] > 200 > 60 > blue[0]


def test_srgb_profile_changes_nothing_and_a_broken_one_is_ignored() -> None:
    image = four_quarters()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(whole(encode(image, icc_profile=srgb)), whole(encode(image)))
    data = encode(image, icc_profile=b"no profile at all" * 20)
    picture = decode(data, read_header(data, LIMITS), (32, 48), "resize")
    assert picture.profile_ignored
    np.testing.assert_array_equal(picture.pixels, whole(encode(image)))


def test_one_lanczos_pass_with_antialiasing(draw_photo) -> None:
    image = Image.fromarray(draw_photo(300, 500, 1))
    expected = np.asarray(image.resize((96, 64), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(whole(encode(image), "resize", (64, 96)), expected)
    checkers = Image.fromarray(np.indices((512, 512)).sum(0).astype(np.uint8) % 2 * 255)
    assert np.abs(whole(encode(checkers), "resize", (64, 64)).astype(float) - 127.5).max() < 3


def test_crop_keeps_the_middle_and_pad_keeps_all() -> None:
    image = Image.new("RGB", (300, 100), (255, 0, 0))
    image.paste((0, 255, 0), (100, 0, 200, 100))
    data = encode(image)
    assert (whole(data, "crop", (64, 64))[8:-8, 8:-8] == (0, 255, 0)).all()
    header = read_header(data, LIMITS)
    padded = decode(data, header, (64, 64), "pad", "key").pixels
    strip = padded[21:42]
    assert strip[10, 4, 0] > 250 and strip[10, 32, 1] > 250 and strip[10, 60, 0] > 250
    above = padded[:20].astype(float)
    assert above.std() > 60 and abs(above.mean() - 127.5) < 5
    np.testing.assert_array_equal(padded, decode(data, header, (64, 64), "pad", "key").pixels)
    assert (padded != decode(data, header, (64, 64), "pad", "other").pixels).any()


def bomb() -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<html>not found</html>", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (encode(Image.new("L", (32, 32)), "GIF"), "not an image"),
        (animated("WEBP"), "animated or several pages"),
        (animated("PNG"), "animated or several pages"),
        (animated("TIFF"), "animated or several pages"),
        (animated("AVIF"), "animated or several pages"),
        (encode(Image.new("RGB", (64, 7))), "too small"),
        (encode(Image.new("RGB", (401, 100))), "absurd aspect ratio"),
        (encode(Image.new("1", (20_000, 10_000))), "too many pixels"),
        (bomb(), "too many pixels"),
    ],
    # named, not by their bytes: an AVIF carries the second it was made in, and workers must agree on the names
    ids=["empty", "html", "cut", "gif", "webp", "apng", "tiff", "avif", "small", "narrow", "large", "bomb"],
)
def test_bad_files_are_refused_by_their_header(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        read_header(data, LIMITS)
    assert caught.value.reason == reason and not caught.value.transient


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF"])
def test_cut_off_files_are_rejected_and_not_half_decoded(format: str, draw_photo) -> None:  # noqa: A002
    data = encode(Image.fromarray(draw_photo(200, 300, 2)), format)
    for share in (0.5, 0.9):
        cut = data[: int(len(data) * share)]
        with pytest.raises(Rejected) as caught:
            decode(cut, read_header(cut, LIMITS), (64, 96), "resize")
        assert caught.value.reason in ("damaged image", "not an image")


def test_floating_point_pixels_are_refused() -> None:
    data = encode(Image.fromarray(np.ones((32, 32), np.float32)), "TIFF")
    with pytest.raises(Rejected, match="unsupported pixels.*floating"):
        whole(data)


def test_only_so_many_pixels_are_decoded_at_a_time() -> None:
    shares = images.Shares(100)
    now, most, lock = 0, 0, threading.Lock()

    def work(pixels: int) -> None:
        nonlocal now, most
        with contextlib.suppress(ZeroDivisionError), shares.take(pixels):
            with lock:
                now += pixels
                most = max(most, now if pixels <= 100 else 0)
                assert pixels <= 100 or now == pixels, "a picture larger than all is alone"
            time.sleep(0.001)
            with lock:
                now -= pixels
            raise ZeroDivisionError  # gives its share back all the same

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [30, 70, 10, 50, 300, 90, 20, 40] * 8))
    assert 50 <= most <= 100 and now == 0
