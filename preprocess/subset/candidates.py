"""The photographs that a gate set may be made of: every usable picture of an input, and how its variants look."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import heapq
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from fluxdit_jax.dataset.manifest import MANIFEST, parts_of
from preprocess import PreprocessError
from preprocess.buckets import TOKEN_SIDE, Size
from preprocess.build.items import Item, Items
from preprocess.build.journal import Journal
from preprocess.build.options import Options
from preprocess.build.plan import MAX_FILE_BYTES, make_plan
from preprocess.build.publish import load_options
from preprocess.decoding.images import Rejected, decode
from preprocess.input.findings import Reject, Scan
from preprocess.input.found import Found
from preprocess.input.scan import scan
from preprocess.inspect.report import Dataset
from preprocess.subset.lights import LIGHTS, Light, lit
from preprocess.subset.views import MIRRORED, ORIGINAL, USUAL, Edit, captions_of_views, mirrored

THUMBNAIL = 32  # side, pixels


@dataclasses.dataclass(frozen=True)
class SubsetOptions:
    """The options of `subset`; `python -m preprocess subset --help` says what each means."""

    input: str
    output: str
    count: int = 10
    lights: int = 5
    mirror: bool = True
    resolution: int = 512
    square: bool = False
    images: str = ""
    vision_encoder: str = ""
    edit: tuple[str, ...] = ()
    candidates: int = 4000
    allow_fewer: bool = False
    caption_field: str = ""
    allow_outside: bool = False
    device: str = "auto"
    workers: int = 0

    def checked(self) -> SubsetOptions:
        """These options; raises `PreprocessError` naming the one that is impossible."""
        for name, value, low, high in (
            ("count", self.count, 1, 10_000),
            ("lights", self.lights, 1, len(LIGHTS)),
            ("candidates", self.candidates, self.count, 10_000),  # their distances: 800 MB
        ):
            if not low <= value <= high:
                raise PreprocessError(f"--{name} must be from {low} to {high}, got {value}")
        if self.square and (self.resolution < TOKEN_SIDE or self.resolution % TOKEN_SIDE):
            raise PreprocessError(f"--square --resolution must be a multiple of {TOKEN_SIDE}, got {self.resolution}")
        self.edits()
        return self

    def edits(self) -> tuple[Edit, ...]:
        return tuple(Edit.parse(text) for text in self.edit) or (USUAL,)

    def target(self, item: Item) -> Size:
        """(height, width) that a picture is resized to, pixels."""
        return (self.resolution, self.resolution) if self.square else item.bucket

    @property
    def variants(self) -> tuple[tuple[str, Light], ...]:
        """(view, light) of every picture that is made of a photograph."""
        views = (ORIGINAL, MIRRORED) if self.mirror else (ORIGINAL,)
        return tuple((view, light) for view in views for light in LIGHTS[: self.lights])

    def captions(self, caption: str) -> dict[str, str]:
        """By view."""
        if not self.mirror:
            return {ORIGINAL: caption}
        return dict(zip((ORIGINAL, MIRRORED), captions_of_views(caption, self.edits()), strict=True))

    def has_words(self, caption: str) -> bool:
        """Whether the caption has words of the edit of its own."""
        return mirrored(caption, self.edits()) != caption


def variant(pixels: np.ndarray, view: str, light: Light) -> np.ndarray:
    """uint8 [H, W, 3] mirrored or not, then lit: the light comes from the same side in both views."""
    return lit(pixels[:, ::-1] if view == MIRRORED else pixels, light)


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A photograph that may be chosen.

    Attributes:
      item: the photograph.
      thumbnail: uint8 [32, 32, 3].
    """

    item: Item
    thumbnail: np.ndarray

    def variants(self, options: SubsetOptions) -> np.ndarray:
        """Thumbnails of all that is made of it, float32 [V, 32 * 32 * 3], grey levels."""
        made = [variant(self.thumbnail, view, light).ravel() for view, light in options.variants]
        return np.array(made, np.float32)


@dataclasses.dataclass
class Pool:
    """The photographs to choose from.

    Attributes:
      build: how the input is read; of a dataset, as it was built.
      dataset: the input is one.
      total: pictures of the input.
      candidates: by key.
      left_out: inputs that are no candidates, and why.
    """

    build: Options
    dataset: bool
    total: int
    candidates: list[Candidate]
    left_out: list[Reject]


def gather(options: SubsetOptions, journal: Journal) -> Pool:
    """Finds the candidates of an input; of a dataset they are the pictures that it was built from.

    Args:
      options: checked ones.

    Raises:
      PreprocessError: there is no such input, or nothing in it can be used.
      DatasetError: the dataset is damaged as a whole.
    """
    source = Path(options.input)
    hashes: dict[str, str] | None = None
    if (source / MANIFEST).is_file():
        index = Dataset.load(source).index
        hashes = dict(zip(index["key"].to_pylist(), index["content_hash"].to_pylist()))
        build = load_options(source)
        build = dataclasses.replace(build, input=options.images or build.input, modulus=0, vision_resolution=0, limit=0)
        if not Path(build.input).exists():
            raise PreprocessError(
                f"the pictures that {source} was built from are not in {build.input}: say where they are with "
                "--images DIR"
            )
    elif several := parts_of(source):
        raise PreprocessError(f"--input {source} holds datasets of several sizes: name one, as {several[max(several)]}")
    elif options.images:
        raise PreprocessError(f"--images is for a dataset, and --input {options.input} has no {MANIFEST}")
    else:
        build = Options(
            input=options.input, output="", caption_field=options.caption_field, allow_outside=options.allow_outside
        )
    build = dataclasses.replace(
        build, output=options.output, resolution=options.resolution, holdout=0.0, workers=options.workers
    ).checked()
    listing = scan(build.input, build.caption_field, Path(options.output), build.allow_outside)
    total = len(listing.found) if hashes is None else len(hashes)
    if hashes is not None:
        listing = Scan(listing.root, Found(found for found in listing.found if found.key in hashes))
        if not len(listing.found):
            raise PreprocessError(
                f"none of the {total:,} pictures of {source} is in {build.input} (the first is {min(hashes)!r}): say "
                "where they are with --images DIR"
            )
    with journal.bar(len(listing.found), "read") as bar:
        plan = make_plan(listing, build, (), bar.update)
    left_out = list(plan.rejects)
    if hashes is not None:
        missing = (key for key in sorted(hashes) if key not in listing.found)
        left_out += [_left_out(key, build.input, "not in the input folder any more") for key in missing]
        changed = (item for item in plan.items if item.content != hashes[item.key])
        left_out += [_left_out(i.key, i.image.path, "picture changed since the dataset was built") for i in changed]
    same = lambda item: hashes is None or item.content == hashes[item.key]  # noqa: E731
    candidates, rejects = _look_at(_sample(plan.items, same, options), options, journal)
    return Pool(build, hashes is not None, total, candidates, left_out + rejects)


def _sample(items: Items, usable: Callable[[Item], bool], options: SubsetOptions) -> list[Item]:
    """At most `options.candidates` of the usable ones, by the hash of the key: any of them, and always the same.
    Captions with words of the edit come first, up to half."""

    def least(count: int, which: Callable[[Item], bool]) -> list[Item]:
        order = lambda item: hashlib.sha256(item.key.encode()).digest()  # noqa: E731
        return heapq.nsmallest(count, filter(which, items), key=order)

    first = least(options.candidates // 2, lambda item: usable(item) and options.has_words(item.caption))
    keys = {item.key for item in first}
    rest = least(options.candidates - len(first), lambda item: usable(item) and item.key not in keys)
    return sorted(first + rest, key=lambda item: item.key)


def _left_out(key: str, path: str, reason: str, detail: str = "") -> Reject:
    return Reject.of(key, path, Rejected(reason, detail))


def read_pixels(item: Item, size: Size) -> np.ndarray:
    """The picture resized to (height, width), uint8 [H, W, 3]; raises `Rejected` if it is no longer the same."""
    data = item.image.read(MAX_FILE_BYTES)
    if hashlib.sha256(data).hexdigest() != item.content:
        raise Rejected("changed while it was looked at", "give the same command again", transient=True)
    return decode(data, item.header, size, "resize", item.content).pixels


def _look_at(items: list[Item], options: SubsetOptions, journal: Journal) -> tuple[list[Candidate], list[Reject]]:
    """Decodes pictures in threads; returns those that could be, and the others."""

    def look(item: Item) -> Candidate | Reject:
        try:
            pixels = read_pixels(item, options.target(item))
        except Rejected as rejected:
            return Reject.of(item.key, item.image.path, rejected)
        small = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        return Candidate(item, np.asarray(small))

    found: list[Candidate] = []
    rejects: list[Reject] = []
    with journal.bar(len(items), "look") as bar, ThreadPoolExecutor(options.workers or None) as pool:
        for result in pool.map(look, items):
            if isinstance(result, Reject):
                rejects.append(result)
            else:
                found.append(result)
            bar.update()
    if not found:
        what = f"{rejects[0].file}: {rejects[0].reason}" if rejects else "all have changed since"
        raise PreprocessError(f"--input {options.input}: none of {len(items)} pictures can be used; {what}")
    return found, rejects


def reasons(left_out: Iterable[str]) -> str:
    """How many were left out for each reason, in words."""
    counts = collections.Counter(left_out)
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items())) or "none"
