"""`tf.train.Example` without copies: where in a serialised record the value of each feature lies.

The protobuf library copies a record twice: once to parse it, and once more for each value that is asked for. A
record here is three large tensors and a few words, so `spans` finds them in place. It knows only the form in which
every serialiser writes these features, sorted by name; whatever is in another form is for the library. The form is
https://protobuf.dev/programming-guides/encoding/ of

    Example { Features features = 1; }        Features { map<string, Feature> feature = 1; }
    Feature { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; }
    BytesList { repeated bytes value = 1; }   Int64List { repeated int64 value = 1 [packed]; }
"""

from __future__ import annotations

import functools

_FIRST, _SECOND, _THIRD = 0x0A, 0x12, 0x1A  # tags of fields 1, 2 and 3, length-delimited
BYTES, INTEGERS = _FIRST, _THIRD  # which list a Feature holds
# An entry of a file of ours has a few hundred sizes (of captions, of text); a damaged one may claim any.
_REMEMBERED = 4096


def spans(data: bytes, features: dict[bytes, int]) -> list[tuple[int, int]] | None:
    """(start, end) of the value of each feature of an `Example`.

    Args:
      features: of each feature, in the order of their names: BYTES, of which it must have one value, or INTEGERS,
        whose span is that of all of them, packed.

    Returns:
      None if the bytes are not an `Example` of these features in the usual form. What it finds is what the protobuf
      library would read.
    """
    try:
        if data[0] != _FIRST:
            return None
        position, length = _varint(data, 1)
        if position + length != len(data):
            return None
        found = []
        for name, kind in features.items():
            length = data[position + 1]
            if length > 127:
                _, length = _varint(data, position + 1)
            # All that stands before the value follows from the size of the entry: one comparison checks it.
            header, size = _entry(name, kind, length)
            if header is None or not data.startswith(header, position):
                return None
            start = position + len(header)
            position = start + size
            found.append((start, position))
    except IndexError:  # cut short
        return None
    return found if position == len(data) else None


@functools.lru_cache(_REMEMBERED)
def _entry(name: bytes, kind: int, length: int) -> tuple[bytes | None, int]:
    """What stands before the value in a map entry of this length, and the value's size; (None, 0): there is none."""
    key = _field(_FIRST, len(name)) + name
    rest = length - len(key)
    # Three lengths stand before the value: of the Feature, of its list and of the value itself.
    for size in range(max(0, rest - 3 * 11), rest):
        value = _field(_FIRST, size)
        values = _field(kind, len(value) + size)
        feature = _field(_SECOND, len(values) + len(value) + size)
        if len(key) + len(feature) + len(values) + len(value) + size == length:
            return _field(_FIRST, length) + key + feature + values + value, size
    return None, 0


def _field(tag: int, length: int) -> bytes:
    """The tag and the length of a field."""
    written = bytearray([tag])
    while length > 127:
        written.append(length & 127 | 128)
        length >>= 7
    written.append(length)
    return bytes(written)


@functools.lru_cache(_REMEMBERED)
def integers(packed: bytes) -> tuple[int, ...]:
    """The packed int64 values; raises ValueError if the last is cut short."""
    values, position = [], 0
    try:
        while position < len(packed):
            position, value = _varint(packed, position)
            values.append(value - 2**64 if value >= 2**63 else value)
    except IndexError:
        raise ValueError("a list of integers is cut short") from None
    return tuple(values)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(position behind it, value modulo 2**64) of a varint; IndexError if it is cut short or too long."""
    value = data[position]
    if value < 128:
        return position + 1, value
    value &= 127
    for shift in range(7, 70, 7):
        position += 1
        byte = data[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return position + 1, value & (2**64 - 1)
    raise IndexError
