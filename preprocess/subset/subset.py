"""`python -m preprocess subset`: a gate set from photographs, in which every question has a known answer.

Each chosen photograph is written under several light changes and mirrored; where each picture stands in that grid is
in `.grid.json`, which `build` takes along. The new folder is made beside the old one and takes its place when it is
whole. What was chosen and why is in `OUTPUT/.subset`, which `build` does not look into.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from fluxdit_jax.dataset.grid import INPUT_GRID, Place, write_grid
from fluxdit_jax.dataset.manifest import MANIFEST, sha256_file
from fluxdit_jax.shared import image_grid
from fluxdit_jax.shared.atomic_files import replacing, sync_folder
from fluxdit_jax.shared.sanitize import shown
from preprocess import PreprocessError
from preprocess.buckets import distortion, enlargement
from preprocess.build.advice import VISIBLE
from preprocess.build.journal import Journal
from preprocess.build.lock import locked
from preprocess.build.options import Options
from preprocess.build.summary import train_command
from preprocess.build.units import disk_errors
from preprocess.decoding.images import Rejected
from preprocess.encoders import VisionEncoder, load_vision_encoder
from preprocess.input.findings import Reject
from preprocess.input.precomputed import folders, parse_option
from preprocess.inspect.separation import Lights, light_lines, separate_lights
from preprocess.subset.candidates import Candidate, Pool, SubsetOptions, gather, read_pixels, reasons, variant
from preprocess.subset.choice import choose
from preprocess.subset.lights import Light
from preprocess.subset.views import MIRRORED, ORIGINAL

ABOUT = ".subset/subset.json"
SHEET = ".subset/subset.png"
CONDITIONS = ".subset/conditions"
_BENT, _ENLARGED = 1 + VISIBLE, 1.5  # from where on it is worth a warning
_STAND_IN = "builtin:tone"


@dataclasses.dataclass(frozen=True)
class Result:
    """What `subset` did: `about` is what `subset.json` says, `changed` is False if all of it was there already."""

    output: Path
    about: dict[str, Any]
    changed: bool


@dataclasses.dataclass(frozen=True)
class Photograph:
    """A chosen photograph: `name` is that of its pictures below the output, without view and light."""

    candidate: Candidate
    name: str

    def file(self, view: str, light: Light) -> str:
        """Path below the output of one of its pictures."""
        return f"{self.name}{f'.{MIRRORED}' if view == MIRRORED else ''}.{light.name}.png"


def subset(options: SubsetOptions) -> Result:
    """Chooses photographs and writes the grid as a folder of PNG files with `.json` captions.

    The same input gives the same bytes. An interrupted run leaves the output as it was.

    Raises:
      PreprocessError: an option is impossible, there are fewer candidates than photographs wanted, the output
        holds something else, or an input or the disk does not allow it.
      DatasetError: the dataset is damaged as a whole.
    """
    options = options.checked()
    output = Path(options.output).resolve()
    if Path(options.input).resolve().is_relative_to(output):
        raise PreprocessError(f"--output {options.output} must not be the input or a folder that holds it")
    journal = Journal(None)
    with _staging(output) as staging:
        if (staging / "old").exists() and not output.exists():  # killed between the two renames
            (staging / "old").rename(output)
        _check_output(output)
        for name in ("next", "old"):
            shutil.rmtree(staging / name, ignore_errors=True)
        pool = gather(options, journal)
        pictures = Path(pool.build.input).resolve()
        if output.is_relative_to(pictures):
            raise PreprocessError(
                f"--output {options.output} lies in {pool.build.input}: the next build of that folder would take its "
                "pictures as well. Give a folder beside it"
            )
        if pictures.is_relative_to(output):
            raise PreprocessError(f"--output {options.output} must not hold the pictures that it is made from")
        encoder = _vision_encoder(options, pool)
        chosen, left_out = _choose(options, pool)
        files, lights = _write(staging / "next", options, pool, chosen, encoder, journal)
        about = _about(options, pool, chosen, left_out, encoder, lights) | {"files": files}
        text = json.dumps(about, indent=1) + "\n"
        (staging / "next" / ABOUT).write_text(text, encoding="utf-8")
        changed = _put(output, staging, text)
        shutil.rmtree(staging, ignore_errors=True)
    result = Result(output, about, changed)
    for line in [*_report(options, result, lights, encoder), *commands(options, pool, chosen, output)]:
        journal.say(line)
    return result


@contextlib.contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A locked folder beside the output to make it in; after an error it stays only if the old output is in it."""
    staging = output.parent / f".{output.name}.subset"
    with disk_errors(output):
        (staging / "work").mkdir(parents=True, exist_ok=True)
    with locked(staging / "work" / "lock"), disk_errors(output):
        try:
            yield staging
        except PreprocessError:
            if not (staging / "old").exists():
                shutil.rmtree(staging, ignore_errors=True)
            raise


def _vision_encoder(options: SubsetOptions, pool: Pool) -> VisionEncoder | None:
    """What the lights are looked at with; None where the vectors of the dataset came from files."""
    if pool.dataset and pool.build.vision_embeddings and not options.vision_encoder:
        return None
    spec = options.vision_encoder or (pool.build.vision_encoder if pool.dataset else _STAND_IN)
    return load_vision_encoder(spec, options.device)


def _choose(options: SubsetOptions, pool: Pool) -> tuple[list[Photograph], list[Reject]]:
    chosen, left_out = choose(pool.candidates, options)
    if len(chosen) < options.count and (not options.allow_fewer or len(chosen) < 1):
        fewer = f"give --count {len(chosen)}, or --allow-fewer" if chosen else "it cannot be made of these"
        raise PreprocessError(
            f"--count {options.count}: only {len(chosen)} photographs among {pool.total:,} can stand together in a "
            f"set (left out: {reasons(reject.reason for reject in pool.left_out + left_out)}); {fewer}"
        )
    names = _names([candidate.item.key for candidate in chosen])
    return [Photograph(candidate, name) for candidate, name in zip(chosen, names)], left_out


def _names(keys: list[str]) -> list[str]:
    """Path below the output for each key, without extension; where two would be the same, with it.

    No part starts with a dot, so that `build` sees them all and none leads out of the folder.
    """
    plain = ["/".join(part.lstrip(".") or "_" for part in PurePosixPath(key).parts) for key in keys]
    stems = [str(PurePosixPath(name).with_suffix("")) for name in plain]
    count = collections.Counter(stem.casefold() for stem in stems)
    names = [s if count[s.casefold()] == 1 else n for s, n in zip(stems, plain)]
    files = {(name + view).casefold() for name in names for view in ("", f".{MIRRORED}")}
    if len(files) < 2 * len(names):
        names = [f"{number:05d}_{name.replace('/', '_')}" for number, name in enumerate(names)]
    return names


def _about(
    options: SubsetOptions,
    pool: Pool,
    chosen: list[Photograph],
    left_out: list[Reject],
    encoder: VisionEncoder | None,
    lights: Lights | None,
) -> dict[str, Any]:
    """The content of `subset.json`, without the files."""
    told = dataclasses.asdict(options)
    for name in ("input", "output", "images", "workers", "device", "allow_fewer"):  # these decide nothing
        del told[name]
    items = [one.candidate.item for one in chosen]
    sizes = [((item.header.height, item.header.width), options.target(item)) for item in items]
    return {
        "input": str(Path(options.input).resolve()),
        "images": str(Path(pool.build.input).resolve()),
        "options": told,
        "pictures": pool.total,
        "candidates": len(pool.candidates),
        "photographs": len(chosen),
        "made": len(chosen) * len(options.variants),
        "lights": [light.name for light in dict.fromkeys(light for _, light in options.variants)],
        "vision_encoder": encoder.identity.id if encoder else "",
        "lights_seen": dataclasses.asdict(lights) if lights else None,
        "own_words": sum(options.has_words(item.caption) for item in items),
        "several_captions": sum(len(item.captions) > 1 for item in items),
        "worst_distortion": round(max(distortion(*pair) for pair in sizes), 4),
        "distorted": sum(distortion(*pair) > _BENT for pair in sizes),
        "enlarged": sum(enlargement(*pair) > _ENLARGED for pair in sizes),
        "chosen": [
            {
                "photograph": one.name,
                "key": item.key,
                "sha256": item.content,
                "captions": options.captions(item.caption),
            }
            for one, item in zip(chosen, items)
        ],
        "left_out": [{"key": r.key, "reason": r.reason, "detail": r.detail} for r in [*left_out, *pool.left_out]],
    }


# ---------------------------------------------------------------------------------------------------- writing


def _write(
    folder: Path,
    options: SubsetOptions,
    pool: Pool,
    chosen: list[Photograph],
    encoder: VisionEncoder | None,
    journal: Journal,
) -> tuple[dict[str, str], Lights | None]:
    """Everything but `subset.json`; returns sha256 by name below the folder, and how well the lights are seen."""
    grid: dict[str, Place] = {}
    vectors: list[np.ndarray] = []
    rows: list[list[np.ndarray]] = []
    with journal.bar(len(chosen) * len(options.variants), "write") as bar:
        for one in chosen:
            item = one.candidate.item
            captions = options.captions(item.caption)
            source = {"folder": str(Path(pool.build.input).resolve()), "key": item.key, "sha256": item.content}
            try:
                pixels = read_pixels(item, options.target(item))
            except Rejected as rejected:
                raise PreprocessError(f"{item.image.path}: {rejected}; give the same command again") from rejected
            rows.append([])
            for view, light in options.variants:
                name, picture = one.file(view, light), variant(pixels, view, light)
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    Image.fromarray(picture).save(temporary, "PNG", compress_level=4)
                text = json.dumps(
                    {"caption": captions[view], "subset_of": source | {"caption": item.caption}}, indent=1
                )
                path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
                grid[name] = Place(one.name, view, light.name)
                rows[-1].append(picture)
                if encoder is not None:
                    vectors.append(encoder.encode(picture[None])[0])
                bar.update()
    lights = separate_lights(np.array(vectors), list(grid.values())) if vectors else None
    write_grid(folder / INPUT_GRID, grid)
    _write_conditions(folder, options, pool, chosen)
    (folder / SHEET).parent.mkdir(parents=True, exist_ok=True)
    titles = [" | ".join((one.name, *options.captions(one.candidate.item.caption).values())) for one in chosen]
    columns = [light.name if view == ORIGINAL else f"{light.name}, mirrored" for view, light in options.variants]
    image_grid.save(image_grid.grid(rows, column_titles=columns, row_titles=titles, cell=112), folder / SHEET)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}, lights


def _write_conditions(folder: Path, options: SubsetOptions, pool: Pool, chosen: list[Photograph]) -> None:
    """The dataset's further conditions: every picture that is made of a photograph gets the photograph's."""
    keys = sorted(one.candidate.item.key for one in chosen)
    for each in folders(pool.build.condition, "", lambda: keys, ""):
        for one in chosen:
            key = one.candidate.item.key
            try:
                data = each.read(key)[0]
            except Rejected as rejected:
                raise PreprocessError(f"{each.directory}: {key}: {rejected}") from rejected
            for view, light in options.variants:
                path = folder / CONDITIONS / each.field.name / f"{one.file(view, light)}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


def _check_output(output: Path) -> None:
    """Raises `PreprocessError` if the output holds anything that this command has not written just so."""
    if not output.exists():
        return
    if not output.is_dir():
        raise PreprocessError(f"--output {output} exists and is not a folder")
    there = {p.relative_to(output).as_posix(): p for p in output.rglob("*") if not p.is_dir() or p.is_symlink()}
    if not there:
        return
    files: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        files = dict(json.loads(there.pop(ABOUT).read_text(encoding="utf-8"))["files"])
    if not files:
        raise PreprocessError(f"--output {output} holds files and is no subset made here; give another folder")
    for name, path in sorted(there.items()):
        if path.is_symlink() or name not in files or sha256_file(path) != files[name]:
            what = "was changed since" if name in files else "is not from there"
            raise PreprocessError(
                f"--output {output} is a subset made before, but {name} {what} and would be lost; move it away or "
                "give another folder"
            )


def _put(output: Path, staging: Path, text: str) -> bool:
    """Puts the new folder in the place of the old one; returns False if they are the same."""
    _check_output(output)  # choosing may have taken long
    with contextlib.suppress(OSError):
        same = (output / ABOUT).read_text(encoding="utf-8") == text
        if same and all((output / name).is_file() for name in json.loads(text)["files"]):
            return False
    if output.exists():
        output.rename(staging / "old")
    (staging / "next").rename(output)
    sync_folder(output.parent)
    return True


# ----------------------------------------------------------------------------------------------------- telling


def _report(options: SubsetOptions, result: Result, lights: Lights | None, encoder: VisionEncoder | None) -> list[str]:
    about = result.about
    size = f"{options.resolution}x{options.resolution}" if options.square else f"{options.resolution} px by bucket"
    views = "2 views" if options.mirror else "1 view"
    left_out = reasons(one["reason"] for one in about["left_out"])
    lines = [
        f"{'Done' if result.changed else 'Up to date'}: {about['made']} pictures, {size}, in {result.output}",
        f"  {about['photographs']} photographs x {views} x {len(about['lights'])} lights "
        f"({', '.join(about['lights'])}), of {about['pictures']:,}; left out: {left_out}",
    ]
    if about["pictures"] > options.candidates:
        lines.append(f"  {options.candidates:,} of the pictures were looked at (--candidates)")
    if options.mirror:
        edit = options.edits()[0]
        lines.append(
            f"  {about['own_words']} of the captions have words that mirroring exchanges; to the other "
            f"{about['photographs'] - about['own_words']} is added: {edit.old!r}, mirrored {edit.new!r}"
        )
    if about["several_captions"]:
        lines.append(f"  {about['several_captions']} photographs have several captions: the first one is taken")
    if encoder is None:
        lines.append("  lights: not measured, as the dataset's vision vectors came from files (--vision-encoder)")
    else:
        lines += [f"  {line}" for line in light_lines(lights, encoder.identity.id)]
        if encoder.identity.id == _STAND_IN and not options.vision_encoder:
            lines.append(f"  {_STAND_IN} is a stand-in: give the encoder that you will build with (--vision-encoder)")
    if about["photographs"] < 2 or len(about["lights"]) < 2:
        lines.append(
            "  warning: the vision swap takes two photographs under two lights, and cannot be judged on this set"
        )
    if not options.mirror:
        lines.append("  warning: the text edit takes mirrored pictures, and cannot be judged on this set")
    if about["distorted"]:
        square = " to be square; without --square they keep their shape" if options.square else ""
        lines.append(
            f"  warning: {about['distorted']} of {about['photographs']} photographs are stretched or squeezed by more "
            f"than {VISIBLE:.0%}, which is visible (worst {about['worst_distortion'] - 1:.0%}){square}"
        )
    if about["enlarged"]:
        lines.append(
            f"  warning: {about['enlarged']} photographs are enlarged more than {_ENLARGED:g} times and look soft"
        )
    return [shown(line) for line in [*lines, f"Look at it:  {result.output / SHEET}  (what was chosen: {ABOUT})"]]


def commands(options: SubsetOptions, pool: Pool, chosen: list[Photograph], output: Path) -> list[str]:
    """The two lines to go on with: build, then train and validate."""
    dataset = output.with_name(output.name + "-dataset")
    build = ["python -m preprocess build --input", str(output), "--output", str(dataset)]
    build += ["--resolution", str(options.resolution), "--holdout", "0"]
    if (dataset / MANIFEST).exists():
        build += ["--replace"]  # of a set that was chosen before
    shortest = min(min(options.target(one.candidate.item)) for one in chosen)
    if shortest < Options.min_side:  # what `build` takes by default
        build += ["--min-side", str(shortest)]
    if pool.dataset:
        build += ["--vae", pool.build.vae, "--text-encoder", pool.build.text_encoder]
        if vision := options.vision_encoder or pool.build.vision_encoder:  # none: vectors from files
            build += ["--vision-encoder", vision]
        if pool.build.max_aspect != 4.0 and not options.square:
            build += ["--max-aspect", f"{pool.build.max_aspect:g}"]
    elif options.vision_encoder:
        build += ["--vision-encoder", options.vision_encoder]
    for name, _ in map(parse_option, pool.build.condition):
        build += ["--condition", f"{name}={output / CONDITIONS / name}"]
    words = [build[0], *(shlex.quote(word) for word in build[1:])]
    run = f"--workdir={shlex.quote('runs/' + output.name)}"
    note = (
        ""
        if pool.dataset
        else "   # no downloads: --vae builtin:dct --text-encoder builtin:hash --vision-encoder builtin:tone"
    )
    return [
        " ".join(words) + note,
        f"{train_command('nano', shlex.quote(str(dataset)), run.removeprefix('--workdir='))} && "
        f"python -m fluxdit_jax.validate {run}",
    ]
