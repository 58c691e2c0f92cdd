"""Every place where a format keeps the orientation: the picture is turned as Pillow's `exif_transpose` turns it."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from image_fixtures import LIMITS, TURNED, corners, encode, four_quarters, png_chunk, whole, with_chunks
from PIL import Image, ImageOps

from preprocess.decoding.images import read_header

LOSSY = {"quality": 95}
SAVED = {
    "JPEG": LOSSY | {"subsampling": 0},
    "MPO": LOSSY | {"subsampling": 0, "save_all": True, "append_images": [Image.new("RGB", (48, 32))]},
    "WEBP": {"lossless": True},
    "AVIF": LOSSY | {"subsampling": "4:4:4"},
    "TIFF": {},
    "PNG": {},
}


def exif_block(orientation: int | None) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    if orientation is not None:
        exif[0x0112] = orientation
    return exif.tobytes()


def xmp_packet(orientation: int, form: str = '="{}"') -> bytes:
    head = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation' + form.format(orientation)
    return (head + "/></x:xmpmeta>").encode()


def raw_profile(name: str, block: bytes) -> bytes:
    """As ImageMagick and exiftool write one: lines of 72 digits."""
    digits = block.hex()
    lines = [digits[i : i + 72] for i in range(0, len(digits), 72)]
    return f"\n{name}\n{len(block):8}\n".encode() + "\n".join(lines).encode() + b"\n"


def text_chunk(kind: str, keyword: bytes, text: bytes) -> bytes:
    if kind == "tEXt":
        return png_chunk(b"tEXt", keyword + b"\0" + text)
    if kind == "zTXt":
        return png_chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(text))
    flag, body = (b"\0", text) if kind == "iTXt" else (b"\1", zlib.compress(text))
    return png_chunk(b"iTXt", keyword + b"\0" + flag + b"\0\0\0" + body)


def with_xmp(format: str, packet: bytes, **more: object) -> bytes:  # noqa: A002
    if format == "TIFF":
        return encode(four_quarters(), "TIFF", tiffinfo={700: packet}, **more)
    if format in ("JPEG", "MPO"):
        data = encode(four_quarters(), format, **SAVED[format], **more)
        segment = b"http://ns.adobe.com/xap/1.0/\0" + packet
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
    return encode(four_quarters(), format, xmp=packet, **SAVED[format], **more)


def transposed(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def check(data: bytes, orientation: int) -> None:
    pixels = whole(data)
    assert corners(pixels) == TURNED[orientation]
    np.testing.assert_array_equal(pixels, transposed(data))


@pytest.mark.parametrize("format", SAVED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_and_xmp_of_every_format(format: str, orientation: int) -> None:  # noqa: A002
    check(encode(four_quarters(), format, exif=exif_block(orientation), **SAVED[format]), orientation)
    if format in ("PNG", "MPO"):  # these have tests of their own, or two pictures with one packet each
        return
    for form in ('="{}"', ">{}<"):
        check(with_xmp(format, xmp_packet(orientation, form)), orientation)


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iTXt, compressed"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_texts_of_a_png(kind: str, orientation: int) -> None:
    plain = encode(four_quarters())
    profile = text_chunk(kind, b"Raw profile type exif", raw_profile("exif", exif_block(orientation)))
    packet = text_chunk(kind, b"XML:com.adobe.xmp", xmp_packet(orientation))
    for behind in (False, True):
        check(with_chunks(plain, profile, behind=behind), orientation)
        if kind.startswith("iTXt"):  # Pillow looks for XMP in no other
            check(with_chunks(plain, packet, behind=behind), orientation)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_pillow_does_not_read(orientation: int) -> None:
    plain = encode(four_quarters())
    app1 = b"http://ns.adobe.com/xap/1.0/\0" + xmp_packet(orientation)
    for name, block in (("APP1", exif_block(orientation)), ("APP1", app1), ("xmp", xmp_packet(orientation))):
        chunk = text_chunk("zTXt", b"Raw profile type " + name.encode(), raw_profile(name.lower(), block))
        assert corners(whole(with_chunks(plain, chunk))) == TURNED[orientation]
    for data in (
        with_xmp("JPEG", xmp_packet(orientation, "='{}'")),
        with_xmp("WEBP", xmp_packet(orientation, ' = "{}"')),
    ):
        assert corners(whole(data)) == TURNED[orientation]


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_exif_goes_before_xmp(format: str) -> None:  # noqa: A002
    check(with_xmp(format, xmp_packet(8), exif=exif_block(6)), 6)
    check(with_xmp(format, xmp_packet(8), exif=exif_block(1)), 1)
    check(with_xmp(format, xmp_packet(8), exif=exif_block(None)), 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_the_tag_of_a_tiff_goes_before_xmp(orientation: int, compression: str) -> None:
    tags = {274: orientation, 700: xmp_packet(6)}
    check(encode(four_quarters(), "TIFF", tiffinfo=tags, compression=compression), orientation)
    check(encode(four_quarters(), "TIFF", tiffinfo={700: tags[700]}, compression=compression), 6)


def test_precedence_in_a_png() -> None:
    plain = encode(four_quarters())
    exif = png_chunk(b"eXIf", exif_block(6).removeprefix(b"Exif\0\0"))
    silent = png_chunk(b"eXIf", exif_block(None).removeprefix(b"Exif\0\0"))
    raw = text_chunk("zTXt", b"Raw profile type exif", raw_profile("exif", exif_block(3)))
    xmp = text_chunk("iTXt", b"XML:com.adobe.xmp", xmp_packet(8))
    check(with_chunks(plain, xmp, raw, exif), 6)
    check(with_chunks(plain, xmp, raw), 3)
    check(with_chunks(plain, xmp, silent), 8)
    check(with_chunks(with_chunks(plain, xmp), raw, behind=True), 3)


@pytest.mark.parametrize(
    "text",
    [
        b"\nexif\n      12\nnot hexadecimal\n",
        b"\nexif\n      12\n4d4d0",
        raw_profile("exif", b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        b"",
        b" " * 100_000,
    ],
    ids=["digits", "odd", "exif", "empty", "blank"],
)
def test_damaged_metadata_leave_the_picture_as_it_is(text: bytes) -> None:
    data = with_chunks(encode(four_quarters()), text_chunk("tEXt", b"Raw profile type exif", text))
    assert corners(whole(data)) == TURNED[1]


def test_damaged_exif_of_a_png_does_not_hide_its_xmp() -> None:
    xmp = text_chunk("iTXt", b"XML:com.adobe.xmp", xmp_packet(6))
    data = with_chunks(encode(four_quarters()), png_chunk(b"eXIf", b"not EXIF at all"), xmp)
    assert corners(whole(data)) == TURNED[6]


def test_version_tells_what_only_this_reading_turns() -> None:
    plain = encode(four_quarters())
    exif = png_chunk(b"eXIf", exif_block(6).removeprefix(b"Exif\0\0"))
    raw = text_chunk("zTXt", b"Raw profile type exif", raw_profile("exif", exif_block(3)))
    versions = [
        read_header(data, LIMITS).version for data in (plain, with_chunks(plain, exif), with_chunks(plain, raw))
    ]
    assert versions == [1, 1, 2]
    assert read_header(with_chunks(plain, exif, raw), LIMITS).version == 1
