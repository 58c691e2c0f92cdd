"""Colours come out as sRGB whatever a file says them by, and a profile's name says nothing."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from image_fixtures import LIMITS, encode, four_quarters, png_chunk, read, with_chunks
from PIL import Image, ImageCms, ImageFilter

from preprocess.decoding.images import read_header

SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290)
P3 = (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.3127, 0.3290)
ADOBE = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06, 0.3127, 0.3290)
LINEAR = np.arange(4096) / 4095
SRGB_TABLE = np.where(LINEAR <= 0.04045, LINEAR / 12.92, ((LINEAR + 0.055) / 1.055) ** 2.4)


def to_xyz(points: tuple[float, ...]) -> np.ndarray:
    """Columns are the XYZ of red, green and blue, white with Y = 1."""
    x, y = np.reshape(points, (4, 2)).T
    xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    return xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])


def expected(values: np.ndarray, points: tuple[float, ...] = SRGB, exponent: float | None = None) -> np.ndarray:
    """What uint8 values of this space are in sRGB, f64; the curve is sRGB's without an exponent."""
    share = values / 255
    linear = share**exponent if exponent else np.interp(share, LINEAR, SRGB_TABLE)
    linear = np.clip(linear @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(points)).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def profile(
    curve: bytes,
    points: tuple[float, ...] = SRGB,
    name: str = "",
    space: bytes = b"RGB ",
    version: int = 2,
) -> bytes:
    """A display profile: colorants, or for b"GRAY" only a curve; version 2 has its name in "desc"."""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1.0, 0.8249])
    columns = to_xyz(points)
    gain = (bradford @ d50) / (bradford @ columns.sum(1))
    adapted = np.linalg.inv(bradford) @ np.diag(gain) @ bradford @ columns
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(d50)}
    if version == 2:
        tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name.encode() + bytes(79)
    else:
        text = name.encode("utf-16-be")
        tags[b"desc"] = b"mluc\0\0\0\0" + struct.pack(">2I4s2I", 1, 12, b"enUS", len(text), 28) + text
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for kind, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), adapted.T):
            tags[kind] = b"XYZ \0\0\0\0" + fixed(column)
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for kind, content in tags.items():
        table += kind + struct.pack(">2I", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4xB3x", start + len(body), version) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    return (head + bytes(28) + fixed(d50)).ljust(128, b"\0") + table + body


def fixed(values: np.ndarray | list[float]) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))


def gamma(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def table(values: np.ndarray) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(f">I{len(values)}H", len(values), *np.round(values * 65535).astype(int))


PARAMETRIC = b"para\0\0\0\0\0\3\0\0" + fixed([2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045])
NAME = "sRGB IEC61966-2.1"


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    """Squares of 50 colours and grays, uint8 [50, 3]."""
    values = np.random.default_rng(1).integers(0, 256, (50, 3), np.uint8)
    values[:10] = np.linspace(0, 255, 10).round().astype(np.uint8)[:, None]
    return values


def picture(values: np.ndarray) -> Image.Image:
    rows = values.reshape(5, 10, 3).repeat(16, 0).repeat(16, 1)
    return Image.fromarray(rows)


def centres(pixels: np.ndarray) -> np.ndarray:
    return pixels[8::16, 8::16].reshape(-1, 3).astype(float)


def check(data: bytes, wanted: np.ndarray, tolerance: float = 1.0) -> None:
    found = read(data)
    assert not found.profile_ignored
    assert np.abs(centres(found.pixels) - wanted).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "points", "curve", "exponent"),
    [
        ("GIMP built-in Linear sRGB", SRGB, gamma(1), 1.0),
        (NAME, SRGB, gamma(1), 1.0),
        (NAME, SRGB, gamma(1.8), 461 / 256),
        (NAME, SRGB, gamma(2.2), 563 / 256),
        ("sRGB", P3, table(SRGB_TABLE), None),
        ("Display P3 (sRGB curve)", P3, PARAMETRIC, None),
        ("not sRGB", ADOBE, gamma(563 / 256), 563 / 256),
        ("", P3, PARAMETRIC, None),
    ],
    ids=["GIMP linear", "linear", "1.8", "2.2", "P3 table", "P3", "Adobe", "nameless"],
)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_a_profile_counts_whatever_its_name(
    format: str,
    name: str,
    points: tuple,
    curve: bytes,
    exponent: float | None,
    patches: np.ndarray,  # noqa: A002
) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    for version in (2, 4):
        made = profile(curve, points, name, version=version)
        data = encode(picture(patches), format, icc_profile=made, **options)
        check(data, expected(patches, points, exponent))
        assert read_header(data, LIMITS).version == (2 if "srgb" in name.lower() else 1)


def test_a_jpeg_with_a_linear_profile() -> None:
    made = profile(gamma(1), name="GIMP built-in Linear sRGB")
    for mode in ("RGB", "L"):
        data = encode(Image.new("RGB", (64, 64), (55, 55, 55)).convert(mode), "JPEG", quality=100, icc_profile=made)
        found = read(data)
        assert (found.pixels == 128).all() and not found.profile_ignored
        assert read_header(data, LIMITS).version == 2


def small_table() -> bytes:
    """sRGB's curve in 26 steps, as the profiles have it that save every byte."""
    return table(np.interp(np.linspace(0, 1, 26), LINEAR, SRGB_TABLE))


@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize(
    "curve",
    [PARAMETRIC, table(SRGB_TABLE), table(SRGB_TABLE[::4]), small_table()],
    ids=["formula", "4096", "1024", "26"],
)
@pytest.mark.parametrize("name", [NAME, "GIMP built-in sRGB", "c2", ""])
def test_srgb_is_srgb_whatever_its_name(name: str, curve: bytes, version: int, patches: np.ndarray) -> None:
    made = profile(curve, SRGB, name, version=version)
    data = encode(picture(patches), icc_profile=made)
    found = centres(read(data).pixels)
    if "srgb" in name.lower():
        np.testing.assert_array_equal(found, patches)
    assert np.abs(found - patches).max() <= 1
    assert read_header(data, LIMITS).version == 1


def test_the_transform_of_a_nameless_srgb_stays_what_it_was(patches: np.ndarray) -> None:
    made = profile(small_table(), SRGB, "c2")
    source = ImageCms.ImageCmsProfile(io.BytesIO(made))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    photo = picture(patches).filter(ImageFilter.GaussianBlur(9))
    np.testing.assert_array_equal(
        read(encode(photo, icc_profile=made)).pixels, np.asarray(ImageCms.applyTransform(photo, transform))
    )


def test_gray_profiles_and_gray_pictures() -> None:
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)
    gray = Image.fromarray(np.tile(ramp, (16, 1)))
    linear = profile(gamma(1), name="sRGB gray", space=b"GRAY")
    wanted = expected(ramp[:, None].repeat(3, 1), exponent=1.0)
    half = gray.convert("LA")
    half.putalpha(255)
    wide = Image.fromarray(np.tile(ramp.astype(np.uint16) * 257, (16, 1)))
    for image in (gray, half, gray.convert("RGB"), gray.convert("P"), wide):
        for made in (linear, profile(gamma(1), name="sRGB")):
            found = read(encode(image, icc_profile=made))
            assert not found.profile_ignored
            assert np.abs(found.pixels[8] - wanted).max() <= 1, image.mode


def test_a_profile_of_another_kind_of_picture_is_ignored_and_counted() -> None:
    gray = profile(gamma(1), name="sRGB", space=b"GRAY")
    for image, made in (
        (four_quarters(), gray),
        (four_quarters().convert("CMYK"), profile(gamma(1), name="sRGB")),
    ):
        data = encode(image, "TIFF", icc_profile=made)
        found = read(data)
        assert found.profile_ignored
        np.testing.assert_array_equal(found.pixels, read(encode(image, "TIFF")).pixels)


def test_a_profile_in_pieces_is_counted() -> None:
    segment = b"ICC_PROFILE\0\1\2" + profile(gamma(1))
    data = encode(four_quarters(), "JPEG")
    data = data[:2] + b"\xff\xe2" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
    assert read(data).profile_ignored
    broken = png_chunk(b"iCCP", b"name\0\0" + zlib.compress(profile(gamma(1)))[:-40] + bytes(40))
    assert read(with_chunks(encode(four_quarters()), broken)).profile_ignored


# ------------------------------------------------------------------------------------------ without a profile


def chromaticities(points: tuple[float, ...]) -> bytes:
    values = [round(value * 100_000) for value in (*points[6:], *points[:6])]
    return png_chunk(b"cHRM", struct.pack(">8I", *values))


def exponent_chunk(value: int) -> bytes:
    return png_chunk(b"gAMA", struct.pack(">I", value))


def numbers(primaries: int, curve: int) -> bytes:
    return png_chunk(b"cICP", bytes((primaries, curve, 0, 1)))


LINEAR_SRGB = png_chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(profile(gamma(1), name="sRGB")))


@pytest.mark.parametrize(
    ("chunks", "points", "exponent"),
    [
        ([exponent_chunk(100_000)], SRGB, 1.0),
        ([exponent_chunk(55_556)], SRGB, 1.8),
        ([chromaticities(P3)], P3, None),
        ([chromaticities(ADOBE), exponent_chunk(45_455)], ADOBE, None),
        ([numbers(12, 13)], P3, None),
        ([numbers(12, 8)], P3, 1.0),
        ([numbers(1, 4)], SRGB, 2.2),
        ([numbers(12, 13), LINEAR_SRGB, exponent_chunk(100_000)], P3, None),
        ([LINEAR_SRGB, png_chunk(b"sRGB", b"\0"), chromaticities(P3)], SRGB, 1.0),
        ([numbers(9, 16), LINEAR_SRGB], SRGB, 1.0),
    ],
)
def test_what_a_png_states(chunks: list[bytes], points: tuple, exponent: float | None, patches: np.ndarray) -> None:
    data = with_chunks(encode(picture(patches)), *chunks)
    check(data, expected(patches, points, exponent))
    assert read_header(data, LIMITS).version == 2


@pytest.mark.parametrize(
    "chunks",
    [
        [exponent_chunk(45_455)],
        [exponent_chunk(45_000), chromaticities(SRGB)],
        [exponent_chunk(0)],
        [exponent_chunk(2**31)],
        [png_chunk(b"sRGB", b"\0"), exponent_chunk(100_000), chromaticities(P3)],
        [numbers(1, 13), LINEAR_SRGB],
        [numbers(1, 1)],
        [numbers(2, 2)],
        [
            png_chunk(b"gAMA", b"\0"),
            png_chunk(b"gAMA", bytes(range(200))),
            png_chunk(b"cHRM", b"short"),
            png_chunk(b"cICP", b"\1"),
        ],
    ],
)
def test_what_a_png_states_is_srgb(chunks: list[bytes], patches: np.ndarray) -> None:
    data = with_chunks(encode(picture(patches)), *chunks)
    found = read(data)
    assert not found.profile_ignored
    np.testing.assert_array_equal(centres(found.pixels), patches)


@pytest.mark.parametrize(
    "chunk",
    [
        numbers(9, 16),
        numbers(9, 18),
        numbers(200, 13),
        chromaticities((0.0,) * 8),
        chromaticities((0.3,) * 8),
    ],
    ids=["PQ", "HLG", "unknown", "zeros", "one point"],
)
def test_colours_that_cannot_be_converted_are_counted(chunk: bytes, patches: np.ndarray) -> None:
    found = read(with_chunks(encode(picture(patches)), chunk))
    assert found.profile_ignored
    np.testing.assert_array_equal(centres(found.pixels), patches)


def test_numbers_in_an_avif(patches: np.ndarray) -> None:
    data = encode(picture(patches), "AVIF", quality=100, subsampling="4:4:4")
    at = data.index(b"colrnclx") + 8
    plain = centres(read(data).pixels)
    assert data[at : at + 4] == b"\0\1\0\r"
    check(data[:at] + b"\0\x0c\0\r" + data[at + 4 :], expected(plain, P3), tolerance=1.5)
    assert read(data[:at] + b"\0\x09\0\x10" + data[at + 4 :]).profile_ignored


def camera(space: int | None, index: str | None) -> bytes:
    exif = Image.Exif()
    details = exif.get_ifd(0x8769)
    if space is not None:
        details[0xA001] = space
    if index is not None:
        details[0xA005] = {1: index, 2: b"0100"}
    details[0x9000] = b"0230"
    return exif.tobytes()


@pytest.mark.parametrize(
    ("space", "index", "adobe"),
    [(2, None, True), (0xFFFF, "R03", True), (2, "R03", True), (None, "R03", True), (1, None, False)]
    + [(1, "R03", False), (0xFFFF, None, False), (0xFFFF, "R98", False), (None, None, False)],
)
def test_cameras_say_adobe_rgb_in_exif(space: int | None, index: str | None, adobe: bool, patches: np.ndarray) -> None:
    data = encode(picture(patches), "WEBP", lossless=True, exif=camera(space, index))
    check(data, expected(patches, ADOBE, 563 / 256) if adobe else patches)
    assert read_header(data, LIMITS).version == (2 if adobe else 1)
    jpeg = [encode(picture(patches), "JPEG", quality=100, subsampling=0, exif=e) for e in (b"", camera(space, index))]
    assert (read(jpeg[0]).pixels != read(jpeg[1]).pixels).any() == adobe


def test_a_profile_goes_before_exif(patches: np.ndarray) -> None:
    made = profile(PARAMETRIC, SRGB, NAME)
    data = encode(picture(patches), "WEBP", lossless=True, exif=camera(2, "R03"), icc_profile=made)
    np.testing.assert_array_equal(centres(read(data).pixels), patches)
