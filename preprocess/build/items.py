"""The images of a plan, in a database, as there may be more of them than memory holds."""

from __future__ import annotations

import array
import collections
import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from preprocess.buckets import Size, nearest
from preprocess.build.options import Options
from preprocess.database import Database
from preprocess.decoding.formats import has_other_extension
from preprocess.decoding.images import Header
from preprocess.input.byte_source import ByteSource

_TABLE = """
CREATE TABLE items (
  number INTEGER PRIMARY KEY,  -- in the order of the keys
  key TEXT,
  content TEXT,
  split TEXT,
  place INTEGER,               -- hash of the key: decides the shard
  caption INTEGER,             -- hash of the first one
  row TEXT                     -- the rest, as JSON
)"""
_INDICES = (
    "CREATE UNIQUE INDEX of_key ON items (key)",
    "CREATE INDEX of_content ON items (content)",
    "CREATE INDEX of_place ON items (split, place)",
)
_MIDDLE = 2**63  # integers of SQLite have a sign
_FITTED = 65_536  # sizes whose buckets are remembered


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One image that is to become a record.

    Attributes:
      captions: at least one, all different.
      content: sha256 of the image file, hex.
      header: size of the upright picture.
      bucket: (height, width), pixels.
      seen: the size at which the vision encoder is given it; the bucket, or that of another resolution.
      files: (field, sha256 of its file) of each precomputed condition.
    """

    key: str
    image: ByteSource
    captions: tuple[str, ...]
    content: str
    header: Header
    bucket: Size
    seen: Size
    files: tuple[tuple[str, str], ...] = ()

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]


EXAMPLES = 3  # of captions that several images share


class Repeated(NamedTuple):
    """Captions that several images share.

    Attributes:
      images, captions: of all images, how many there are, and how many different captions.
      sharing: images whose caption another one has.
      commonest: captions of those, with the number of images.
    """

    images: int
    captions: int
    sharing: int
    commonest: list[tuple[str, int]]

    @classmethod
    def of(cls, captions: Iterable[str]) -> Repeated:
        """Of one caption an image."""
        counts = collections.Counter(captions)
        common = [(text, count) for text, count in counts.most_common() if count > 1]
        return cls(counts.total(), len(counts), sum(count for _, count in common), common[:EXAMPLES])


class Items:
    """Images by key, at the resolution of `options`; positions are in the order of the keys.

    Attributes:
      sizes: int64 [M, 2], the different (height, width) of pictures. size_of: int32 [N], which of them each image has.
      several: images with more than one caption. captions: of all images.
      wrong_extension: images whose extension names another format than they have.
    """

    def __init__(self, options: Options, items: Iterable[Item]) -> None:
        """
        Args:
          items: sorted by key, no two of one key. Their bucket and `seen` are not taken: they follow from the options.
        """
        self.options = options
        self._fitted: dict[Size, tuple[Size, Size]] = {}  # bucket and `seen` by size, of some
        self._rows = Database(_TABLE)
        self.several = self.captions = self.wrong_extension = 0
        sizes = array.array("q")

        def taken() -> Iterator[tuple[Any, ...]]:
            last = ""
            for item in items:
                if item.key <= last:
                    raise ValueError(f"{item.key!r} behind {last!r}")
                last = item.key
                sizes.append((item.header.height << 32) + item.header.width)
                self.several += len(item.captions) > 1
                self.captions += len(item.captions)
                self.wrong_extension += has_other_extension(item.key, item.header.format)
                split = split_of(item.content, options.holdout)
                yield item.key, item.content, split, _hash(item.key), _hash(item.caption), _row(item)

        columns = "key, content, split, place, caption, row"
        self._rows.run_many(f"INSERT INTO items ({columns}) VALUES (?, ?, ?, ?, ?, ?)", taken())
        for index in _INDICES:
            self._rows.run(index)
        different, which = np.unique(np.array(sizes, np.int64), return_inverse=True)
        self.sizes = np.stack([different >> 32, different & (1 << 32) - 1], axis=1)
        self.size_of = which.astype(np.int32)

    def at(self, options: Options) -> Items:
        """The same images at the resolution of these options."""
        other = copy.copy(self)
        other.options, other._fitted = options, {}
        return other

    def __len__(self) -> int:
        return len(self.size_of)

    def __iter__(self) -> Iterator[Item]:
        yield from self._read("ORDER BY number")

    def __getitem__(self, position: int) -> Item:
        return next(self._read("WHERE number = ?", range(1, len(self) + 1)[position]))

    def get(self, key: str) -> Item | None:
        """The image of a key; None if there is none."""
        return next(self._read("WHERE key = ?", key), None)

    def has_content(self, content: str) -> bool:
        """Whether an image has this sha256."""
        return self._rows.one("SELECT 1 FROM items WHERE content = ?", content) is not None

    def duplicates(self) -> list[tuple[str, ...]]:
        """Groups of keys whose image files are equal, byte by byte."""
        groups: dict[str, list[str]] = {}
        copied = "SELECT content FROM items GROUP BY content HAVING COUNT(*) > 1"
        for content, key in self._rows.rows(f"SELECT content, key FROM items WHERE content IN ({copied}) ORDER BY key"):
            groups.setdefault(content, []).append(key)
        return [tuple(keys) for keys in groups.values()]

    def repeated(self) -> Repeated:
        """Their first captions, as far as they are equal."""
        counts = "SELECT caption, COUNT(*) AS count, MIN(number) AS first FROM items GROUP BY caption"
        (distinct, sharing) = next(
            self._rows.rows(f"SELECT COUNT(*), TOTAL(CASE WHEN count > 1 THEN count END) FROM ({counts})")
        )
        common = self._rows.rows(
            f"SELECT first, count FROM ({counts}) WHERE count > 1 ORDER BY count DESC, first LIMIT {EXAMPLES}"
        )
        commonest = [(self[first - 1].caption, count) for first, count in common]
        return Repeated(len(self), distinct, int(sharing), commonest)

    def places(self, split: str) -> np.ndarray:
        """int64 [N], ascending: where the images of a split are among the hashes of all keys."""
        query = "SELECT place FROM items WHERE split = ? ORDER BY place"
        return np.fromiter((place for (place,) in self._rows.rows(query, split)), np.int64)

    def between(self, split: str, first: int, last: int) -> list[Item]:
        """The images of a split from one place to another, both with them, by key."""
        found = self._read("WHERE split = ? AND place BETWEEN ? AND ?", split, first, last)
        return sorted(found, key=lambda item: item.key)

    def _read(self, which: str, *values: Any) -> Iterator[Item]:
        for key, content, row in self._rows.rows(f"SELECT key, content, row FROM items {which}", *values):
            place, captions, shape, files = json.loads(row)
            header = Header(*shape)
            bucket, seen = self._fit(header.height, header.width)
            yield Item(
                key=key,
                image=ByteSource(*place),
                captions=tuple(captions),
                content=content,
                header=header,
                bucket=bucket,
                seen=seen,
                files=tuple((name, sha256) for name, sha256 in files),
            )

    def _fit(self, height: int, width: int) -> tuple[Size, Size]:
        if (height, width) not in self._fitted:
            if len(self._fitted) == _FITTED:
                self._fitted.clear()
            tables = self.options.buckets(), self.options.seen_buckets()
            bucket, seen = (nearest(table, height, width) for table in tables)
            self._fitted[height, width] = bucket, seen
        return self._fitted[height, width]


def _row(item: Item) -> str:
    image, header = item.image, item.header
    shape = (header.height, header.width, header.orientation, header.format, header.version)
    return json.dumps(((image.path, image.offset, image.size), item.captions, shape, item.files))


def _hash(text: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]) - _MIDDLE


def split_of(content: str, holdout: float) -> str:
    """The split of an image, from the hash of its content: the same whatever else is in the dataset."""
    return "holdout" if int(content[:16], 16) < holdout * 2**64 else "train"


@dataclasses.dataclass(frozen=True)
class Leaf(Sequence[Item]):
    """The images of a split from one place to another, by key: read each time they are asked for."""

    source: Items
    split: str
    first: int
    last: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Item]:
        return iter(self.source.between(self.split, self.first, self.last))

    def __getitem__(self, index: Any) -> Any:
        return self.source.between(self.split, self.first, self.last)[index]


def leaves(items: Items, split: str, size: int) -> Iterator[Leaf]:
    """Divides the images of a split into leaves of at most `size`: those of a binary tree over the hashes of the keys,
    in which a leaf that is too large is split by the next bit."""
    places = items.places(split)

    def within(start: int, stop: int, low: int, width: int) -> Iterator[Leaf]:
        if stop - start <= size or width == 1:
            if stop > start:
                yield Leaf(items, split, int(places[start]), int(places[stop - 1]), stop - start)
            return
        half = low + width // 2
        middle = start + int(np.searchsorted(places[start:stop], half))
        yield from within(start, middle, low, width // 2)
        yield from within(middle, stop, half, width // 2)

    return within(0, len(places), -_MIDDLE, 2 * _MIDDLE)
