"""`python -m preprocess inspect`: what is in a dataset, in numbers and pictures."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa

from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.grid import GRID_FILE, Grid, read_grid
from fluxdit_jax.dataset.manifest import INDEX, REJECTS, SPLITS, DatasetError, Manifest, load_manifest
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.shared.sanitize import shown
from preprocess import buckets
from preprocess.build import advice
from preprocess.build.items import Repeated
from preprocess.build.rows import Rows
from preprocess.build.units import read_rows
from preprocess.inspect import separation
from preprocess.inspect.wording import wording

SAMPLED = 256  # records behind the histograms


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A finished dataset: its directory, manifest and index.

    Attributes:
      several: records with more than one caption.
      others: captions beyond the first of each record.
    """

    directory: Path
    manifest: Manifest
    index: pa.Table
    several: int = 0
    others: int = 0

    @classmethod
    def load(cls, directory: str | Path) -> Dataset:
        """Raises `DatasetError` if the directory is not a finished dataset or its index is damaged."""
        directory = Path(directory)
        manifest = load_manifest(directory)
        rows = Rows.load(directory / INDEX)
        several, others = sum(u.several for u in rows.units), sum(u.others for u in rows.units)
        return cls(directory, manifest, rows.table, several, others)

    def record(self, position: int) -> Record:
        """The record of a row of the index; raises `DatasetError` naming shard and row."""
        shard, row = self.index["shard"][position].as_py(), self.index["row"][position].as_py()
        ((_, data),) = read_rows(self.directory / shard, [row])
        try:
            if isinstance(data, DatasetError):
                raise data
            return records.decode_record(data, self.manifest.layout)
        except DatasetError as error:
            raise DatasetError(f"{self.directory / shard} row {row}: {error}") from error

    @functools.cached_property
    def grid(self) -> Grid:
        """Of a gate set; empty for other datasets."""
        return read_grid(self.directory / GRID_FILE)

    def spread(self, count: int) -> list[int]:
        """`count` positions spread evenly over the index."""
        total = self.index.num_rows
        return sorted({round(i) for i in np.linspace(0, total - 1, min(count, total))})


def inspect(directory: str | Path, output: str | Path | None = None, cells: int = 24, device: str = "auto") -> None:
    """Prints the report and draws `latents.png`, `buckets.png` and `contact.png`.

    Args:
      directory: of the dataset.
      output: folder of the pictures; default: `inspect` in the dataset.
      cells: records on the contact sheet.
      device: for the VAE's decoder.

    Raises:
      DatasetError: it is not a finished dataset, or a record is damaged.
    """
    dataset = Dataset.load(directory)
    for part in (_overview, _bucket_lines, _text_lines, _latent_lines, _reject_lines, _grid_lines):
        if lines := part(dataset):
            print("\n".join(map(shown, lines)), end="\n\n")
    from preprocess.inspect import plots

    folder = Path(output) if output else dataset.directory / "inspect"
    folder.mkdir(parents=True, exist_ok=True)
    sample = [dataset.record(position) for position in dataset.spread(SAMPLED)]
    plots.draw_latents(sample, dataset.manifest, folder / "latents.png")
    plots.draw_buckets(_bucket_counts(dataset), dataset, folder / "buckets.png")
    note = plots.draw_contact(dataset, cells, device, folder / "contact.png")
    print(f"Pictures: {folder}/latents.png, buckets.png, contact.png")
    if note:
        print(f"  {note}")


def _overview(dataset: Dataset) -> list[str]:
    manifest = dataset.manifest
    lines = [f"{dataset.directory}: {manifest.name}, format {manifest.version}"]
    for split in (name for name in SPLITS if name in manifest.shards):
        shards = manifest.shards[split]
        size = sum(shard.bytes for shard in shards)
        lines.append(
            f"  {split:8} {manifest.records(split):9,} records in {len(shards)} shards, {byte_size(size)} "
            f"({byte_size(size / manifest.records(split))} a record)"
        )
    lines.append(f"  {manifest.resolution} px, modulus {manifest.modulus}, fit {manifest.fit}")
    for name, identity in manifest.encoders.items():
        options = ", ".join(f"{key} {value}" for key, value in identity.options.items() if not isinstance(value, list))
        revision = f"@{identity.revision[:12]}" if identity.revision else ""
        lines.append(
            f"  {name:6} {identity.id}{revision}, {identity.dtype}, width {identity.width}, "
            f"weights {identity.sha256[:12] or 'unknown'}, {options}"
        )
    return lines


def _bucket_counts(dataset: Dataset) -> dict[buckets.Size, int]:
    counts = collections.Counter(
        zip(dataset.index["bucket_height"].to_pylist(), dataset.index["bucket_width"].to_pylist())
    )
    return {size: counts.get(size, 0) for size in dataset.manifest.buckets}


def padding(counts: dict[buckets.Size, int], factor: int, patch: int = 2) -> float:
    """Share of a run's image tokens that are padding: every sample is padded to the largest bucket."""
    side = factor * patch
    tokens = {size: (size[0] // side) * (size[1] // side) for size in counts}
    longest, total = max(tokens.values()), sum(counts.values())
    return 1 - sum(tokens[size] * count for size, count in counts.items()) / (longest * total)


def _bucket_lines(dataset: Dataset) -> list[str]:
    counts = _bucket_counts(dataset)
    total, budget = sum(counts.values()), dataset.manifest.resolution**2
    lines = ["buckets (width x height)   aspect  tokens   fill   records  share"]
    for size, count in counts.items():
        if count or len(counts) <= 12:
            lines.append(
                f"  {size[1]:5} x {size[0]:<5}            {size[1] / size[0]:6.2f}  {buckets.tokens(size):6}  "
                f"{size[0] * size[1] / budget:5.1%}  {count:8,}  {count / total:5.1%}"
            )
    empty = sum(count == 0 for count in counts.values())
    if empty and len(counts) > 12:
        lines.append(f"  and {empty} buckets without a record")
    share = padding(counts, dataset.manifest.vae.options["factor"])
    lines.append(f"  image tokens that are padding in a run with patch 2: {share:.2%}")
    return lines


def _text_lines(dataset: Dataset) -> list[str]:
    tokens = np.array(dataset.index["tokens"].to_pylist())
    longest = 8 * math.ceil(tokens.max() / 8)
    limit = dataset.manifest.text.options.get("max_tokens")
    cut = int((tokens >= limit).sum()) if limit else 0
    quantiles = " ".join(f"{name} {np.quantile(tokens, q):.0f}" for name, q in _QUANTILES)
    lines = [
        f"captions, tokens: {quantiles} mean {tokens.mean():.1f}; {cut:,} at the limit of {limit}",
        f"  text tokens that are padding in a run that keeps all ({longest}): {1 - tokens.mean() / longest:.1%}",
    ]
    if dataset.several:
        lines.append(
            f"  {dataset.several:,} records have several captions; {len(tokens) + dataset.others:,} captions in all. "
            "The tokens are those of a record's longest caption"
        )
    captions = dataset.index["caption"].to_pylist()
    if dataset.grid:  # the pictures of one photograph share its caption on purpose
        return lines
    return [*lines, *wording(captions), *advice.repeated_captions(Repeated.of(captions))]


_QUANTILES = (("min", 0), ("p5", 0.05), ("median", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1))


def _latent_lines(dataset: Dataset) -> list[str]:
    manifest = dataset.manifest
    lines = [f"latents: mean and std per channel over {manifest.latent_count:,} values each of the train split"]
    for name, values in (("mean", manifest.latent_mean), ("std", manifest.latent_std)):
        for start in range(0, len(values), 8):
            head = f"  {name if start == 0 else '':4}"
            lines.append(head + " ".join(f"{value:+9.4f}" for value in values[start : start + 8]))
    return lines


def _reject_lines(dataset: Dataset) -> list[str]:
    path = dataset.directory / REJECTS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        raw = [json.loads(line) for line in lines]
        counted = [line for line in raw if line.get("counted", True)]
        reasons = collections.Counter(str(line["reason"]) for line in counted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{path} is damaged: {error}; `python -m preprocess verify` tells more") from error
    if len(counted) != dataset.manifest.rejects:
        raise DatasetError(f"{path} has {len(counted)} rejects, the manifest says {dataset.manifest.rejects}")
    listed = len(raw) - len(counted)
    also = f"; {listed:,} captions and rows without a picture are listed there" if listed else ""
    if not counted:
        return [f"rejects: none{also}"]
    return [
        f"rejects: {len(counted):,}{also}, in {dataset.directory / REJECTS}",
        *(f"  {count:7,}  {reason}" for reason, count in reasons.most_common()),
    ]


def _grid_lines(dataset: Dataset) -> list[str]:
    """Of a gate set: whether it can be learned; nothing of other datasets."""
    grid = dataset.grid
    if not grid:
        return []
    keys = dataset.index["key"].to_pylist()
    position = {key: row for row, key in enumerate(keys)}
    rows = [position[key] for key in grid if key in position]
    records_there = [dataset.record(row) for row in rows]
    places = [grid[keys[row]] for row in rows]
    photographs, views, lights = (len({getattr(p, name) for p in places}) for name in ("photograph", "view", "light"))
    seen = separation.separate_lights(np.array([record.vision for record in records_there]), places)
    apart = separation.separate_latents([record.latent for record in records_there], dataset.manifest.latent_std)
    return [
        f"gate set: {len(rows)} of {len(keys)} records are in a grid of {photographs} photographs, {views} views, "
        f"{lights} lights",
        *(f"  {line}" for line in separation.light_lines(seen, dataset.manifest.vision.id)),
        *(f"  {line}" for line in separation.latent_lines(apart, [keys[row] for row in rows])),
    ]


def byte_size(count: float) -> str:
    """A number of bytes as people say it: "340 KB", "2.05 MB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
