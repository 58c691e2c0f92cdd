"""`python -m preprocess build`: a folder of images and captions to a dataset. Read it top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fluxdit_jax.dataset.fields import CAPTION, CELLS, DECLARED, GRID, PATCHES, Field
from fluxdit_jax.dataset.grid import INPUT_GRID, read_grid
from fluxdit_jax.dataset.manifest import MANIFEST, REJECTS, DatasetError, EncoderIdentity, Manifest
from fluxdit_jax.shared.host_memory import keep_freed_memory
from preprocess import PreprocessError
from preprocess.build import comparison, repeat
from preprocess.build.encode import Counts, Encoders, Encoding
from preprocess.build.journal import Journal
from preprocess.build.options import Options, option_of
from preprocess.build.parts import Part, all_locked, load_parts, require_place, tasks, tensors_of
from preprocess.build.plan import Fingerprints, Identities, NothingToBuild, Plan, make_plan
from preprocess.build.publish import LOG_FILE, OPTIONS_FILE, finish, publish, roll_forward, save_options, save_rejects
from preprocess.build.summary import (
    MANY_REJECTS,
    Published,
    report_encoders,
    report_plan,
    report_result,
    too_many_rejects,
)
from preprocess.build.units import WORK, Rows, disk_errors
from preprocess.encoders import (
    check_arguments,
    load_all,
    load_text_encoder,
    load_vae,
    load_vision_encoder,
    require_libraries,
)
from preprocess.encoders.patches import Cells
from preprocess.input.findings import Reject, Scan, counted
from preprocess.input.precomputed import Folder, folders
from preprocess.input.scan import scan

if TYPE_CHECKING:
    import torch

_LOG_SECONDS = 30


@dataclasses.dataclass
class Result:
    """What a build did.

    Attributes:
      manifests: of its datasets, ascending by resolution.
      status: exit status: 0, or 3 with more rejects than `--max-rejects`.
      counts: what was encoded and what was taken over.
      seconds: wall time by part.
      changed: False if all was up to date.
    """

    manifests: tuple[Manifest, ...]
    status: int
    counts: Counts
    seconds: dict[str, float]
    changed: bool

    @property
    def manifest(self) -> Manifest:
        """Of the dataset, of several the largest."""
        return self.manifests[-1]


def build(options: Options, damaged: frozenset[tuple[str, int]] | None = None, replace: bool = False) -> Result:
    """Builds, continues or updates a dataset, or those of several resolutions.

    Args:
      options: what to do.
      damaged: of a repair (`verify --repair`), (shard file, row) of records that must be encoded again.
      replace: records that exist may be dropped or encoded again, however many, and by other options.

    Raises:
      PreprocessError: the input, an option, an encoder or the disk does not allow it, or a finished dataset would
        lose more than a few records.
    """
    options = options.checked()
    require_place(options)
    with all_locked(options):
        return _build(options, Journal(Path(options.output) / LOG_FILE), damaged, replace)


Forecast = Callable[[list[Part], Encoders | None, Callable[[str], None]], None]


def plan_only(options: Options, forecast: Forecast, replace: bool = False) -> list[Part]:
    """Prints what `build` would do and writes nothing.

    Args:
      forecast: prints what the parts would make; its last argument prints a line.
      replace: as of `build`.

    Raises:
      PreprocessError: the input or an option does not allow it.
    """
    options = options.checked()
    require_place(options)
    output = Path(options.output)
    journal = Journal(None)
    listing, precomputed = _list(options, output)
    plan = _plan(options, listing, precomputed, journal, keep=False)
    beyond = _beyond(options, listing)
    interrupted = repeat.unfinished(output)
    encoders = _load(options, precomputed) if _are_here(options) else None
    if encoders is None:
        earlier = [interrupted, *(repeat.published(Path(part.output)) for part in options.parts())]
        identities = _likely_identities(options, precomputed, earlier)
    else:
        identities = encoders.identities
    prints = Fingerprints.of(options, identities)
    parts = load_parts(plan, options, prints, journal, beyond)
    for part in parts:
        comparison.tell(journal, part.found, part.plan)
    report_plan(journal, parts[-1].plan, listing, beyond)
    forecast(parts, encoders, journal.say)
    rejects = sum(reject.counted for reject in plan.rejects)
    if too_many := too_many_rejects(rejects, len(plan.items), options.max_rejects):
        journal.say(f"\nwarning: the build will end with status {MANY_REJECTS}: {too_many}")
    if not repeat.permitted(options, replace, interrupted):
        try:
            _require_kept(parts)
        except PreprocessError as error:
            journal.say(f"\nwarning: without --replace the build will be refused: {error}")
    return parts


def _require_kept(parts: list[Part], repairing: bool = False) -> None:
    """Raises `PreprocessError` where a finished dataset has other options or would lose more than a few records."""
    for part in parts:
        if part.before is not None:
            differences = repeat.require_same(part.options, part.before, part.options.output)
            comparison.require_kept(part.found, part.options.output, differences, repairing)


def _real(options: Options) -> list[tuple[str, str]]:
    """(option, spec) of the encoders that need PyTorch."""
    return [
        (f"--{option_of(name).replace('_', '-')}", spec)
        for name, spec in options.specs().items()
        if not spec.startswith("builtin:")
    ]


def _torch_device(options: Options) -> torch.device:
    """The device of the encoders that need PyTorch; raises `PreprocessError` if it is not installed."""
    require_libraries(*_real(options)[0])
    from preprocess.encoders.device import choose_device

    return choose_device(options.device)


def _are_here(options: Options) -> bool:
    return all(Path(spec).is_dir() for _, spec in _real(options))


def _likely_identities(options: Options, folders: list[Folder], earlier: list[repeat.Earlier | None]) -> Identities:
    """Of encoders that would have to be downloaded: those that were used under the same names, if they were."""
    check_arguments(options.dtype, options.latent)
    device = _torch_device(options)
    from preprocess.encoders.device import choose_dtype, dtype_name

    dtype = dtype_name(choose_dtype(options.dtype, device))
    found = {}
    for part, spec in options.specs().items():
        found[part] = EncoderIdentity(spec, "", "not known", dtype, 0)
        for before in earlier:
            known = before.identities or {} if before else {}
            if before and part in known and before.values.get(option_of(part)) == spec:
                identity = known[part]
                if part == PATCHES.encoder:
                    identity = dataclasses.replace(
                        identity, options=identity.options | {"cells": options.vision_patches}
                    )
                found[part] = dataclasses.replace(
                    identity, dtype=identity.dtype if spec.startswith("builtin:") else dtype
                )
                break
    return found | {folder.field.encoder: folder.identity for folder in folders}


def _beyond(options: Options, listing: Scan) -> Set[str]:
    """Keys of the input that `--limit` leaves out."""
    return {found.key for found in listing.found[options.limit :]} if options.limit else frozenset()


def _list(options: Options, output: Path) -> tuple[Scan, list[Folder]]:
    listing = scan(options.input, options.caption_field, output, options.allow_outside)
    keys = [found.key for found in listing.found]
    return listing, folders(options.condition, options.vision_embeddings, keys, options.vision_encoder)


def _plan(options: Options, listing: Scan, precomputed: list[Folder], journal: Journal, keep: bool = True) -> Plan:
    try:
        grid = read_grid(listing.root / INPUT_GRID)
    except DatasetError as error:
        raise PreprocessError(str(error)) from error
    with journal.bar(len(listing.found[: options.limit or None]), "plan") as bar:
        try:
            plan = make_plan(listing, options, precomputed, bar.update)
        except NothingToBuild as error:
            kept = _keep(Path(options.output), error.rejects) if keep else ""
            raise PreprocessError(f"{error}{kept}") from error
    return dataclasses.replace(plan, grid=grid)


def _keep(output: Path, rejects: list[Reject]) -> str:
    """Writes the rejects of a build that makes no dataset, and says where; an existing dataset keeps its own."""
    path = output / REJECTS
    if not rejects or (output / MANIFEST).exists():
        return ""
    with disk_errors(path):
        save_rejects(path, rejects)
    return f". Each with its reason: {path}"


def _build(options: Options, journal: Journal, damaged: frozenset[tuple[str, int]] | None, replace: bool) -> Result:
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    output, datasets = Path(options.output), options.parts()
    journal.event("begin", options=options.to_dict())

    # ---- 1. Finish what a killed run had begun to publish; throw away what it had half written.
    for own in datasets:
        if roll_forward(Path(own.output)):
            journal.say(f"Completed the publication of {own.output} that an earlier run had begun.")
        work = Path(own.output) / WORK
        work.mkdir(exist_ok=True)
        for leftover in work.glob("*.tmp"):
            leftover.unlink()

    # ---- 2. What there is, by name; and the encoders, so that a missing one is known before hours of reading.
    interrupted = repeat.unfinished(output)
    replace = repeat.permitted(options, replace, interrupted)
    for own in datasets:
        if not replace and (before := repeat.published(Path(own.output))):
            repeat.require_same(own, before, own.output)
    start = time.perf_counter()
    listing, precomputed = _list(options, output)
    seconds["list"] = time.perf_counter() - start
    start = time.perf_counter()
    encoders = _load(options, precomputed)
    identities = encoders.identities
    prints = Fingerprints.of(options, identities)
    seconds["load encoders"] = time.perf_counter() - start

    # ---- 3. The plan: every file is read once.
    start = time.perf_counter()
    plan = _plan(options, listing, precomputed, journal)
    beyond = _beyond(options, listing)
    seconds["plan"] = time.perf_counter() - start

    # ---- 4. What of it is done already, whole units and tensors of other units; and what would be lost.
    parts = load_parts(plan, options, prints, journal, beyond, damaged or frozenset())
    for part in parts:
        comparison.tell(journal, part.found, part.plan)
    report_plan(journal, parts[-1].plan, listing, beyond)
    report_encoders(journal, identities)
    if not replace:
        _require_kept(parts, repairing=damaged is not None)
    repeat.begin(output, options, identities, replace)
    del listing, beyond
    todo = tasks(parts)
    encoding = Encoding(encoders, options, prints, tensors_of(parts, todo, prints), journal.event)

    # ---- 5. Encode the rest.
    start = time.perf_counter()
    if todo:
        with journal.bar(sum(len(task.items) for task in todo), "encode") as bar:
            for target, info in encoding.run(todo, _Progress(bar, encoding, journal, counted(plan.rejects))):
                parts[target.number].done.add(Rows.load(target.folder / f"{info.uid}.parquet"))
                journal.event("unit", uid=info.uid, split=info.split, records=info.records, bytes=info.bytes)
    seconds["encode"] = time.perf_counter() - start

    # ---- 6. Publish.
    start = time.perf_counter()
    published = []
    for part in parts:
        finished = [(unit, *part.done.units[uid]) for uid, unit in part.wanted]
        published.append(Published(part, finished, *publish(part.output, part.plan, finished, identities)))
    if options.resolutions:
        save_options(output / OPTIONS_FILE, options)
        finish(output)
    seconds["publish"] = time.perf_counter() - start

    seconds |= {f"encode: {what}": value for what, value in encoding.watch.seconds.items()}
    seconds["all"] = time.perf_counter() - began
    status = report_result(journal, options, published, encoding.counts, seconds)
    manifests, changed = tuple(each.manifest for each in published), any(each.changed for each in published)
    return Result(manifests, status, encoding.counts, seconds, changed)


def _load(options: Options, precomputed: list[Folder]) -> Encoders:
    # What an encoder on a CPU allocates for each picture would else be faulted in anew: 1.4 to 1.8 times the images/s.
    keep_freed_memory(large_too=not _real(options) or _torch_device(options).type == "cpu")
    specs = options.specs()
    fields = [field for field in DECLARED.values() if field.encoder in specs]
    vision = functools.cache(lambda: load_vision_encoder(options.vision_encoder, options.device, options.dtype))
    loaded = load_all(*(functools.partial(_encoder, field, specs[field.encoder], options, vision) for field in fields))
    by_name = {folder.field.name: folder for folder in precomputed}
    encoders = Encoders({field.name: made for field, made in zip(fields, loaded, strict=True)}, by_name)
    if options.modulus % encoders.vae.factor:
        raise PreprocessError(
            f"--modulus {options.modulus} is not a multiple of the VAE's factor {encoders.vae.factor}"
        )
    return encoders


def _encoder(field: Field, spec: str, options: Options, vision: Callable[[], Any]) -> Any:
    """Loads what makes a field; `vision` gives the vision encoder, which is loaded once."""
    if field.kind == GRID:
        return load_vae(spec, options.device, options.dtype, options.latent, options.seed)
    if field.made_from == CAPTION:
        return load_text_encoder(spec, options.device, options.dtype, options.max_tokens)
    if field.kind == CELLS:
        return Cells(vision(), options.vision_resolution or options.resolution, options.vision_patches)
    return vision()


class _Progress:
    """Moves the bar, with each encoder's share of the time and the rejects; logs the same once in a while."""

    def __init__(self, bar: tqdm, encoding: Encoding, journal: Journal, rejects: int) -> None:
        self._bar, self._encoding, self._journal, self._rejects = bar, encoding, journal, rejects
        self._logged = time.monotonic()

    def __call__(self, images: int) -> None:
        seconds = self._encoding.watch.seconds
        total = sum(seconds.values()) or 1.0
        shares = {what: f"{seconds.get(what, 0.0) / total:.0%}" for what in sorted(self._encoding.encoders)}
        rejects = self._rejects + self._encoding.counts.rejected
        self._bar.set_postfix(shares | {"rejects": rejects}, refresh=False)
        self._bar.update(images)
        if time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            rate = self._bar.format_dict["rate"]
            self._journal.event(
                "progress",
                done=self._bar.n,
                total=self._bar.total,
                images_per_s=rate,
                rejects=rejects,
                **shares,
            )
