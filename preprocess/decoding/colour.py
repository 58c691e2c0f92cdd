"""Colours: what a file says about the space its numbers are in, and the way from there to sRGB.

Everything that a file can say becomes an ICC profile. A profile is judged by what it does to colours, never by
its name.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageCms

from preprocess.decoding.png import Png

UNUSABLE = b"?"  # instead of a profile: the file states colours that cannot be converted
_SRGB = ImageCms.createProfile("sRGB")
_TOLERANCE = 2  # levels of 255: the roundings of sRGB profiles stay within, other curves and primaries do not
# CIE x and y of red, green, blue and white, by the numbers of ITU-T H.273.
_PRIMARIES = {
    1: (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290),
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, 0.3127, 0.3290),
    6: (0.63, 0.34, 0.31, 0.595, 0.155, 0.07, 0.3127, 0.3290),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290),
    11: (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.314, 0.351),
    12: (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, 0.3127, 0.3290),
}
_PRIMARIES |= {2: _PRIMARIES[1], 7: _PRIMARIES[6]}  # 2: not stated
_ADOBE = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06, 0.3127, 0.3290)
_ADOBE_GAMMA = 563 / 256
# Exponents; None is sRGB's curve. The camera curves of video (1, 6, 14, 15) are shown as sRGB's.
_CURVES = {1: None, 2: None, 4: 2.2, 5: 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}


def profile_of(image: Image.Image, png: Png | None, exif: Image.Exif, data: bytes) -> bytes:
    """The ICC profile of a picture's colours: b"" if they are sRGB, `UNUSABLE` if they cannot be known.

    The first of these that is there: numbers of ITU-T H.273 in a PNG, the profile, such numbers in an AVIF or
    HEIF, a PNG's own statements, EXIF.
    """
    if png is not None:
        stated = _of_png(png)
    else:
        stated = icc_profile(image, png)
        if stated is None and image.format in ("AVIF", "HEIF"):
            stated = _of_boxes(data)
    if stated is None:
        stated = _of_exif(exif)
    return stated


def icc_profile(image: Image.Image, png: Png | None) -> bytes | None:
    """The embedded profile; None if there is none, `UNUSABLE` if it is in pieces."""
    if png is not None:
        return _embedded(png)
    if "icc_profile" not in image.info:
        return None
    return image.info["icc_profile"] or UNUSABLE


def _embedded(png: Png) -> bytes | None:
    profile = png.profile()
    return None if profile is None else profile or UNUSABLE


def _of_png(png: Png) -> bytes | None:
    profile = _embedded(png)
    if len(numbers := png.chunks.get(b"cICP", b"")) >= 4:
        stated = _of_numbers(numbers[0], numbers[1])
        if stated != UNUSABLE or profile is None:  # a profile is the second choice for what it cannot show
            return stated
    if profile is not None:
        return profile
    if b"sRGB" in png.chunks:
        return b""
    number = png.chunks.get(b"gAMA", b"")
    gamma = int.from_bytes(number) / 100_000 if len(number) == 4 else 0.0
    points = png.chunks.get(b"cHRM", b"")
    places = np.array(struct.unpack(">8I", points)) / 100_000 if len(points) == 32 else ()
    primaries = _PRIMARIES[1]
    if len(places) and np.abs(places - np.roll(primaries, 2)).max() > 0.005:
        primaries = tuple(np.roll(places, -2))
    # Most writers mean sRGB by 1 / 2.2, and libpng takes what is so near for the same.
    exponent = 1 / gamma if 0.1 <= gamma <= 10 and abs(gamma * 2.2 - 1) > 0.05 else None
    if primaries == _PRIMARIES[1] and exponent is None:
        return b"" if gamma or len(places) else None
    return _made(primaries, exponent)


def _of_numbers(primaries: int, curve: int) -> bytes:
    if primaries not in _PRIMARIES or curve not in _CURVES:
        return UNUSABLE  # among them the curves of HDR, which a display has to fit to its range
    if _PRIMARIES[primaries] == _PRIMARIES[1] and _CURVES[curve] is None:
        return b""
    return _made(_PRIMARIES[primaries], _CURVES[curve])


def _of_boxes(data: bytes) -> bytes | None:
    at = data.find(b"colrnclx", 0, max(data.find(b"mdat"), 0))
    return None if at < 0 else _of_numbers(*struct.unpack_from(">2H", data, at + 8))


def _of_exif(exif: Image.Exif) -> bytes:
    """Cameras say "Adobe RGB" by EXIF alone (ColorSpace 2, or none and the R03 of DCF)."""
    try:
        details = exif.get_ifd(0x8769)
        space = details.get(0xA001)
        index = exif.get_ifd(0xA005).get(1) if space not in (1, 2) else None
    except Exception:  # noqa: BLE001  a stranger's data; the picture is worth more
        return b""
    adobe = space == 2 or (isinstance(index, str) and index.startswith("R03"))
    return _made(_ADOBE, _ADOBE_GAMMA) if adobe else b""


@functools.lru_cache(maxsize=64)
def _made(chromaticities: tuple[float, ...], exponent: float | None) -> bytes:
    """A profile of these red, green, blue and white points and this curve; `UNUSABLE` if there is none."""
    points = np.reshape(chromaticities, (4, 2))
    try:
        if points[:, 1].min() <= 0:
            return UNUSABLE
        xyz = np.stack([points[:, 0], points[:, 1], 1 - points.sum(1)]) / points[:, 1]  # columns
        bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
        gain = (bradford @ (0.9642, 1.0, 0.8249)) / (bradford @ xyz[:, 3])
        columns = xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3])
        adapted = np.linalg.solve(bradford, gain[:, None] * (bradford @ columns))
        tags = {kind: b"XYZ \0\0\0\0" + _fixed(column) for kind, column in zip(_COLUMNS, adapted.T)}
    except (np.linalg.LinAlgError, struct.error):
        return UNUSABLE
    tags |= {b"wtpt": b"XYZ \0\0\0\0" + _fixed((0.9642, 1.0, 0.8249))}
    curve = struct.pack(">H2x", 0) + _fixed([exponent]) if exponent else _SRGB_CURVE
    tags |= dict.fromkeys(_TONES, b"para\0\0\0\0" + curve)
    body, table, start = b"", struct.pack(">I", len(tags)), 132 + 12 * len(tags)
    for kind, content in tags.items():
        table += kind + struct.pack(">2I", start + len(body), len(content))
        body += content
    header = struct.pack(">I4xI", start + len(body), 0x04200000) + b"mntrRGB XYZ " + bytes(12) + b"acsp"
    header += bytes(28) + _fixed((0.9642, 1.0, 0.8249))
    return header.ljust(128, b"\0") + table + body


def _fixed(values: np.ndarray | Sequence[float]) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))


_COLUMNS = (b"rXYZ", b"gXYZ", b"bXYZ")
_TONES = (b"rTRC", b"gTRC", b"bTRC")
_SRGB_CURVE = struct.pack(">H2x", 3) + _fixed((2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, bool]:
    """The picture (mode L, RGB or CMYK) in sRGB, and whether its profile could not be used.

    An RGB profile says what a gray means as well; a gray profile what equal red, green and blue mean.
    """
    if not profile:
        return image.convert("RGB"), False
    space = profile[16:20]
    if image.mode == "L" and space == b"RGB ":
        image = image.convert("RGB")
    elif image.mode == "RGB" and space == b"GRAY" and _is_gray(image):
        image = image.convert("L")
    transform = _transform(profile, image.mode)
    if isinstance(transform, ImageCms.ImageCmsTransform):
        return _applied(image, transform), False
    return image.convert("RGB"), not transform


def _applied(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is where the picture is not changed in place
    return converted


def _is_gray(image: Image.Image) -> bool:
    red, green, blue = image.split()
    return not any(ImageChops.difference(red, other).getbbox() for other in (green, blue))


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | bool:
    """The transform to sRGB; True if none is needed, False if the profile is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB")
        if mode == "RGB" and _is_srgb(source) and (_is_named_srgb(source) or _moves(_probe(), transform)):
            return True
        if mode == "L":  # the table that littleCMS makes is too coarse for the shadows of a linear gray
            exact = ImageCms.buildTransform(source, _SRGB, mode, "RGB", flags=ImageCms.Flags.NOOPTIMIZE)
            grays = _grays().convert("L")
            if _differ(_applied(grays, transform), _applied(grays, exact)):
                return exact
        return transform
    except Exception:  # noqa: BLE001  a profile is data from a stranger; the picture is worth more
        return False


def _is_srgb(source: ImageCms.ImageCmsProfile) -> bool:
    """Whether colours stay what they are.

    Not perceptually, as pictures are converted: the perceptual table of ICC's own sRGB profile of version 4
    fits colours to the range of a print.
    """
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    return not _moves(_probe(), ImageCms.buildTransform(source, _SRGB, "RGB", "RGB", intent, flags))


def _moves(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> bool:
    return _differ(image, _applied(image, transform))


def _differ(one: Image.Image, other: Image.Image) -> bool:
    return bool(np.asarray(ImageChops.difference(one, other)).max() > _TOLERANCE)


def _is_named_srgb(source: ImageCms.ImageCmsProfile) -> bool:
    """Whether the pixels of a profile that is sRGB are taken as they are, or go through its transform.

    Both are right, as neither moves a value by more than `_TOLERANCE`. But a file must always give the same
    bits, and version 1 asked the name.
    """
    return "srgb" in ImageCms.getProfileDescription(source).lower()


@functools.cache
def _grays() -> Image.Image:
    """All grays in a row, mode RGB."""
    return Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))


@functools.cache
def _probe() -> Image.Image:
    """18 levels a channel, all together and in a row, and all grays; mode RGB."""
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    return Image.fromarray(np.concatenate([np.asarray(_grays()), colours], axis=1))


@functools.lru_cache(maxsize=16)
def is_version_1(embedded: bytes | None, profile: bytes, mode: str) -> bool:
    """Whether the colours are those of version 1 of `images.decode`.

    That version knows embedded profiles only, and by its name whether one is sRGB.
    """
    if mode == "CMYK" or (not profile and not embedded):
        return True
    probes = [_grays().convert("L")] if mode == "L" else [_grays(), _probe()]
    return all(to_srgb(probe, profile)[0] == _by_name(probe, embedded) for probe in probes)


def _by_name(image: Image.Image, embedded: bytes | None) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(embedded or b""))
        if image.mode != "RGB" or not _is_named_srgb(source):
            return _applied(image, ImageCms.buildTransform(source, _SRGB, image.mode, "RGB"))
    except Exception:  # noqa: BLE001
        pass
    return image.convert("RGB")
