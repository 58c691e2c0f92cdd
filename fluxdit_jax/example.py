"""`tf.train.Example` without copies: where in a serialised record each feature's bytes lie.

The protobuf library copies a record twice: once to parse it, and once more for each value that is asked for. A
record here is three large tensors and a few words, so `spans` finds them in place. It knows only the form that
every serialiser writes (no field unknown, out of order or split up); for anything else the library is asked. The
form is https://protobuf.dev/programming-guides/encoding/ of

    Example { Features features = 1; }        Features { map<string, Feature> feature = 1; }
    Feature { BytesList bytes_list = 1; FloatList float_list = 2; Int64List int64_list = 3; }
    BytesList { repeated bytes value = 1; }   Int64List { repeated int64 value = 1 [packed]; }
"""

from __future__ import annotations

_FIRST, _SECOND, _THIRD = 0x0A, 0x12, 0x1A  # tags of fields 1, 2 and 3, length-delimited
BYTES, INTEGERS = _FIRST, _THIRD  # which list a Feature holds


def spans(data: bytes) -> dict[bytes, tuple[int, int, int]] | None:
    """Of every feature of an `Example`: (BYTES, start and end of its one value) or (INTEGERS, of all, packed).

    None if the bytes are not an `Example`, or one in another form: with a list of several byte strings or of
    floats, or written by other rules. Whatever it returns is what the protobuf library would read.
    """
    found = {}
    size = len(data)
    try:
        if data[0] != _FIRST:
            return None
        position, length = _varint(data, 1)
        if position + length != size:
            return None
        while position < size:
            # an entry of the map: its length, its key and its Feature, which fills the rest of it
            if data[position] != _FIRST:
                return None
            position, length = _varint(data, position + 1)
            end = position + length
            if data[position] != _FIRST:
                return None
            position, length = _varint(data, position + 1)
            key = data[position : position + length]
            position += length
            if end > size or data[position] != _SECOND or key in found or not key.isascii():
                return None
            position, length = _varint(data, position + 1)
            if position + length != end:
                return None
            # the Feature: one list, which fills it; in the list one value, which fills that
            kind = data[position]
            if kind != BYTES and kind != INTEGERS:
                return None
            position, length = _varint(data, position + 1)
            if position + length != end or data[position] != _FIRST:
                return None
            position, length = _varint(data, position + 1)
            if position + length != end:
                return None
            found[key] = (kind, position, end)
            position = end
    except IndexError:  # cut short
        return None
    return found


def integers(data: bytes, start: int, end: int) -> tuple[int, ...]:
    """The packed int64 values between these bytes; raises ValueError if the last is cut short."""
    values = []
    try:
        while start < end:
            start, value = _varint(data, start)
            values.append(value - 2**64 if value >= 2**63 else value)
    except IndexError:
        start = end + 1
    if start != end:
        raise ValueError("a list of integers is cut short")
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
