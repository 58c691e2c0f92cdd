"""`python -m preprocess compare-vae`: which VAE keeps the user's own pictures best, in numbers and side by side."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import math
import shutil
import string
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import PngImagePlugin

from fluxdit_jax.dataset.manifest import MANIFEST
from fluxdit_jax.shared import image_grid
from fluxdit_jax.shared.json_files import write_json
from fluxdit_jax.shared.sanitize import shown
from preprocess import PreprocessError, buckets, encoders
from preprocess.build.journal import Journal
from preprocess.build.lock import locked
from preprocess.build.options import Options
from preprocess.build.plan import MAX_FILE_BYTES
from preprocess.build.publish import load_options
from preprocess.build.units import disk_errors
from preprocess.decoding.images import Rejected, decode, read_header
from preprocess.input.findings import Reject
from preprocess.input.found import InputImage
from preprocess.input.scan import scan
from preprocess.input.system_folders import MARK, is_plot
from preprocess.inspect.reconstruction import Reconstruction, reconstruct
from preprocess.inspect.report import byte_size

MEMORY = 6_000_000_000  # bytes of pictures, originals and reconstructions
MOST = 8  # VAEs side by side
WORK = ".compare"  # a folder with the lock, of a comparison that goes on
SHEETS = ("pictures.png", "details.png")
ROWS = 12  # of a sheet
WINDOW = 96  # side of a detail, pixels
MANY = 100_000  # pictures whose size on disk is printed


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """The options of `compare-vae`; `python -m preprocess compare-vae --help` says what each means."""

    vaes: tuple[str, ...]
    input: str
    output: str
    count: int = 64
    resolution: int = 512
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 4
    workers: int = 0
    allow_outside: bool = False

    def checked(self) -> CompareOptions:
        """These options; raises `PreprocessError` naming the one that is impossible."""
        if not 2 <= len(set(self.vaes)) == len(self.vaes) <= MOST:
            raise PreprocessError(f"give from two to {MOST} different --vae, got {', '.join(self.vaes)}")
        for name, value, low, high in (
            ("count", self.count, 1, 1000),
            ("resolution", self.resolution, 64, 4096),
            ("batch-size", self.batch_size, 1, 4096),
        ):
            if not low <= value <= high:
                raise PreprocessError(f"--{name} must be from {low} to {high}, got {value}")
        needed = 3 * self.count * self.resolution**2 * (1 + len(self.vaes))
        if needed > MEMORY:
            raise PreprocessError(
                f"--count {self.count} at --resolution {self.resolution} with {len(self.vaes)} VAEs takes "
                f"{byte_size(needed)} of memory, more than {byte_size(MEMORY)}: give a smaller --count"
            )
        return self


def compare(options: CompareOptions) -> None:
    """Prints the comparison, and writes `pictures.png`, `details.png` and `comparison.json`.

    Raises:
      PreprocessError: no picture can be used, a VAE cannot be loaded, or an option is impossible.
    """
    options = options.checked()
    _require_free(Path(options.output))
    work = Path(options.output) / WORK
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    with locked(work / "lock"):
        try:
            _compare(options, Journal(None))
        finally:
            shutil.rmtree(work)
            with contextlib.suppress(OSError):  # what failed has made nothing
                work.parent.rmdir()


def _compare(options: CompareOptions, journal: Journal) -> None:
    build = Options(input=_folder(options.input), output=options.output, resolution=options.resolution)
    build = dataclasses.replace(build, workers=options.workers).checked()
    loaded = encoders.load_all(
        *(functools.partial(encoders.load_vae, vae, options.device, options.dtype) for vae in options.vaes)
    )
    names, pictures = _pictures(options, build, journal)
    made = []
    for spec, vae in zip(options.vaes, loaded, strict=True):
        with journal.bar(len(pictures), shown(spec)[-40:]) as bar:
            made.append(reconstruct(vae, pictures, options.batch_size, bar.update))
    labels = list(string.ascii_uppercase[: len(loaded)])
    for label, spec, vae in zip(labels, options.vaes, loaded, strict=True):
        identity = vae.identity
        kind = identity.options.get("class", "built-in")
        journal.say(f"{label}  {spec}: {kind}, {identity.width} channels at 1/{vae.factor}, {identity.dtype}")
    journal.say("")
    for line in _table(labels, made):
        journal.say(line)
    for line in _pairs(labels, made):
        journal.say(line)
    folder = Path(options.output)
    _draw(folder, options.vaes, labels, names, pictures, made)
    write_json(_numbers(options, names, made), folder / "comparison.json")
    journal.say(
        f"\nLook at {folder}/details.png (where they differ most) and pictures.png; all numbers: comparison.json. What "
        "a VAE keeps is the most that a model can draw; how fast a model learns its latents is another question, "
        "docs/learning.md."
    )


def _require_free(folder: Path) -> None:
    """Raises `PreprocessError` if a sheet would replace a picture that is no sheet."""
    for name in SHEETS:
        if (folder / name).exists() and not is_plot(folder / name, False):
            raise PreprocessError(f"--output {folder} has a {name} that this program did not draw: give another folder")


def _folder(path: str) -> str:
    """The pictures: of a data set, those that it was built from."""
    return load_options(Path(path)).input if (Path(path) / MANIFEST).is_file() else path


def _pictures(options: CompareOptions, build: Options, journal: Journal) -> tuple[list[str], list[np.ndarray]]:
    """Keys and pixels of `options.count` pictures of the input, any of them and always the same, in their buckets."""
    listing = scan(build.input, exclude=Path(options.output), outside=options.allow_outside)
    order = sorted(listing.found, key=lambda found: hashlib.sha256(found.key.encode()).digest())
    table, limits = build.buckets(), build.limits()

    def look(found: InputImage) -> np.ndarray | Reject:
        try:
            data = found.image.read(MAX_FILE_BYTES)
            header = read_header(data, limits)
            return decode(data, header, buckets.nearest(table, header.height, header.width), "resize").pixels
        except Rejected as rejected:
            return Reject.of(found.key, found.image.path, rejected)

    taken: dict[str, np.ndarray] = {}
    rejects: list[Reject] = []
    wanted = min(options.count, len(order))
    with journal.bar(wanted, "read") as bar, ThreadPoolExecutor(build.workers) as pool:
        while order and len(taken) < wanted:
            some, order = order[: wanted - len(taken)], order[wanted - len(taken) :]
            for found, result in zip(some, pool.map(look, some), strict=True):
                if isinstance(result, Reject):
                    rejects.append(result)
                else:
                    taken[found.key] = result
                    bar.update()
    reasons = collections.Counter(reject.reason for reject in rejects)
    passed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
    if not taken:
        raise PreprocessError(f"--input {options.input}: no picture can be used ({passed or 'there is none'})")
    journal.say(
        f"{len(taken):,} of {len(listing.found):,} pictures of {build.input}, {options.resolution} px"
        + (f"; {passed} passed over" if passed else "")
    )
    keys = sorted(taken)
    return keys, [taken[key] for key in keys]


def _table(labels: list[str], made: list[Reconstruction]) -> Iterator[str]:
    """Numbers by VAE."""
    rows: list[tuple[str, list[str]]] = [
        ("PSNR, dB: mean (worst)", [f"{m.psnr.mean():.2f} ({m.psnr.min():.1f})" for m in made]),
        ("SSIM: mean (worst)", [f"{m.ssim.mean():.4f} ({m.ssim.min():.3f})" for m in made]),
        ("latents: std of channels", ["{:.3g} to {:.3g}".format(*m.latents.std) for m in made]),
        ("  independent directions", [f"{m.latents.directions:.1f}" for m in made]),
        ("  correlation of neighbours", [f"{m.latents.neighbours:.2f}" for m in made]),
        ("  largest value, in std", [f"{m.latents.largest:.1f}" for m in made]),
        (f"disk, {MANY:,} pictures", [byte_size(m.latent_bytes * MANY) for m in made]),
        ("encoding, pictures/s", [f"{m.encode_rate:.2f}" for m in made]),
        ("decoding, pictures/s", [f"{m.decode_rate:.2f}" for m in made]),
    ]
    widths = [max(len(label), *(len(cells[i]) for _, cells in rows)) for i, label in enumerate(labels)]
    for title, cells in [("", labels), *rows]:
        yield f"{title:<30}" + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _pairs(labels: list[str], made: list[Reconstruction]) -> Iterator[str]:
    """Every other VAE against the first, picture by picture."""
    for label, other in zip(labels[1:], made[1:], strict=True):
        gain = other.psnr - made[0].psnr
        error = f" ± {gain.std(ddof=1) / math.sqrt(len(gain)):.2f}" if len(gain) > 1 else ""
        yield (
            f"{label} less {labels[0]}: {gain.mean():+.2f}{error} dB (mean, standard error over pictures); {label} is "
            f"nearer in {int((gain > 0).sum())} of {len(gain)}"
        )


def _numbers(options: CompareOptions, names: list[str], made: list[Reconstruction]) -> dict[str, Any]:
    return {
        "input": options.input,
        "resolution": options.resolution,
        "pictures": names,
        "vaes": [
            {
                "vae": vae,
                "psnr_db": m.psnr.tolist(),
                "ssim": m.ssim.tolist(),
                "latents": dataclasses.asdict(m.latents),
                "latent_bytes": m.latent_bytes,
                "encode_pictures_per_s": m.encode_rate,
                "decode_pictures_per_s": m.decode_rate,
            }
            for vae, m in zip(options.vaes, made, strict=True)
        ],
    }


def _draw(
    folder: Path,
    vaes: Sequence[str],
    labels: list[str],
    names: list[str],
    pictures: list[np.ndarray],
    made: list[Reconstruction],
) -> None:
    """Whole pictures spread over all, and the places where the VAEs differ most."""
    titles = ["original", *(f"{label}  {Path(vae).name[-30:]}" for label, vae in zip(labels, vaes, strict=True))]
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", MARK)  # that no scan takes it for one of the user's

    def save(name: str, rows: list[list[np.ndarray]], named: list[str]) -> None:
        sheet = image_grid.grid(rows, column_titles=titles, row_titles=named, cell=256)
        image_grid.save(sheet, folder / name, notes)

    columns = [pictures, *(m.images for m in made)]
    spread = sorted({round(i) for i in np.linspace(0, len(pictures) - 1, min(ROWS, len(pictures)))})
    decibels = [f"{names[p][-40:]}, dB: {', '.join(f'{m.psnr[p]:.1f}' for m in made)}" for p in spread]
    save("pictures.png", [[images[p] for images in columns] for p in spread], decibels)
    places = [_where_they_differ(picture, [m.images[p] for m in made]) for p, picture in enumerate(pictures)]
    order = sorted(range(len(pictures)), key=lambda p: -places[p][0])[:ROWS]
    cuts = [[_cut(images[p], places[p][1]) for images in columns] for p in order]
    save(
        "details.png", cuts, [f"{names[p][-40:]}, from column {places[p][1][1]}, row {places[p][1][0]}" for p in order]
    )


def _where_they_differ(picture: np.ndarray, images: list[np.ndarray]) -> tuple[float, tuple[int, int]]:
    """How much the VAEs' errors differ at most in a window (mean squared grey levels), and its top and left."""
    step = WINDOW // 4
    h, w = (side // step for side in picture.shape[:2])  # cells
    errors = [np.square(image.astype(np.float32) - picture).mean(2)[: h * step, : w * step] for image in images]
    small = np.stack([error.reshape(h, step, w, step).mean((1, 3)) for error in errors])
    spread = small.max(0) - small.min(0)
    windows = np.lib.stride_tricks.sliding_window_view(spread, (min(4, h), min(4, w))).mean((2, 3))
    top, left = np.unravel_index(windows.argmax(), windows.shape)
    return float(windows.max()), (int(top) * step, int(left) * step)


def _cut(image: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    top, left = place
    return image[top : top + WINDOW, left : left + WINDOW]
