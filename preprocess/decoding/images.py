"""From the bytes of an image file to upright sRGB pixels of a bucket's size, safely.

Two steps: `read_header` at planning (nothing is decoded) and `decode` when the picture is needed. Both are
given bytes and never a path, and both turn whatever Pillow raises into `Rejected`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import threading
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from preprocess.buckets import Size, geometry
from preprocess.decoding import colour, formats, jpeg
from preprocess.decoding.orientation import TURNS, is_size_turned, orientation, read_exif
from preprocess.decoding.png import Png

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
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
    """What a file says of its picture.

    Attributes:
      height, width: of the upright picture, pixels.
      orientation: 1 to 8 as in EXIF, what makes the decoded pixels upright.
      format: Pillow's name of the file's format.
      version: of `decode`, the one since which the file gives the pixels that it gives. 2: orientation or
        colours come from where version 1 does not look. 3: one channel of more than 8 bits that is not as in most
        files, see `_Wide`.
    """

    height: int
    width: int
    orientation: int
    format: str
    version: int = 1


def read_header(data: bytes, limits: Limits) -> Header:
    """Size and orientation, without decoding a pixel.

    JPEG XL is the exception: its plugin decodes a file that it opens.

    Raises:
      Rejected: empty, not an image, animated, too large, too small or too narrow.
    """
    if not data:
        raise Rejected("zero bytes")
    if missing := formats.without_reader(data[:64]):
        raise Rejected("image type is not read", missing)
    try:
        _check_size(formats.stated_size(data), limits)
        image, png = formats.open_image(data)
        with image:
            _check_size(image.size, limits)
            if (frames := formats.frames(image, data)) > 1:
                raise Rejected("animated or several pages", f"{frames} frames")
            width, height = image.size[::-1] if is_size_turned(image) else image.size
            turn, name = orientation(image, png), image.format or "?"
            version = _version(image, png, data, turn)
    except Rejected:
        raise
    except Exception as error:  # noqa: BLE001  the plugins raise whatever their parser met
        raise Rejected("not an image", _describe(error)) from error
    if turn >= 5:
        width, height = height, width
    if min(width, height) < limits.min_side:
        raise Rejected("too small", f"{width}x{height}, the shorter side must have {limits.min_side} pixels")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise Rejected("absurd aspect ratio", f"{width}x{height}, more than {limits.max_aspect:g} to 1")
    return Header(height, width, turn, name, version)


def _check_size(size: tuple[int, int] | None, limits: Limits) -> None:
    if size and size[0] * size[1] > limits.max_pixels:
        raise Rejected("too many pixels", f"{size[0]}x{size[1]}, the limit is {limits.max_pixels:,}")


def _version(image: Image.Image, png: Png | None, data: bytes, turn: int) -> int:
    if (wide := _Wide.of(image)) and wide != _Wide():
        return 3
    if png and turn != orientation(image, dataclasses.replace(png, texts={})):
        return 2
    profile = colour.profile_of(image, png, read_exif(image, png), data)
    mode = "L" if image.mode in ("1", "L", "I") or image.mode.startswith("I;16") else image.mode
    mode = mode if mode in ("L", "CMYK") and "transparency" not in image.info else "RGB"
    return 1 if colour.is_version_1(colour.icc_profile(image, png), profile, mode) else 2


@dataclasses.dataclass(frozen=True)
class _Wide:
    """One channel of more than 8 bits: its largest value, whether that is black, and the one that is transparent."""

    largest: int = 65535
    inverted: bool = False
    transparent: int | None = None

    @classmethod
    def of(cls, image: Image.Image) -> _Wide | None:
        """None of a picture of another kind."""
        if image.mode != "I" and not image.mode.startswith("I;16"):
            return None
        tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        (bits, *_) = tags.get(BITSPERSAMPLE, (16,))
        inverted = tags.get(PHOTOMETRIC_INTERPRETATION) == 0
        transparent = image.info.get("transparency")
        return cls(2 ** min(bits, 16) - 1, inverted, transparent if isinstance(transparent, int) else None)

    def eight_bits(self, image: Image.Image) -> Image.Image:
        """The picture in mode L; raises `Rejected` for values that are not of 16 bits."""
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > self.largest:
            raise Rejected("unsupported pixels", f"integers outside 0 to {self.largest}")
        levels = ((values * 255 + self.largest // 2) // self.largest).astype(np.uint8)
        if self.inverted:
            levels = 255 - levels
        if self.transparent is not None:
            levels[values == self.transparent] = _PAPER[0]
        return Image.fromarray(levels)


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
    """Decodes a picture and brings it to its bucket: `decode_at` of one bucket."""
    return decode_at(data, header, [bucket], fit, noise_key)[bucket]


def decode_at(
    data: bytes, header: Header, buckets: Iterable[Size], fit: str, noise_key: str = ""
) -> dict[Size, Picture]:
    """Decodes a picture once and brings it to each of the buckets: one Lanczos pass with antialiasing for each.

    Transparency is laid on white. Colours are converted to sRGB after the resize, where there are fewer.

    Args:
      data: the bytes that `header` was read from.
      buckets: (height, width), pixels.
      fit: "resize", "crop" or "pad".
      noise_key: the padding's noise is a function of this text.

    Raises:
      Rejected: the pixels are damaged or of a kind that is not supported.
    """
    with _DECODING.take(header.height * header.width):
        plain, profile = _loaded_plain(data, header)
        return {bucket: _brought(plain, profile, header, bucket, fit, noise_key) for bucket in buckets}


def _loaded_plain(data: bytes, header: Header) -> tuple[Image.Image, bytes]:
    """All pixels as they lie in the file, without transparency, and their colour profile."""
    try:
        image, png = formats.open_image(data)
        with image:
            if sorted(image.size) != sorted((header.width, header.height)):
                raise Rejected("damaged image", f"the header says {header.width}x{header.height}, not so the file")
            profile = colour.profile_of(image, png, read_exif(image, png), data)
            plain = _without_alpha(_loaded(image, data))
    except Rejected:
        raise
    except Exception as error:  # noqa: BLE001  the plugins raise whatever their decoder met
        raise Rejected("damaged image", _describe(error)) from error
    turned = header.orientation >= 5
    if (plain.height, plain.width) != ((header.width, header.height) if turned else (header.height, header.width)):
        raise Rejected("damaged image", f"the header says {header.width}x{header.height}, not so the pixels")
    return plain, profile


def _brought(plain: Image.Image, profile: bytes, header: Header, bucket: Size, fit: str, noise_key: str) -> Picture:
    """The upright picture in its bucket."""
    turned = header.orientation >= 5
    plan = geometry((header.height, header.width), bucket, fit)
    box, (rows, columns) = _lying_box(plan.box, header), plan.size
    plain = plain.resize((rows, columns) if turned else (columns, rows), Image.Resampling.LANCZOS, box=box)
    plain, ignored = colour.to_srgb(plain, profile)
    if header.orientation in TURNS:
        plain = plain.transpose(TURNS[header.orientation])
    pixels = np.asarray(plain)
    if plan.size != bucket:
        seed = int.from_bytes(hashlib.sha256(b"padding " + noise_key.encode()).digest()[:16], "little")
        canvas = np.random.Generator(np.random.Philox(key=seed)).integers(0, 256, (*bucket, 3), np.uint8)
        top, left = plan.offset
        canvas[top : top + rows, left : left + columns] = pixels
        pixels = canvas
    return Picture(pixels, ignored)


def _loaded(image: Image.Image, data: bytes) -> Image.Image:
    """The image with its pixels; a JPEG may lack its end, but no pixel."""
    if image.format in ("JPEG", "MPO") and not jpeg.has_end(data):
        whole = jpeg.completed(data)
        if whole is None:
            raise Rejected("damaged image", "the end of the file is missing, and pixels with it")
        image, _ = formats.open_image(whole)
    image.load()
    return image


def _lying_box(box: tuple[float, float, float, float], header: Header) -> tuple[float, float, float, float]:
    """A centred box of the upright picture in the coordinates of the file, which may lie on its side."""
    left, top, right, bottom = box
    return (top, left, bottom, right) if header.orientation >= 5 else (left, top, right, bottom)


def _without_alpha(image: Image.Image) -> Image.Image:
    """The picture in mode L, RGB or CMYK with 8 bits a channel."""
    mode = image.mode
    if wide := _Wide.of(image):
        return wide.eight_bits(image)
    if mode == "F":
        raise Rejected("unsupported pixels", "floating point")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        if any(layered.histogram()[3 * 256 : -1]):  # an alpha below 255
            layered = Image.alpha_composite(Image.new("RGBA", layered.size, _PAPER), layered)
        return layered.convert("RGB")
    if mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if mode == "1" else "RGB")


def _describe(error: Exception) -> str:
    """The error in a line that is the same every time: without the addresses of objects."""
    if isinstance(error, UnidentifiedImageError):
        return "none of the formats jpg, png, webp, avif, bmp, tiff"
    return _ADDRESS.sub("", f"{type(error).__name__}: {error}"[:300].replace("\n", " "))
