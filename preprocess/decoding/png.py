"""PNG files as chunks: those that make the pixels, and what the others say about them.

Pillow refuses a picture for a long text, a large profile or a damaged chunk that its pixels do not need. So it
is given the chunks that make the pixels, and the others are read here, as far as they are wanted.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib

MAX_INFLATED = 16_000_000  # bytes that a compressed profile or text may have
_HEADER = 8  # length and type of a chunk, or the file's signature
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_WANTED = (b"exif", b"Raw profile type exif", b"Raw profile type APP1", b"Raw profile type xmp", b"XML:com.adobe.xmp")


@dataclasses.dataclass(frozen=True)
class Png:
    """A PNG file taken apart.

    Attributes:
      pixels: a file with the chunks that make the pixels, transparency among them, and no others.
      chunks: the others by type, without texts and those with a wrong checksum; of several, the last.
      texts: texts that may hold metadata, by keyword; of several, the last.
    """

    pixels: bytes
    chunks: dict[bytes, bytes]
    texts: dict[bytes, bytes]

    @classmethod
    def read(cls, data: bytes) -> Png:
        """Takes a file apart; one that is cut short as far as it goes."""
        chunks: dict[bytes, bytes] = {}
        texts: dict[bytes, tuple[bytes, bytes]] = {}
        kept: list[list[int]] = [[0, _HEADER]]
        position = _HEADER
        while position + _HEADER <= len(data):
            length, kind = struct.unpack_from(">I4s", data, position)
            start, end = position + _HEADER, position + length + 12
            # A decoder leaves out a damaged chunk that it can do without; transparency is one of these.
            if kind in _CRITICAL or kind in _ANIMATION or (kind == b"tRNS" and _is_sound(data, start, end)):
                if kept[-1][1] == position:
                    kept[-1][1] = end
                else:
                    kept.append([position, end])
            elif kind in _TEXTS:
                keyword = data[start : start + 80].partition(b"\0")[0]
                if keyword in _WANTED and _is_sound(data, start, end):
                    texts[keyword] = kind, data[start + len(keyword) + 1 : end - 4]
            elif _is_sound(data, start, end):
                chunks[kind] = data[start : end - 4]
            position = end
            if kind == b"IEND":
                break
        whole = len(kept) == 1 and kept[0][1] == position  # what follows the last chunk is not looked at
        pixels = data if whole else b"".join(data[start:end] for start, end in kept)
        return cls(pixels, chunks, {keyword: _text(*text) for keyword, text in texts.items()})

    def profile(self) -> bytes | None:
        """The ICC profile, None if there is none; b"" if it is damaged or too large."""
        if b"iCCP" not in self.chunks:
            return None
        return inflate(self.chunks[b"iCCP"].partition(b"\0")[2][1:])


def _is_sound(data: bytes, start: int, end: int) -> bool:
    """Whether the chunk with its content at `start` and its checksum before `end` is as it was written."""
    view = memoryview(data)
    return view[end - 4 : end] == struct.pack(">I", zlib.crc32(view[start - 4 : end - 4]))


def _text(kind: bytes, content: bytes) -> bytes:
    if kind == b"tEXt":
        return content
    if kind == b"zTXt":
        return inflate(content[1:])
    text = content[2:].split(b"\0", 2)[-1]  # behind the language and the translated keyword
    return inflate(text) if content[:1] == b"\1" else text


def inflate(data: bytes) -> bytes:
    """The uncompressed bytes, or b"" if they are damaged or more than `MAX_INFLATED`."""
    engine = zlib.decompressobj()
    try:
        plain = engine.decompress(data, MAX_INFLATED)
    except zlib.error:
        return b""
    return b"" if engine.unconsumed_tail else plain
