"""Image formats: which are read, what each is called, and how a file is opened by its content.

HEIC and JPEG XL are read if `pillow_heif` and `pillow_jxl` can be imported.
"""

from __future__ import annotations

import io
from pathlib import PurePosixPath

from PIL import (  # the plugins register the formats when they are imported
    AvifImagePlugin,
    BmpImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from preprocess.decoding import jxl, webp
from preprocess.decoding.png import Png

_PLUGINS = (
    AvifImagePlugin,
    BmpImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo")
_BMP = (".bmp", ".dib")
_OPTIONAL = {"HEIF": (".heic", ".heif", ".hif"), "JXL": (".jxl",)}
_INSTALL = {"HEIF": "pillow-heif", "JXL": "pillow-jxl-plugin"}
_NAMES = {"JPEG": _JPEG, "MPO": _JPEG, "PNG": (".png",), "WEBP": (".webp",), "AVIF": (".avif",)}
_NAMES |= {"BMP": _BMP, "DIB": _BMP, "TIFF": (".tif", ".tiff")}
# Pictures are judged by `Limits.max_pixels` before they are decoded; Pillow's limit is not the caller's.
Image.MAX_IMAGE_PIXELS = None


def _register_plugins() -> list[str]:
    """Registers the optional plugins that are installed and returns their formats."""
    found = []
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
        found.append("HEIF")
    except Exception:  # noqa: BLE001  a plugin that cannot be loaded is as good as none
        pass
    try:
        import pillow_jxl  # noqa: F401  registers itself

        found.append("JXL")
    except Exception:  # noqa: BLE001
        pass
    return found


_NAMES |= {name: _OPTIONAL[name] for name in _register_plugins()}
EXTENSIONS = tuple(dict.fromkeys(extension for names in _NAMES.values() for extension in names))
_NEVER = ".gif .jp2 .psd .svg .ico .tga .exr .hdr .apng .ppm .pgm .eps"
_NEVER += " .raw .dng .cr2 .cr3 .nef .nrw .arw .srw .orf .rw2 .raf .pef .3fr"
OTHER_IMAGES = (
    *_NEVER.split(),
    *(extension for name in _OPTIONAL for extension in _OPTIONAL[name] if name not in _NAMES),
)
_READ = tuple(name for name in _NAMES if name != "MPO")  # Pillow opens an MPO as a JPEG


def not_read(extension: str) -> str:
    """What to do about a file of a type in `OTHER_IMAGES`, in a line."""
    for name, extensions in _OPTIONAL.items():
        if extension in extensions:
            return f"{extension}: pip install {_INSTALL[name]}, or convert it to png or jpg"
    return f"{extension}: convert it to png or jpg"


def without_reader(head: bytes) -> str:
    """`not_read` if a file that begins so needs a plugin that is not installed, else ""."""
    name = format_of(head)
    return not_read(_OPTIONAL[name][0]) if name in _OPTIONAL and name not in _NAMES else ""


def has_other_extension(name: str, format: str) -> bool:  # noqa: A002
    """Whether a file's name has the extension of another format than `format`, which it is in."""
    extension = PurePosixPath(name).suffix.lower()
    return extension in (*EXTENSIONS, *OTHER_IMAGES) and extension not in _NAMES.get(format, ())


def format_of(head: bytes) -> str | None:
    """The format of an image by the first 64 bytes of its file, readable here or not; None if it is none of them.

    Returns:
      "JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "HEIF" or "JXL".
    """
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    # Two letters are not enough: a text may begin with them.
    if head[:2] == b"BM" and head[14:18] in _BMP_HEADERS:
        return "BMP"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "JXL"
    if head[4:8] == b"ftyp":
        brands = {head[i : i + 4] for i in (8, *range(16, min(int.from_bytes(head[:4]), len(head)), 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
            return "HEIF"
    return None


_BMP_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124))


def stated_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels of a file whose plugin takes memory for all of them when it is opened."""
    match format_of(data[:64]):
        case "WEBP":
            return webp.size(data)
        case "JXL":
            return jxl.size(data)
    return None


def open_image(data: bytes) -> tuple[ImageFile.ImageFile, Png | None]:
    """The opened image, and the chunks of a PNG.

    Raises:
      Exception: whatever Pillow's plugins raise.
    """
    png = Png.read(data) if format_of(data[:64]) == "PNG" else None
    try:
        return Image.open(io.BytesIO(png.pixels if png else data), formats=_READ), png
    except OSError:
        whole = webp.completed(data) if format_of(data[:64]) == "WEBP" else None
        if whole is None:
            raise
        return Image.open(io.BytesIO(whole), formats=_READ), None


def frames(image: ImageFile.ImageFile, data: bytes) -> int:
    """How many frames or pages an image has that are shown: 2 stands for several of an unknown number."""
    if image.format == "MPO":  # a camera's JPEG with a second view behind it
        return 1
    if image.format == "HEIF":  # the primary picture of a collection is shown
        return 2 if (image.get_format_mimetype() or "").endswith("-sequence") else 1
    if image.format == "JXL":
        return 2 if jxl.is_animated(data) else 1
    return getattr(image, "n_frames", 1)
