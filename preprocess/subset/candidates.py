"""Who may be in a small set: every usable picture of an input, with what is known of its pose and its light.

Of a dataset the captions, text features and vision vectors come from its records, and the pictures from the folder that
it was built from. Of a folder everything is computed. A picture with several captions is judged by its first.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.manifest import MANIFEST, DatasetError, EncoderIdentity
from fluxdit_jax.shared.atomic_files import replacing
from fluxdit_jax.shared.edit_rules import DEFAULT_RULES, EditError, Rule
from preprocess import PreprocessError
from preprocess.buckets import TOKEN_SIDE, Size
from preprocess.build.journal import Journal
from preprocess.build.options import Options
from preprocess.build.plan import MAX_FILE_BYTES, Item, digest, make_plan
from preprocess.build.publish import load_options
from preprocess.build.units import read_rows
from preprocess.decoding.images import Rejected, decode
from preprocess.encoders import load_all, load_text_encoder, load_vision_encoder
from preprocess.input.findings import InputImage, Reject, Scan
from preprocess.input.scan import scan
from preprocess.inspect.report import Dataset
from preprocess.subset.choice import THUMBNAIL, Candidates, side_of

TONE = "builtin:tone"
_CHUNK = 64  # pictures decoded before the encoder sees them


@dataclasses.dataclass(frozen=True)
class SubsetOptions:
    """The options of `subset`; `python -m preprocess subset --help` says what each means."""

    input: str
    output: str
    count: int = 100
    resolution: int = 512
    square: bool = False
    images: str = ""
    text_encoder: str = "builtin:hash"
    vision_encoder: str = TONE
    edit: tuple[str, ...] = ()
    light_share: float = 0.25
    candidates: int = 4000
    allow_fewer: bool = False
    caption_field: str = ""
    allow_outside: bool = False
    device: str = "auto"
    workers: int = 0

    def checked(self) -> SubsetOptions:
        """These options; raises `PreprocessError` naming the one that is impossible."""
        for name, value, low, high in (
            ("count", self.count, 2, 10_000),
            ("light-share", self.light_share, 0.0, 1.0),
            ("candidates", self.candidates, self.count, 10_000),  # their distances: 800 MB
        ):
            if not low <= value <= high:
                raise PreprocessError(f"--{name} must be from {low} to {high}, got {value}")
        if self.square and (self.resolution < TOKEN_SIDE or self.resolution % TOKEN_SIDE):
            raise PreprocessError(f"--square --resolution must be a multiple of {TOKEN_SIDE}, got {self.resolution}")
        self.rules()
        return self

    def rules(self) -> tuple[Rule, ...]:
        """Of the gate's text edit, as `validate --edit` will read them."""
        try:
            return tuple(Rule.parse(text) for text in self.edit) or DEFAULT_RULES
        except EditError as error:
            raise PreprocessError(str(error)) from error

    def target(self, item: Item) -> Size:
        """(height, width) that a picture is resized to, pixels."""
        return (self.resolution, self.resolution) if self.square else item.bucket


@dataclasses.dataclass
class Pool:
    """Attributes:
    build: how the input is read; of a dataset, as it was built.
    dataset: the input is one.
    total: pictures of the input.
    items: candidates, by key, in the order of `features`.
    found: where each came from, by key.
    features: of the items.
    left_out: inputs that are no candidates, and why.
    """

    build: Options
    dataset: bool
    total: int
    items: list[Item]
    found: dict[str, InputImage]
    features: Candidates
    left_out: list[Reject]


@dataclasses.dataclass
class _Known:
    """What a dataset's records say of a picture: its captions, text f64 [D] of the first, vision f32 [D]."""

    captions: tuple[str, ...]
    text: np.ndarray
    vision: np.ndarray


def gather(options: SubsetOptions, cache: Path, journal: Journal) -> Pool:
    """Finds the candidates of an input.

    Args:
      options: checked ones.
      cache: folder in which vectors of real encoders survive an interruption.

    Raises:
      PreprocessError: there is no such input, or nothing in it can be used.
      DatasetError: the dataset is damaged as a whole.
    """
    source = Path(options.input)
    if (source / MANIFEST).is_file():
        return _of_dataset(options, source, journal)
    if options.images:
        raise PreprocessError(f"--images is for a dataset, and --input {options.input} has no manifest.json")
    return _of_folder(options, cache, journal)


# ------------------------------------------------------------------------------------------------ two inputs


def _of_dataset(options: SubsetOptions, directory: Path, journal: Journal) -> Pool:
    dataset, built = Dataset.load(directory), load_options(directory)
    root = Path(options.images or built.input)
    if not root.exists():
        raise PreprocessError(
            f"the pictures that {directory} was built from are not in {root}: say where they are with --images DIR"
        )
    build = dataclasses.replace(
        built,
        input=str(root),
        output=options.output,
        resolution=options.resolution,
        modulus=0,
        holdout=0.0,
        limit=0,
        workers=options.workers,
    ).checked()
    keys, captions = dataset.index["key"].to_pylist(), dataset.index["caption"].to_pylist()
    chosen = _sample(keys, captions, options)
    listing = scan(root, built.caption_field, Path(options.output), built.allow_outside)
    by_key = {found.key: found for found in listing.found if found.key in chosen}
    if not by_key:
        raise PreprocessError(
            f"none of the {len(keys):,} pictures of {directory} is in {root} (the first is {keys[0]!r}): say where "
            "they are with --images DIR"
        )
    left_out = [_left_out(key, root / key, "not in the input folder any more") for key in sorted(chosen - set(by_key))]
    with journal.bar(len(by_key), "read") as bar:
        plan = make_plan(Scan(root, list(by_key.values())), build, (), bar.update)
    left_out += plan.rejects
    positions = {key: position for position, key in enumerate(keys) if key in chosen}
    hashes = dataset.index["content_hash"]
    same = []
    for item in plan.items:
        position = positions[item.key]
        if item.content != hashes[position].as_py():
            left_out.append(_left_out(item.key, item.image.path, "picture changed since the dataset was built"))
        else:
            same.append(item)
    known = _read_records(dataset, [positions[item.key] for item in same], journal)
    sound: list[Item] = []
    said: dict[str, _Known] = {}
    for item in same:
        record, path = known[item.key], item.image.path
        if isinstance(record, DatasetError):
            left_out.append(_left_out(item.key, directory, "damaged record", str(record)))
        elif item.captions != record.captions:
            left_out.append(_left_out(item.key, path, "caption changed since the dataset was built"))
        else:
            sound.append(item)
            said[item.key] = record
    items, looks, rejects = _look_at(sound, options, None, journal)
    vision = np.array([said[item.key].vision for item in items], np.float64)
    text = np.array([said[item.key].text for item in items])
    features = _features(items, text, vision, looks, dataset.manifest.vision)
    return Pool(build, True, len(keys), items, by_key, features, left_out + rejects)


def _of_folder(options: SubsetOptions, cache: Path, journal: Journal) -> Pool:
    build = Options(
        input=options.input,
        output=options.output,
        text_encoder=options.text_encoder,
        vision_encoder=options.vision_encoder,
        resolution=options.resolution,
        holdout=0.0,
        caption_field=options.caption_field,
        allow_outside=options.allow_outside,
        device=options.device,
        workers=options.workers,
    ).checked()
    text_encoder, vision_encoder = load_all(
        lambda: load_text_encoder(options.text_encoder, options.device),
        lambda: load_vision_encoder(options.vision_encoder, options.device),
    )
    listing = scan(options.input, options.caption_field, Path(options.output), options.allow_outside)
    with journal.bar(len(listing.found), "read") as bar:
        plan = make_plan(listing, build, (), bar.update)
    chosen = _sample([item.key for item in plan.items], [item.caption for item in plan.items], options)
    by_key = {found.key: found for found in listing.found if found.key in chosen}

    def see(item: Item, pixels: np.ndarray) -> np.ndarray:
        name = digest(dataclasses.asdict(vision_encoder.identity), item.content, options.target(item))
        return _cached(cache, name, vision_encoder.identity, lambda: vision_encoder.encode(pixels[None])[0])

    def embed(caption: str) -> np.ndarray:
        return _pooled(text_encoder.encode([caption])[0])

    candidates = [item for item in plan.items if item.key in chosen]
    items, looks, rejects = _look_at(candidates, options, see, journal)
    texts: dict[str, np.ndarray] = {}
    with journal.bar(len(items), "captions", "caption") as bar:
        for item in items:
            if item.caption not in texts:
                name = digest(dataclasses.asdict(text_encoder.identity), item.caption)
                texts[item.caption] = _cached(cache, name, text_encoder.identity, partial(embed, item.caption))
            bar.update()
    vision = np.array([look.vision for look in looks], np.float64)
    text = np.array([texts[item.caption] for item in items])
    features = _features(items, text, vision, looks, vision_encoder.identity)
    return Pool(build, False, len(plan.items), items, by_key, features, plan.rejects + rejects)


def _sample(keys: Sequence[str], captions: Sequence[str], options: SubsetOptions) -> set[str]:
    """At most `options.candidates` keys, by the hash of the key: any of them, and always the same. Captions that
    the edit concerns come first, up to half."""
    order = sorted(range(len(keys)), key=lambda row: hashlib.sha256(keys[row].encode()).digest())
    if len(order) > options.candidates:
        rules = options.rules()
        first = [row for row in order if any(side_of(captions[row], rule) for rule in rules)]
        order = list(dict.fromkeys(first[: options.candidates // 2] + order))[: options.candidates]
    return {keys[row] for row in order}


def _left_out(key: str, path: Path | str, reason: str, detail: str = "") -> Reject:
    return Reject.of(key, str(path), Rejected(reason, detail))


def _read_records(dataset: Dataset, positions: list[int], journal: Journal) -> dict[str, _Known | DatasetError]:
    """Of these rows of the index, by key."""
    table = dataset.index.take(positions)
    known: dict[str, _Known | DatasetError] = {}
    with journal.bar(len(positions), "records", "record") as bar:
        for shard in pc.unique(table["shard"]).to_pylist():
            part = table.filter(pc.equal(table["shard"], shard)).sort_by("row")
            rows = read_rows(dataset.directory / shard, part["row"].to_pylist())
            for key, (row, data) in zip(part["key"].to_pylist(), rows):
                try:
                    if isinstance(data, DatasetError):
                        raise data
                    record = records.decode_record(data, dataset.manifest.layout)
                    records.check_record(record)
                    if record.key != key:
                        raise DatasetError(f"it is of {record.key!r}")
                    known[key] = _Known(record.captions, _pooled(record.text), record.vision.copy())
                except DatasetError as error:
                    known[key] = DatasetError(f"{shard} row {row}: {error}")
                bar.update()
    return known


# --------------------------------------------------------------------------------------------------- features


def _pooled(text: np.ndarray) -> np.ndarray:
    """Token features [n, D] to their mean, f64 [D] of unit L2 norm."""
    mean = text.astype(np.float64).mean(0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def _cached(folder: Path, name: str, identity: EncoderIdentity, make: Callable[[], np.ndarray]) -> np.ndarray:
    """A vector that was made before an interruption, or a new one. The built-in encoders need no memory."""
    if identity.id.startswith("builtin:"):
        return make()
    path = folder / f"{name}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        vector = make()
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, vector, allow_pickle=False)
    return vector


@dataclasses.dataclass
class _Look:
    """Of one picture: thumbnail uint8 [32, 32, 3], the light f32 [D], and the encoder's vector if asked for."""

    thumbnail: np.ndarray
    light: np.ndarray
    vision: np.ndarray | None = None


def read_pixels(item: Item, size: Size) -> np.ndarray:
    """The picture resized to (height, width), uint8 [H, W, 3]; raises `Rejected` if it is no longer the same."""
    data = item.image.read(MAX_FILE_BYTES)
    if hashlib.sha256(data).hexdigest() != item.content:
        raise Rejected("changed while it was looked at", "give the same command again", transient=True)
    return decode(data, item.header, size, "resize", item.content).pixels


def _look_at(
    items: list[Item],
    options: SubsetOptions,
    see: Callable[[Item, np.ndarray], np.ndarray] | None,
    journal: Journal,
) -> tuple[list[Item], list[_Look], list[Reject]]:
    """Decodes pictures in threads; returns those that could be, what they look like, and the others."""
    tone = load_vision_encoder(TONE)

    def look(item: Item) -> tuple[_Look, np.ndarray | None] | Rejected:
        try:
            pixels = read_pixels(item, options.target(item))
        except Rejected as rejected:
            return rejected
        small = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        seen = _Look(np.asarray(small), tone.encode(pixels[None])[0])
        return seen, pixels if see else None

    kept, looks, rejects = [], [], []
    with journal.bar(len(items), "look") as bar, ThreadPoolExecutor(options.workers or None) as pool:
        for chunk in _chunks(items):
            for item, result in zip(chunk, pool.map(look, chunk)):
                if isinstance(result, Rejected):
                    rejects.append(Reject.of(item.key, item.image.path, result))
                else:
                    seen, pixels = result
                    if see and pixels is not None:
                        seen.vision = see(item, pixels)
                    kept.append(item)
                    looks.append(seen)
                bar.update()
    if not kept:
        raise PreprocessError(
            f"--input {options.input}: none of {len(items)} pictures can be used"
            + (f"; {rejects[0].file}: {rejects[0].reason}" if rejects else ": all have changed since")
        )
    return kept, looks, rejects


def _chunks(items: list[Item]) -> Iterator[list[Item]]:
    for start in range(0, len(items), _CHUNK):
        yield items[start : start + _CHUNK]


def _features(
    items: list[Item],
    text: np.ndarray,
    vision: np.ndarray,
    looks: Iterable[_Look],
    identity: EncoderIdentity,
) -> Candidates:
    """`builtin:tone` sees the light and nothing of the pose, any other encoder both: so the light is always what
    `builtin:tone` sees, and the pose what another encoder does or else the structure of the thumbnail."""
    thumbnails = np.array([look.thumbnail for look in looks])
    if identity.id == TONE:
        light, pose = vision, structures(thumbnails)
    else:
        light, pose = np.array([look.light for look in looks], np.float64), vision
    return Candidates(
        captions=[item.caption for item in items],
        contents=[item.content for item in items],
        pixels=[item.header.height * item.header.width for item in items],
        text=text,
        vision=pose,
        light=light,
        thumbnails=thumbnails,
    )


def structures(thumbnails: np.ndarray) -> np.ndarray:
    """uint8 [N, 32, 32, 3] to f64 [N, 256]: luma in stops on 16 x 16 cells, mean 0, unit L2: brightness and
    contrast of a picture do not count."""
    count = len(thumbnails)
    side = THUMBNAIL // 2
    luma = thumbnails.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    cells = np.log2(luma.reshape(count, side, 2, side, 2).mean((2, 4)) + 4).reshape(count, -1)
    cells -= cells.mean(1, keepdims=True)
    return cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-3)
