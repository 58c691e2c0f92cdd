"""Hypothesis strategies of damaged and hostile input: bytes with changes, JSON trees with odd values."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

# --------------------------------------------------------------------------------------------- damaged bytes

INTERESTING = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**64 - 1,
]


@st.composite
def damaged(draw: st.DrawFn, examples: list[bytes], tokens: tuple[bytes, ...] = (b"\0", b"\xff", b"\n")) -> bytes:
    """One of the examples with up to five changes."""
    data = bytearray(draw(st.sampled_from(examples)))
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "token", "cut", "drop", "repeat", "number", "text"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "token":
                data[at:at] = draw(st.sampled_from(tokens))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 64))]
            case "repeat":
                data[at:at] = bytes(data[at : at + draw(st.integers(1, 64))]) * draw(st.integers(1, 50))
            case "number":
                value, size = draw(st.sampled_from(INTERESTING)), draw(st.sampled_from([1, 2, 4, 8]))
                order = draw(st.sampled_from(["little", "big"]))
                data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, order)
            case "text":
                data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=16))
    return bytes(data)


# --------------------------------------------------------------------------------------------- odd JSON

DEEP = "@deep@"  # stands for a nesting that json.dumps itself could not write
NUMBERS = [
    0,
    -1,
    1,
    2**31,
    2**40,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
]
TEXTS = [
    "",
    "\0",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "x" * 5000,
    "\ud800",
    "\x1b[31m",
    "512",
    DEEP,
]
NESTED = [None, True, False, [], {}, [[]], {"": {}}, [1, 2, 3], ["a", None], {"a": [1e308]}, [["x"] * 9] * 9]
odd = st.sampled_from([*NUMBERS, *TEXTS, *NESTED]) | st.text(max_size=8) | st.integers() | st.floats()
odd = odd.map(copy.deepcopy)


@st.composite
def odd_tree(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one to three odd values, missing members or new ones."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node, path = tree, draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
        for choice in path:
            if not isinstance(node, dict | list) or not node:
                break
            keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
            key = keys[choice % len(keys)]
            if isinstance(node[key], dict | list) and node[key] and choice != path[-1]:
                node = node[key]
                continue
            match draw(st.sampled_from(["value", "value", "drop", "add"])):
                case "value":
                    node[key] = draw(odd)
                case "drop":
                    del node[key]
                case "add" if isinstance(node, dict):
                    node[draw(st.text(max_size=5))] = draw(odd)
                case "add":
                    node.append(draw(odd))
            break
    return tree


def written(tree: Any) -> str:
    """JSON as Python's own writer makes it (with NaN and Infinity), and the deep places deep."""
    return json.dumps(tree).replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000)


def json_text(tree: Any) -> st.SearchStrategy[bytes]:
    """Odd trees, and damaged text of the right one."""
    whole = json.dumps(tree, indent=1).encode()
    tokens = (
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b"[" * 2000,
        b'"\\ud800"',
        b"\xef\xbb\xbf",
        b"null",
        b"{",
        b"]",
    )
    return odd_tree(tree).map(lambda found: written(found).encode("utf-8", "replace")) | damaged([whole], tokens)
