"""From the bytes of an image file to upright sRGB pixels of a bucket's size, safely.

Two steps: `read_header` at planning (nothing is decoded) and `decode` when the picture is needed. Both are
given bytes and never a path, and both turn whatever Pillow raises into `Rejected`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import re
import struct
import threading
from collections.abc import Iterator

import numpy as np
from PIL import (  # the plugins register the formats when they are imported
    AvifImagePlugin,
    BmpImagePlugin,
    Image,
    ImageCms,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from preprocess.buckets import Size, geometry

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff")
OTHER_IMAGES = (
    ".gif",
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".psd",
    ".svg",
    ".ico",
    ".tga",
    ".exr",
    ".hdr",
    ".apng",
)
OTHER_IMAGES += (
    ".ppm",
    ".pgm",
    ".raw",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".orf",
    ".rw2",
    ".jfif",
    ".eps",
)
_PLUGINS = (AvifImagePlugin, BmpImagePlugin, JpegImagePlugin, MpoImagePlugin, PngImagePlugin)
_PLUGINS += (TiffImagePlugin, WebPImagePlugin)
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "TIFF")
_ORIENTATION = 0x0112
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SRGB = ImageCms.createProfile("sRGB")
_PAPER = (255, 255, 255, 255)  # what shows through transparent pixels


class Rejected(Exception):
    """An input that cannot become a record.

    Attributes:
      reason: a few fixed words, the same for all inputs of this kind: totals are counted by it.
      detail: what exactly was found.
      transient: it may be different next time (a read error), so it is tried again.
    """

    def __init__(self, reason: str, detail: str = "", transient: bool = False) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.transient = reason, detail, transient


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is too much or too little, in pixels (`max_aspect`: longest over shortest side)."""

    max_pixels: int = 150_000_000
    min_side: int = 64
    max_aspect: float = 4.0


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """Size of the upright picture (pixels), the EXIF orientation 1 to 8 that makes it so, and the format."""

    height: int
    width: int
    orientation: int
    format: str


def read_header(data: bytes, limits: Limits) -> Header:
    """Size and orientation, without decoding a pixel.

    Raises:
      Rejected: empty, not an image, animated, too large, too small or too narrow.
    """
    if not data:
        raise Rejected("zero bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > limits.max_pixels:
                raise Rejected("too many pixels", f"{width}x{height}, the limit is {limits.max_pixels:,}")
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # MPO: a camera's JPEG with a second view behind it
                raise Rejected("animated or several pages", f"{frames} frames")
            orientation = _orientation(image, data)
            name = image.format or "?"
    except Rejected:
        raise
    except Image.DecompressionBombError as error:
        raise Rejected("too many pixels", str(error)) from error
    except Exception as error:  # noqa: BLE001  the plugins raise whatever their parser met
        raise Rejected("not an image", _describe(error)) from error
    if orientation >= 5:
        width, height = height, width
    if min(width, height) < limits.min_side:
        raise Rejected("too small", f"{width}x{height}, the shorter side must have {limits.min_side} pixels")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise Rejected("absurd aspect ratio", f"{width}x{height}, more than {limits.max_aspect:g} to 1")
    return Header(height, width, orientation, name)


def _orientation(image: Image.Image, data: bytes) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns TIFFs itself
    if image.format == "PNG":
        # Pillow would decode the whole picture to find an eXIf chunk behind the pixels.
        exif = Image.Exif()
        exif.load(image.info.get("exif") or _png_chunk(data, b"eXIf"))
    else:
        exif = image.getexif()
    value = exif.get(_ORIENTATION, 1)
    return value if value in _UPRIGHT else 1


def _png_chunk(data: bytes, wanted: bytes) -> bytes:
    """The first chunk of this type, or b"" (also if the file is cut short)."""
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == wanted:
            return data[position + 8 : position + 8 + length]
        position += length + 12
    return b""


@dataclasses.dataclass(frozen=True)
class Picture:
    """Pixels uint8 [H, W, 3] in sRGB, and whether a broken colour profile had to be ignored."""

    pixels: np.ndarray
    profile_ignored: bool = False


class Shares:
    """Lets all threads together work on so many pixels at a time; a larger picture waits until it is alone."""

    def __init__(self, pixels: int) -> None:
        self._pixels, self._taken = pixels, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + pixels <= self._pixels)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


# Decoding takes up to 16 bytes a pixel (WebP), so 6.4 GB at most, however many threads and however large the pictures.
_DECODING = Shares(400_000_000)


def decode(data: bytes, header: Header, bucket: Size, fit: str, noise_key: str = "") -> Picture:
    """Decodes a picture and brings it to its bucket: one Lanczos pass with antialiasing.

    Transparency is laid on white. Colours are converted to sRGB after the resize, where there are fewer.

    Args:
      data: the bytes that `header` was read from.
      bucket: (height, width), pixels.
      fit: "resize", "crop" or "pad".
      noise_key: the padding's noise is a function of this text.

    Raises:
      Rejected: the pixels are damaged or of a kind that is not supported.
    """
    with _DECODING.take(header.height * header.width):
        return _decode(data, header, bucket, fit, noise_key)


def _decode(data: bytes, header: Header, bucket: Size, fit: str, noise_key: str) -> Picture:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
            profile = image.info.get("icc_profile") or b""
            plain = _without_alpha(image)
    except Rejected:
        raise
    except Exception as error:  # noqa: BLE001  the plugins raise whatever their decoder met
        raise Rejected("damaged image", _describe(error)) from error
    turned = header.orientation >= 5
    if (plain.height, plain.width) != (
        (header.width, header.height) if turned else (header.height, header.width)
    ):
        raise Rejected("damaged image", f"the header says {header.width}x{header.height}, not so the pixels")
    plan = geometry((header.height, header.width), bucket, fit)
    box, (rows, columns) = _lying_box(plan.box, header), plan.size
    plain = plain.resize((rows, columns) if turned else (columns, rows), Image.Resampling.LANCZOS, box=box)
    plain, ignored = _to_srgb(plain, profile)
    if header.orientation in _UPRIGHT:
        plain = plain.transpose(_UPRIGHT[header.orientation])
    pixels = np.asarray(plain)
    if plan.size != bucket:
        seed = int.from_bytes(hashlib.sha256(b"padding " + noise_key.encode()).digest()[:16], "little")
        canvas = np.random.Generator(np.random.Philox(key=seed)).integers(0, 256, (*bucket, 3), np.uint8)
        top, left = plan.offset
        canvas[top : top + rows, left : left + columns] = pixels
        pixels = canvas
    return Picture(pixels, ignored)


def _lying_box(box: tuple[float, float, float, float], header: Header) -> tuple[float, float, float, float]:
    """A centred box of the upright picture in the coordinates of the file, which may lie on its side."""
    left, top, right, bottom = box
    return (top, left, bottom, right) if header.orientation >= 5 else (left, top, right, bottom)


def _without_alpha(image: Image.Image) -> Image.Image:
    """The picture in mode L, RGB or CMYK with 8 bits a channel."""
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Rejected("unsupported pixels", "32-bit integers outside 0 to 65535")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if mode == "F":
        raise Rejected("unsupported pixels", "floating point")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        if layered.getextrema()[3][0] < 255:
            layered = Image.alpha_composite(Image.new("RGBA", layered.size, _PAPER), layered)
        return layered.convert("RGB")
    if mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if mode == "1" else "RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, bool]:
    """The picture in sRGB, and whether its profile could not be used."""
    ignored = False
    if profile:
        transform = _transform(profile, image.mode)
        if isinstance(transform, ImageCms.ImageCmsTransform):
            return ImageCms.applyTransform(image, transform), False
        ignored = not transform
    return image.convert("RGB"), ignored


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | bool:
    """The transform to sRGB; True if none is needed, False if the profile is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return True
        return ImageCms.buildTransform(source, _SRGB, mode, "RGB")
    except Exception:  # noqa: BLE001  a profile is data from a stranger; the picture is worth more
        return False


def _describe(error: Exception) -> str:
    """The error in a line that is the same every time: without the addresses of objects."""
    if isinstance(error, UnidentifiedImageError):
        return "none of the formats jpg, png, webp, avif, bmp, tiff"
    return _ADDRESS.sub("", f"{type(error).__name__}: {error}"[:300].replace("\n", " "))


def format_of(head: bytes) -> str | None:
    return (
        "JPEG"
        if head.startswith(b"\xff\xd8\xff")
        else "PNG"
        if head.startswith(b"\x89PNG\r\n\x1a\n")
        else None
    )


def not_read(extension: str) -> str:
    return f"{extension}: convert it to png or jpg"
