"""WebP files as chunks: the size that one states, and one whose container is a few bytes short."""

from __future__ import annotations

import struct

_PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANMF")


def size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of the canvas in pixels, or None if the file does not say."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<2H", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    return None


def completed(data: bytes) -> bytes | None:
    """The file with the size that its chunks have, or None if bytes of the picture are missing.

    A wrong size in the first chunk, a missing padding byte at the end and chunks cut short behind the
    picture do not touch a pixel.
    """
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        if position + 8 + length > len(data):
            if kind in _PIXELS:
                return None
            break
        position += 8 + length + length % 2
    body = data[8:position]
    body += b"\0" * (position - 8 - len(body))
    return b"RIFF" + struct.pack("<I", len(body)) + body
