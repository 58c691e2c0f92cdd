"""Images under every name they go by, in every format that is read, and what is said of the others."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import FLAGS, read
from image_fixtures import LIMITS, TURNED, UPRIGHT, corners, encode, four_quarters, whole
from PIL import Image

from preprocess.decoding import formats
from preprocess.decoding.images import Limits, Rejected, decode, read_header

SAVED = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 95},
    "BMP": {},
    "TIFF": {},
}
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
JXL = b"\xff\x0a" + bytes(60)
JXL_BOX = b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl " + bytes(30)
PLUGINS = {"HEIF": (".heic", ".heif", ".hif"), "JXL": (".jxl",)}
INSTALLED = [name for name, extensions in PLUGINS.items() if extensions[0] in formats.EXTENSIONS]


@pytest.mark.parametrize("format", SAVED)
def test_a_format_is_known_by_its_first_bytes(format: str) -> None:  # noqa: A002
    for mode in ("RGB", "L"):
        assert formats.format_of(encode(four_quarters().convert(mode), format, **SAVED[format])[:64]) == format


@pytest.mark.parametrize(
    ("head", "format"),
    [
        (HEIC, "HEIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "HEIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (JXL, "JXL"),
        (JXL_BOX, "JXL"),
        (b"MM\0+\0\x08\0\0", "TIFF"),
        (b"", None),
        (b"BMW is a make of cars, and this a list of them", None),
        (b"II is the second part of a book that begins so", None),
        (b"RIFF\0\0\0\0WAVEfmt ", None),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", None),
        (b"GIF89a", None),
        (b"{}", None),
        (b"\xff\xd8", None),
    ],
)
def test_what_is_an_image_and_what_is_not(head: bytes, format: str | None) -> None:  # noqa: A002
    assert formats.format_of(head[:64]) == format


def test_extensions() -> None:
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".png", ".webp", ".avif", ".bmp", ".tif"} < set(
        formats.EXTENSIONS
    )
    assert not set(formats.EXTENSIONS) & set(formats.OTHER_IMAGES)
    assert all(extension == extension.lower() and extension[0] == "." for extension in formats.EXTENSIONS)
    for name, extensions in PLUGINS.items():
        where = formats.EXTENSIONS if name in INSTALLED else formats.OTHER_IMAGES
        assert set(extensions) <= set(where)


@pytest.mark.parametrize(
    ("name", "format", "other"),
    [
        ("a.jpg", "JPEG", False),
        ("a.JFIF", "JPEG", False),
        ("a.jpe", "MPO", False),
        ("a.png", "JPEG", True),
        ("a.jfif", "PNG", True),
        ("a.gif", "PNG", True),
        ("a", "JPEG", False),
        ("a.jpg_large", "JPEG", False),
        ("folder.png/a", "JPEG", False),
        ("a.heic", "JPEG", True),
        ("a.dib", "BMP", False),
    ],
)
def test_the_extension_of_another_format(name: str, format: str, other: bool) -> None:  # noqa: A002
    assert formats.has_other_extension(name, format) == other


@pytest.mark.parametrize(("extension", "package"), [(".heic", "pillow-heif"), (".hif", "pillow-heif")])
def test_what_to_install_is_named(extension: str, package: str) -> None:
    assert f"pip install {package}" in formats.not_read(extension) and extension in formats.not_read(extension)
    assert "pip install pillow-jxl-plugin" in formats.not_read(".jxl")
    assert "pip" not in formats.not_read(".gif") and "convert" in formats.not_read(".gif")


@pytest.mark.parametrize(("name", "data"), [("HEIF", HEIC), ("JXL", JXL), ("JXL", JXL_BOX)])
def test_content_without_a_reader_names_it_too(name: str, data: bytes) -> None:
    if name in INSTALLED:
        pytest.skip("the plugin is installed")
    with pytest.raises(Rejected, match="pip install pillow-") as caught:
        read_header(data, LIMITS)
    assert caught.value.reason == "image type is not read"


# ------------------------------------------------------------------------------------------ optional plugins


def turned(orientation: int) -> Image.Image:
    image = four_quarters()
    image.getexif()[0x0112] = orientation
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_turned_once(orientation: int) -> None:
    pytest.importorskip("pillow_heif")
    data = encode(turned(orientation), "HEIF", quality=100, chroma=444)
    header = read_header(data, LIMITS)
    assert header.format == "HEIF" and formats.format_of(data[:64]) == "HEIF"
    assert corners(whole(data)) == TURNED[orientation]


def test_heic_has_colours_too() -> None:
    pytest.importorskip("pillow_heif")
    data = encode(four_quarters(), "HEIF", quality=100, chroma=444)
    at = data.index(b"colrnclx") + 8
    wide = data[:at] + b"\0\x0c" + data[at + 2 :]
    assert whole(wide)[8, 8, 0] > whole(data)[8, 8, 0] + 5
    with pytest.raises(Rejected, match="too many pixels"):
        read_header(data, Limits(max_pixels=1000, min_side=8))


def test_jpeg_xl() -> None:
    pytest.importorskip("pillow_jxl")
    data = encode(four_quarters(), "JXL", lossless=True)
    assert corners(whole(data)) == UPRIGHT and read_header(data, LIMITS).format == "JXL"
    boxed = encode(four_quarters(), "JXL", lossless=True, use_container=True, exif=bytes(8))
    assert corners(whole(boxed)) == UPRIGHT
    with pytest.raises(Rejected, match="too many pixels"):
        read_header(data, Limits(max_pixels=1000, min_side=8))


@pytest.mark.parametrize(
    ("stream", "size", "animated"),
    [
        # bits from the lowest: not small, 9 bits of height - 1, ratio 0, 9 bits of width - 1, then metadata
        ([(0, 1), (0, 2), (199, 9), (0, 3), (0, 2), (299, 9), (1, 1)], (300, 200), False),
        ([(1, 1), (3, 5), (1, 3), (1, 1)], (32, 32), False),
        ([(0, 1), (3, 2), (99_999, 30), (7, 3), (1, 1)], (200_000, 100_000), False),
        ([(1, 1), (3, 5), (1, 3), (0, 1), (0, 1)], (32, 32), False),
        ([(1, 1), (3, 5), (1, 3), (0, 1), (1, 1), (5, 3), (0, 1), (0, 1), (1, 1)], (32, 32), True),
        ([(1, 1), (3, 5), (1, 3), (0, 1), (1, 1), (5, 3), (0, 1), (0, 1), (0, 1)], (32, 32), False),
    ],
)
def test_the_header_of_jpeg_xl(stream: list[tuple[int, int]], size: tuple[int, int], animated: bool) -> None:
    value, at = 0, 0
    for number, bits in stream:
        value, at = value | number << at, at + bits
    code = b"\xff\x0a" + value.to_bytes(16, "little")
    boxes = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\x14ftypjxl \0\0\0\0jxl " + b"\0\0\0\x0cjunkabcd"
    part = boxes + struct.pack(">I", len(code) + 12) + b"jxlp\0\0\0\0" + code
    for data in (code, boxes + b"\0\0\0\0jxlc" + code, part):
        assert formats.stated_size(data) == size
        assert formats.jxl.is_animated(data) == animated


@pytest.mark.parametrize("data", [b"\xff\x0a", JXL_BOX, JXL_BOX[:13], b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(1000)])
def test_a_jpeg_xl_without_a_header_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="JPEG XL"):
        formats.stated_size(data)


# ---------------------------------------------------------------------------------------------------- limits


@pytest.mark.slow
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_the_limit_of_pixels_is_the_callers(format: str) -> None:  # noqa: A002
    options = {"compression": "tiff_adobe_deflate"} if format == "TIFF" else {}
    data = encode(Image.new("L", (19_000, 19_000), 90), format, **options)
    with pytest.raises(Rejected, match="19000x19000") as caught:
        read_header(data, Limits())
    assert caught.value.reason == "too many pixels"
    header = read_header(data, Limits(max_pixels=1_000_000_000))
    assert (decode(data, header, (64, 64), "resize").pixels == 90).all()


def test_a_webp_or_jpeg_of_more_than_pillows_limit_is_opened() -> None:
    for format, size in (("WEBP", (16_000, 12_000)), ("JPEG", (20_000, 10_000))):  # noqa: A001
        data = bytearray(encode(four_quarters(), format))
        if format == "WEBP":
            data[26:30] = struct.pack("<2H", *size)
        else:
            at = data.index(b"\xff\xc0") + 5
            data[at : at + 4] = struct.pack(">2H", *size[::-1])
        header = read_header(bytes(data), Limits(max_pixels=1_000_000_000))
        assert (header.width, header.height) == size
        with pytest.raises(Rejected, match="too many pixels"):
            read_header(bytes(data), Limits())


def test_a_webp_that_states_too_much_takes_no_memory() -> None:
    data = encode(four_quarters().convert("RGBA"), "WEBP", lossless=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")
    assert data[12:16] == b"VP8X"
    large = data[:24] + b"\xff" * 6 + data[30:]
    with pytest.raises(Rejected, match="16777216x16777216"):
        read_header(large, LIMITS)


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("width", [40, 41])
def test_a_webp_with_a_wrong_size(width: int, lossless: bool) -> None:
    image = four_quarters().resize((width, 32))
    odd = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0\0"
    plain, padded = (encode(image, "WEBP", lossless=lossless, exif=exif) for exif in (b"", odd))
    for data in (plain, padded):
        complete, size = whole(data), int.from_bytes(data[4:8], "little")
        for other in (size - 1, size + 1, size - 2, 0, size + 1000):
            np.testing.assert_array_equal(whole(data[:4] + struct.pack("<I", other) + data[8:]), complete)
        for trailing in (b"\0", b"xx", b"trailing bytes"):
            np.testing.assert_array_equal(whole(data + trailing), complete)
    for cut in (1, 2, 10, 20):  # the padding, and then from the EXIF behind the pixels
        np.testing.assert_array_equal(whole(padded[:-cut]), whole(plain))
    padding = plain[16] % 2  # the pixels are the only chunk
    np.testing.assert_array_equal(whole(plain[: len(plain) - padding]), whole(plain))
    for cut in (1, 2, 10, 30):
        with pytest.raises(Rejected):
            whole(plain[: len(plain) - padding - cut])


# ------------------------------------------------------------------------------------------------- the command


def test_build_reads_them_all(tmp_path: Path, draw_photo) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["a.jfif", "b.jpe", "c.JIF", "d.pjpeg", "e.jpg", "f.jpg", "g.png", "h.webp"]
    for seed, name in enumerate(names):
        picture = Image.fromarray(draw_photo(150, 170, seed))
        format = {"g.png": "PNG", "h.webp": "WEBP"}.get(name, "JPEG")  # noqa: A001
        data = encode(picture, format)
        data = {"e.jpg": data[:-2], "f.jpg": data[:-60], "h.webp": data[:4] + bytes(4) + data[8:]}.get(name, data)
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"picture {name}")
    command = [
        sys.executable,
        "-m",
        "preprocess",
        "build",
        "--input",
        folder,
        "--output",
        tmp_path / "out",
        *FLAGS,
    ]
    command += ["--resolution", "128", "--modulus", "16", "--holdout", "0", "--max-rejects", "1"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["key"], reject["reason"]) for reject in rejects] == [("f.jpg", "damaged image")]
    assert set(read(tmp_path / "out")) == set(names) - {"f.jpg"}
    assert "extension" not in done.stdout
