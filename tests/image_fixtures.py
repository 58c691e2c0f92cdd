"""What the tests of images share: small pictures, files of them, and what `decode` makes of a file."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from preprocess.decoding.images import Limits, Picture, decode, read_header

LIMITS = Limits(min_side=8)
COLOURS = {"red": (200, 30, 40), "green": (40, 180, 60), "blue": (30, 60, 190), "grey": (128, 128, 128)}


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:  # noqa: A002
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def four_quarters() -> Image.Image:
    """48 wide, 32 high: red | green over blue | grey."""
    image = Image.new("RGB", (48, 32))
    for i, colour in enumerate(COLOURS.values()):
        image.paste(colour, ((i % 2) * 24, (i // 2) * 16, (i % 2) * 24 + 24, (i // 2) * 16 + 16))
    return image


def corners(pixels: np.ndarray) -> list[str]:
    """Names of the colours in the middle of the four quarters, row by row."""
    height, width = pixels.shape[:2]
    names = []
    for y in (height // 4, 3 * height // 4):
        for x in (width // 4, 3 * width // 4):
            distance = {n: np.abs(pixels[y, x].astype(int) - c).max() for n, c in COLOURS.items()}
            name = min(distance, key=distance.get)
            assert distance[name] < 12, (pixels[y, x], distance)
            names.append(name)
    return names


def whole(data: bytes, fit: str = "resize", bucket: tuple[int, int] | None = None) -> np.ndarray:
    header = read_header(data, LIMITS)
    return decode(data, header, bucket or (header.height, header.width), fit).pixels


UPRIGHT = ["red", "green", "blue", "grey"]
# What the eight EXIF orientations make of the file's quarters, from the EXIF 2.3 table.
TURNED = {
    1: UPRIGHT,
    2: ["green", "red", "grey", "blue"],
    3: ["grey", "blue", "green", "red"],
    4: ["blue", "grey", "red", "green"],
    5: ["red", "blue", "green", "grey"],
    6: ["blue", "red", "grey", "green"],
    7: ["grey", "green", "blue", "red"],
    8: ["green", "grey", "red", "blue"],
}


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def read(data: bytes) -> Picture:
    """The picture in its own size."""
    header = read_header(data, LIMITS)
    return decode(data, header, (header.height, header.width), "resize")


def with_chunks(data: bytes, *chunks: bytes, behind: bool = False) -> bytes:
    """A PNG with more chunks: before the pixels, or behind them."""
    at = data.rindex(b"IEND") - 4 if behind else data.index(b"IDAT") - 4
    return data[:at] + b"".join(chunks) + data[at:]


def animated(format: str) -> bytes:  # noqa: A002
    frames = [Image.new("RGB", (32, 32), (i * 60, 0, 0)) for i in range(3)]
    return encode(frames[0], format, save_all=True, append_images=frames[1:])
