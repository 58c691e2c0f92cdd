"""Captions: texts from files beside an image and from rows of tables, and which of them a picture gets.

A picture's sources are looked at in order (`Source.group`), and all usable captions of the first group that has any
are taken. A source without a usable caption hides none behind it; it is counted.
"""

from __future__ import annotations

import codecs
import collections
import dataclasses
import itertools
import json
import re
import unicodedata
from typing import Any

from fluxdit_jax.dataset.captions import MAX_CAPTIONS
from preprocess.decoding.images import Rejected
from preprocess.input.byte_source import ByteSource

FIELDS = ("caption", "text", "captions")
MAX_CHARACTERS = 20_000  # about 8 times what 512 tokens hold
MAX_BYTES = 4_000_000  # of one caption file
# Longest first: the mark of UTF-16 is the beginning of that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Letters and symbols by their category that show nothing: Hangul fillers, the empty Braille pattern, and what stands
# for a character that could not be decoded.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800\ufffd\ufffc")
NUL_HINT = "it has NUL characters, as UTF-16 without a byte order mark does: save it as UTF-8"
UTF8_HINT = "save it as UTF-8: `iconv -f ENCODING -t UTF-8`, with WINDOWS-1252, UTF-16LE or what `file -i` finds"
_ISO_2022 = re.compile(r"\x1b[$(][@BJ]")  # how it changes to another alphabet


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """One place where captions of a picture may stand.

    Attributes:
      name: of the file below its folder, or the table and the line.
      group: sources of one group hold different captions of one picture; a lower group is looked at first.
      place: the file; None for a row of a table.
      type: of the file: ".json" or ".txt".
      texts: of a row: its captions, or why it has none.
      only: at most one file of the group, whatever its type, may have a usable caption; the first type of it counts.
    """

    name: str
    group: int
    place: ByteSource | None = None
    type: str = ""
    texts: tuple[str, ...] | Rejected = ()
    only: bool = False

    def read(
        self, names: tuple[str, ...], passed_over: collections.Counter[str], lists: bool = False
    ) -> tuple[str, ...]:
        """The captions; raises `Rejected` if there is no usable one. `lists`: also of a JSON list of texts."""
        if self.place is not None:
            data = self.place.read(MAX_BYTES)
            return from_json(data, names, passed_over, lists) if self.type == ".json" else (from_text(data),)
        if isinstance(self.texts, Rejected):
            raise self.texts
        return self.texts


def choose(sources: tuple[Source, ...], names: tuple[str, ...]) -> tuple[tuple[str, ...], collections.Counter[str]]:
    """The captions of a picture, all different, in order; and what was passed over, counted by reason.

    A JSON file that is a list of texts, which may as well be tags, counts where there is no other caption.

    Args:
      sources: in order of preference.
      names: fields of a JSON object that hold captions, in order.

    Raises:
      Rejected: no source has a usable caption; the detail names each. Or one could not be read (`transient`): another
        one in its place would be a caption that the next build takes back.
    """
    try:
        return _chosen(sources, names, lists=False)
    except Rejected as rejected:
        if rejected.transient:
            raise
    return _chosen(sources, names, lists=True)


def _chosen(
    sources: tuple[Source, ...], names: tuple[str, ...], lists: bool
) -> tuple[tuple[str, ...], collections.Counter[str]]:
    passed_over: collections.Counter[str] = collections.Counter()
    failures: list[tuple[str, Rejected]] = []
    looked_at = 0
    for _, group in itertools.groupby(sources, key=lambda source: source.group):
        found: dict[str, None] = {}
        usable: set[str] = set()  # files, without their extension
        for source in group:
            looked_at += 1
            stem = source.name.rpartition(".")[0]
            if source.only and stem in usable:
                continue
            try:
                texts = source.read(names, passed_over, lists)
            except Rejected as rejected:
                if rejected.transient:
                    raise
                failures.append((source.name, rejected))
                continue
            usable.add(stem)
            if source.only and len(usable) > 1:
                what = f"{' and '.join(sorted(usable))} both have one: name the right one as the picture"
                raise Rejected("several captions of one name", what)
            for text in texts:
                if text in found or len(found) == MAX_CAPTIONS:
                    what = f"more than {MAX_CAPTIONS} captions" if text not in found else "the same caption again"
                    passed_over[what] += 1
                else:
                    found[text] = None
        if found:
            passed_over.update(rejected.reason for _, rejected in failures)
            if rows := sum(source.place is None for source in sources[looked_at:]):
                passed_over["a row for a picture that has a caption"] += rows
            return tuple(found), passed_over
    raise _none_usable(failures)


def _none_usable(failures: list[tuple[str, Rejected]]) -> Rejected:
    if not failures:
        return Rejected(
            "no caption",
            "no .json, .txt or .caption file of its name beside it and no row in a metadata table",
        )
    # A source that should have been one says more than a file of other metadata.
    reason = next((r.reason for _, r in failures if r.reason != "no caption"), "no caption")
    return Rejected(reason, "; ".join(f"{name}: {r.detail or r.reason}" for name, r in failures[:10]))


def fields(first: str = "") -> tuple[str, ...]:
    """Names under which a caption is looked for, in order; `first` is the user's own."""
    return (first, *FIELDS) if first else FIELDS


def from_json(
    data: bytes, names: tuple[str, ...], passed_over: collections.Counter[str] | None = None, lists: bool = False
) -> tuple[str, ...]:
    """The captions in a JSON object; raises `Rejected`."""
    try:
        raw = json.loads(decode(data))
    except (ValueError, RecursionError) as error:
        raise Rejected("broken JSON", str(error)[:200]) from error
    if lists and isinstance(raw, list) and raw and all(isinstance(text, str) for text in raw):
        raw = {names[0]: raw}
    return from_mapping(raw, names, passed_over)


def from_text(data: bytes) -> str:
    """The caption that is a whole text file; raises `Rejected`."""
    return clean(decode(data))


def from_mapping(
    raw: Any, names: tuple[str, ...], passed_over: collections.Counter[str] | None = None
) -> tuple[str, ...]:
    """The captions in the first of the named fields that has a usable one: a text, or a list of texts.

    Args:
      passed_over: counts the unusable ones beside a usable one.

    Raises:
      Rejected: there is none.
    """
    if not isinstance(raw, dict):
        raise Rejected("no caption", f"expected a JSON object, got {type(raw).__name__}")
    failures: list[Rejected] = []
    for name in names:
        value = raw.get(name)
        if value is None:
            continue
        found = []
        for text in value if isinstance(value, list) and value else [value]:
            try:
                found.append(clean(text))
            except Rejected as rejected:
                failures.append(rejected)
        if found:
            if passed_over is not None:
                passed_over.update(rejected.reason for rejected in failures)
            return tuple(found)
    if failures:
        raise failures[0]
    there = ", ".join(f"{name!r:.40}{' (null)' * (raw[name] is None)}" for name in list(raw)[:8]) or "no field at all"
    raise Rejected("no caption", f"none of the fields {', '.join(names)}; it has {there}")


def clean(caption: Any) -> str:
    """The caption without white space around it; raises `Rejected` if it is not a usable text."""
    if not isinstance(caption, str):
        raise Rejected("caption is not a string", f"got {type(caption).__name__}")
    caption = caption.strip().strip("\ufeff").strip()
    if not caption:
        raise Rejected("empty caption")
    if len(caption) > MAX_CHARACTERS:
        raise Rejected("caption too long", f"{len(caption):,} characters, the limit is {MAX_CHARACTERS:,}")
    if "\0" in caption:
        raise Rejected("NUL in the caption", NUL_HINT)
    if _ISO_2022.search(caption):
        raise Rejected("invalid UTF-8", f"it is ISO-2022-JP, as mail has it: {UTF8_HINT}")
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Rejected("invalid UTF-8", f"half of a surrogate pair at character {error.start}") from error
    if not any(map(_shows, caption)):
        raise Rejected("empty caption", f"nothing in it shows: {ascii(caption[:20])}")
    return caption


def _shows(character: str) -> bool:
    """Whether a character is one to read; white space, controls, format characters and marks alone are not."""
    return unicodedata.category(character)[0] not in "CMZ" and character not in _BLANK


def encoding_of(head: bytes) -> str:
    """The encoding that a byte order mark at the beginning names; UTF-8 without one."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


def decode(data: bytes) -> str:
    """The text of a caption file: UTF-8, or UTF-16 or UTF-32 with a byte order mark; raises `Rejected`."""
    if len(data) > MAX_BYTES:
        raise Rejected("caption too long", f"a file of {len(data):,} bytes")
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise Rejected(f"invalid {name}", f"byte {error.start} of the caption: {UTF8_HINT}") from error
    if "\0" in text:
        raise Rejected("NUL in the caption", NUL_HINT)
    return text
