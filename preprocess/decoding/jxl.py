"""The first bits of a JPEG XL file (ISO/IEC 18181-1): its plugin decodes all pixels when it opens a file."""

from __future__ import annotations

_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


class _Bits:
    """Numbers of some bits each, the lowest bit first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "little"), 8 * len(data)

    def __call__(self, count: int) -> int:
        if count > self._left:
            raise ValueError("a JPEG XL file of which not even the header is there")
        value = self._value & ((1 << count) - 1)
        self._value >>= count
        self._left -= count
        return value


def size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels, as stored; raises ValueError if the file is too short to say."""
    return _size(_Bits(_codestream(data)))


def is_animated(data: bytes) -> bool:
    bits = _Bits(_codestream(data))
    _size(bits)
    if bits(1) or not bits(1):  # all metadata has its default; none of the less usual fields is there
        return False
    bits(3)  # orientation
    if bits(1):
        _size(bits)  # on the screen
    return not bits(1) and bool(bits(1))  # a preview, and behind its size the animation


def _size(bits: _Bits) -> tuple[int, int]:
    small = bits(1)

    def side() -> int:
        return 8 * (bits(5) + 1) if small else bits((9, 13, 18, 30)[bits(2)]) + 1

    height = side()
    ratio = bits(3)
    if not ratio:
        return side(), height
    across, down = _RATIOS[ratio]
    return height * across // down, height


def _codestream(data: bytes) -> bytes:
    """The first bytes of the codestream behind its signature."""
    position, skipped = 0, 0
    while data[position : position + 2] != b"\xff\x0a":
        length, kind = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        start = position + 8
        if length == 1:
            length, start = int.from_bytes(data[start : start + 8]), start + 8
        skipped += 1
        if kind == b"jxlc" or kind == b"jxlp":
            position = start + 4 * (kind == b"jxlp")  # the number of the part
            return data[position + 2 : position + 66]
        if length < 8 or position + length > len(data) or skipped > 1000:
            raise ValueError("a JPEG XL file without a codestream")
        position += length
    return data[position + 2 : position + 66]
