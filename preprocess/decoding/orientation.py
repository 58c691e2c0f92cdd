"""Which way up a picture is: its EXIF and XMP, wherever a format keeps them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from PIL import Image, TiffImagePlugin

from preprocess.decoding.png import Png

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_IN_XMP = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([0-9])")
_XMP_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0"


def orientation(image: Image.Image, png: Png | None) -> int:
    """1 to 8, as in EXIF: what is still to be done with the pixels that Pillow decodes.

    The same as Pillow's `exif_transpose` does, and a little more: EXIF before XMP, and of a PNG also the
    profiles that ImageMagick keeps in texts.
    """
    if image.format == "TIFF" or (image.format == "JXL" and not getattr(image, "jpeg", False)):
        return 1  # their decoders turn the pixels
    exif = read_exif(image, png)
    value = exif.get(_ORIENTATION) if _ORIENTATION in exif else _in_xmp(image, png)
    return next((turn for turn in TURNS if turn == value), 1)


def is_size_turned(image: Image.Image) -> bool:
    """Whether decoding exchanges the sides of an image: Pillow turns a TIFF by its XMP, unannounced."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or _ORIENTATION in image.tag_v2:
        return False
    return image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)


def read_exif(image: Image.Image, png: Png | None) -> Image.Exif:
    """The EXIF of an image; an empty one if there is none or it is damaged."""
    if image.format == "TIFF":
        return image.getexif()
    exif = Image.Exif()
    block = next(_exif_blocks(png), b"") if png else image.info.get("exif")
    try:
        exif.load(block or b"")
    except Exception:  # noqa: BLE001  a stranger's data; the picture is worth more
        return Image.Exif()
    return exif


def _exif_blocks(png: Png) -> Iterator[bytes]:
    yield from (block for block in (png.chunks.get(b"eXIf"), png.texts.get(b"exif")) if block)
    for keyword in (b"Raw profile type exif", b"Raw profile type APP1"):
        block = _raw_profile(png.texts.get(keyword, b""))
        if block and not block.startswith(_XMP_SEGMENT):
            yield block


def _in_xmp(image: Image.Image, png: Png | None) -> int | None:
    if png is None:
        packets = [image.info.get("XML:com.adobe.xmp"), image.info.get("xmp")]
    else:
        packets = [png.texts.get(b"XML:com.adobe.xmp")]
        packets += [_raw_profile(png.texts.get(b"Raw profile type " + kind, b"")) for kind in (b"xmp", b"APP1")]
    for packet in packets:
        data = packet.encode() if isinstance(packet, str) else packet
        if data and (found := _IN_XMP.search(data)):
            return int(found[1])
    return None


def _raw_profile(text: bytes) -> bytes:
    """The bytes of a "Raw profile": its name and its length, each in a line, and hexadecimal digits."""
    lines = text.lstrip().split(b"\n", 2)
    if len(lines) < 3 or not lines[1].strip().isdigit():
        return b""
    try:
        return bytes.fromhex(lines[2].decode("ascii"))
    except ValueError:
        return b""
