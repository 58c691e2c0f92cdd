"""The pictures of `inspect` and of `build --dry-run`."""

from __future__ import annotations

import hashlib
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.shared.labels import drawable
from preprocess import PreprocessError, buckets
from preprocess.build.plan import MAX_FILE_BYTES
from preprocess.build.publish import load_options
from preprocess.decoding.images import Limits, Rejected, decode, read_header
from preprocess.encoders import Vae, load_vae
from preprocess.input.byte_source import ByteSource
from preprocess.input.system_folders import MARK

if TYPE_CHECKING:
    from preprocess.inspect.report import Dataset

matplotlib.use("agg")
_RATIOS = ((1, 4), (1, 3), (1, 2), (2, 3), (1, 1), (3, 2), (2, 1), (3, 1), (4, 1))


def draw_latents(sample: list[Record], manifest: Manifest, path: Path) -> None:
    """Histograms of every latent channel, as stored (left) and normalised by the manifest (right)."""
    mean, std = np.array(manifest.latent_mean), np.array(manifest.latent_std)
    channels = [
        np.concatenate([record.latent[c].astype(np.float32).ravel() for record in sample]) for c in range(len(mean))
    ]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    stored, normal = figure.subplots(1, 2)
    reach = max(np.quantile(np.abs(values), 0.999) for values in channels)
    for channel, values in enumerate(channels):
        colour = matplotlib.colormaps["turbo"]((channel + 0.5) / len(channels))
        for axes, shown, limit in (
            (stored, values, reach),
            (normal, (values - mean[channel]) / std[channel], 5),
        ):
            heights, edges = np.histogram(shown, bins=120, range=(-limit, limit), density=True)
            axes.plot((edges[1:] + edges[:-1]) / 2, heights, color=colour, linewidth=1, label=str(channel))
    x = np.linspace(-5, 5, 200)
    normal.plot(x, np.exp(-x * x / 2) / np.sqrt(2 * np.pi), "k--", linewidth=1)
    stored.set_title(f"latents as stored, std {std.min():.3f} to {std.max():.3f}")
    normal.set_title("normalised by the manifest; dashed: standard normal")
    for axes in (stored, normal):
        axes.set_yscale("log")
        axes.set_ylim(bottom=1e-4)
        axes.set_xlabel(f"value ({len(sample)} records)")
    stored.legend(title="channel", fontsize=6, title_fontsize=7, ncols=2)
    figure.savefig(path, dpi=110, metadata={"Comment": MARK})


def draw_buckets(counts: dict[buckets.Size, int], dataset: Dataset, path: Path) -> None:
    """Aspect ratios of the sources against the buckets, and records per bucket."""
    aspects = np.array(dataset.index["width"].to_pylist()) / np.array(dataset.index["height"].to_pylist())
    draw_aspects(aspects, counts, path)


def draw_aspects(aspects: np.ndarray, counts: dict[buckets.Size, int], path: Path) -> None:
    """Histogram of source aspect ratios (width / height) with the bucket table drawn in, and its counts."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    table = list(counts)
    reach = np.log(max(max(table[-1][1] / table[-1][0], aspects.max()), 1.2))
    left.hist(np.log(aspects), bins=np.linspace(-reach, reach, 81), color="#4878a8")
    for height, width in table:
        left.axvline(np.log(width / height), color="#d06030", linewidth=0.6, alpha=0.7)
    ticks = [(w, h) for w, h in _RATIOS if abs(np.log(w / h)) <= reach + 0.01]
    left.set_xticks([np.log(w / h) for w, h in ticks], [f"{w}:{h}" for w, h in ticks], fontsize=8)
    left.set_xlabel("aspect ratio of the source (width / height); lines are buckets")
    left.set_ylabel("images")
    shown = [(size, count) for size, count in counts.items() if count]
    right.barh(range(len(shown)), [count for _, count in shown], color="#4878a8")
    right.set_yticks(range(len(shown)), [f"{w}x{h}" for (h, w), _ in shown], fontsize=7)
    right.set_xlabel("images per bucket (width x height)")
    figure.savefig(path, dpi=110, metadata={"Comment": MARK})


def draw_contact(dataset: Dataset, cells: int, device: str, path: Path) -> str:
    """Original beside decoded latent, with caption and bucket. Returns a note on what could not be shown."""
    positions = dataset.spread(cells)
    columns = min(4, len(positions))
    lines = -(-len(positions) // columns)
    vae, note = _decoder(dataset.manifest, device)
    root, why = _source_root(dataset.directory)
    note += why
    figure = Figure(figsize=(4.2 * columns, 2.95 * lines), layout="constrained")
    missing = 0
    for axes, position in zip(figure.subplots(lines, columns, squeeze=False).ravel(), positions):
        record = dataset.record(position)
        pictures = []
        original = _original(root, record, dataset)
        if original is not None:
            pictures.append(original)
        missing += original is None
        pictures.append(vae.decode(record.latent[None])[0] if vae else _false_colours(record.latent))
        gap = np.full((pictures[0].shape[0], max(2, pictures[0].shape[1] // 40), 3), 255, np.uint8)
        strip = [part for picture in pictures for part in (picture, gap)][:-1]
        axes.imshow(np.concatenate(strip, axis=1))
        height, width = record.encoded_size
        original_height, original_width = record.original_size
        title = f"{record.key[-40:]}   {original_width}x{original_height} to {width}x{height}"
        if dataset.index["split"][position].as_py() == "holdout":
            title += "   held out"
        title, face = drawable(title)
        axes.set_title(title, font=Path(face.file) if face.file else None, fontsize=7, parse_math=False)
        caption, face = drawable(record.caption)
        caption = textwrap.shorten(caption, 150, placeholder=" ...")
        wrapped = "\n".join(textwrap.wrap(caption, 62))
        axes.set_xlabel(wrapped, font=Path(face.file) if face.file else None, fontsize=6.5, parse_math=False)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in figure.axes[len(positions) :]:
        axes.set_axis_off()
    figure.suptitle("original | decoded from the stored latent" if vae else "original | latent in false colours")
    figure.savefig(path, dpi=110, metadata={"Comment": MARK})
    if missing:
        note += f" The source of {missing} of {len(positions)} records is not where it was or has changed."
    return note.strip()


def _decoder(manifest: Manifest, device: str) -> tuple[Vae | None, str]:
    try:
        vae = load_vae(manifest.vae.id, device)
    except (PreprocessError, ImportError) as error:
        return None, f"Latents are in false colours, because the VAE could not be loaded: {error}."
    if vae.identity.sha256 != manifest.vae.sha256:
        return (
            None,
            f"Latents are in false colours: the weights of {manifest.vae.id} are not those that encoded.",
        )
    return vae, ""


def _false_colours(latent: np.ndarray) -> np.ndarray:
    """The three strongest principal components of a latent [C, h, w] as uint8 [8h, 8w, 3]."""
    flat = latent.reshape(latent.shape[0], -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    _, vectors = np.linalg.eigh(flat @ flat.T)
    top = (vectors[:, ::-1][:, :3].T @ flat).reshape(-1, *latent.shape[1:])
    low, high = np.quantile(top, [0.01, 0.99], axis=(1, 2), keepdims=True)
    shown = (np.clip((top - low) / np.maximum(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
    return np.repeat(np.repeat(shown.transpose(1, 2, 0), 8, axis=0), 8, axis=1)


def _source_root(directory: Path) -> tuple[Path | None, str]:
    try:
        source = Path(load_options(directory).input)
    except PreprocessError as error:
        return None, f" No originals: {error}."
    return source if source.is_dir() else source.parent, ""


def _original(root: Path | None, record: Record, dataset: Dataset) -> np.ndarray | None:
    """The source as the VAE saw it, or None if it is not there or has changed since."""
    if root is None:
        return None
    try:
        source = root / record.key
        if not source.resolve().is_relative_to(root.resolve()):  # a dataset may come from anyone
            return None
        data = ByteSource(str(source)).read(MAX_FILE_BYTES)
        if hashlib.sha256(data).hexdigest() != record.content_hash:
            return None
        header = read_header(data, Limits(min_side=1, max_aspect=1000))
        return decode(data, header, record.encoded_size, dataset.manifest.fit, record.content_hash).pixels
    except (
        Rejected,
        OSError,
        ValueError,
        RuntimeError,
    ):  # ValueError: a NUL in the key; RuntimeError: a loop of links
        return None
