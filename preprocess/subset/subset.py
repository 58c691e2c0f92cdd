"""`python -m preprocess subset`: the pictures that the gate's run memorises, as a folder to build from.

The new folder is made beside the old one and takes its place when it is whole. What was chosen and why is in
`OUTPUT/.subset`, which `build` does not look into.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from fluxdit_jax.dataset.manifest import MANIFEST, sha256_file
from fluxdit_jax.shared.atomic_files import replacing, sync_folder
from fluxdit_jax.shared.sanitize import shown
from preprocess import PreprocessError
from preprocess.buckets import distortion, enlargement
from preprocess.build.advice import VISIBLE
from preprocess.build.journal import Journal
from preprocess.build.lock import locked
from preprocess.build.plan import Item
from preprocess.build.summary import train_command
from preprocess.build.units import disk_errors
from preprocess.decoding.images import Rejected
from preprocess.input import captions
from preprocess.input.findings import InputImage
from preprocess.input.precomputed import folders, parse_option
from preprocess.inspect.sheet import Chosen, draw_sheet
from preprocess.subset.candidates import Pool, SubsetOptions, gather, read_pixels
from preprocess.subset.choice import Choice, choose, distinct, figures

ABOUT = ".subset/subset.json"
SHEET = ".subset/subset.png"
CONDITIONS = ".subset/conditions"
_BENT, _ENLARGED = 1 + VISIBLE, 1.5  # from where on it is worth a warning


@dataclasses.dataclass(frozen=True)
class Result:
    """What `subset` did: `about` is what `subset.json` says, `changed` is False if all of it was there already."""

    output: Path
    about: dict[str, Any]
    changed: bool


def subset(options: SubsetOptions) -> Result:
    """Chooses a set and writes it as a folder of PNG files with `.json` captions.

    The same input gives the same bytes. An interrupted run leaves the output as it was; vectors that a real
    encoder had made are kept beside it and used by the next run.

    Raises:
      PreprocessError: an option is impossible, there are fewer candidates than pictures wanted, the output
        holds something else, or an input or the disk does not allow it.
      DatasetError: the dataset is damaged as a whole.
    """
    options = options.checked()
    output = Path(options.output).resolve()
    source = Path(options.input).resolve()
    if source.is_relative_to(output):
        raise PreprocessError(f"--output {options.output} must not be the input or a folder that holds it")
    journal = Journal(None)
    staging = output.parent / f".{output.name}.subset"
    with disk_errors(output):
        (staging / "work").mkdir(parents=True, exist_ok=True)
    with locked(staging / "work" / "lock"), disk_errors(output):
        if (staging / "old").exists() and not output.exists():  # killed between the two renames
            (staging / "old").rename(output)
        _check_output(output)
        for name in ("next", "old"):
            shutil.rmtree(staging / name, ignore_errors=True)
        pool = gather(options, staging / "work", journal)
        if Path(pool.build.input).resolve().is_relative_to(output):
            raise PreprocessError(f"--output {options.output} must not hold the pictures that it is made from")
        chosen, choice, about = _choose(options, pool)
        about["files"] = _write(staging / "next", options, pool, chosen, about, journal)
        text = json.dumps(about, indent=1) + "\n"
        (staging / "next" / ABOUT).write_text(text, encoding="utf-8")
        changed = _put(output, staging, text)
        shutil.rmtree(staging, ignore_errors=True)
    _report(options, pool, choice, Result(output, about, changed), journal)
    return Result(output, about, changed)


# --------------------------------------------------------------------------------------------------- choosing


def _choose(options: SubsetOptions, pool: Pool) -> tuple[list[Chosen], Choice, dict[str, Any]]:
    rules = options.rules()
    kept, instead, copies = distinct(pool.features, rules)
    features, items = pool.features.at(kept), [pool.items[row] for row in kept]
    count = min(options.count, len(kept))
    if count < options.count and (not options.allow_fewer or count < 2):
        counts = collections.Counter(reject.reason for reject in pool.left_out)
        reasons = [f"{copies} copies byte by byte", f"{len(instead) - copies} that look like another"]
        reasons += [f"{number} {reason}" for reason, number in sorted(counts.items())]
        raise PreprocessError(
            f"--count {options.count}: there are {len(kept)} candidates among {pool.total:,} pictures (left out: "
            f"{', '.join(reasons)}); give --count {len(kept)} or less, or --allow-fewer"
        )
    choice = choose(features, count, rules, options.light_share)
    any_light = choose(features, count, rules, 1.0)

    names = _names([items[row].key for row in choice.rows])
    partners = {
        **{c.old: (c.new, c.twins) for c in choice.couples},
        **{c.new: (c.old, c.twins) for c in choice.couples},
    }
    chosen = []
    for row, name, far in zip(choice.rows, names, choice.distances):
        why = "first" if far == float("inf") else f"{far:.3f} in pose from all before"
        if row in partners:
            partner, twins = partners[row]
            kind = "the edit turns its caption into that of" if twins else "has the other words of the edit than"
            why = f"couple: {kind} {names[choice.rows.index(partner)]}"
        chosen.append(Chosen(items[row], name, why))
    sizes = [((c.item.header.height, c.item.header.width), options.target(c.item)) for c in chosen]
    about = {
        "input": str(Path(options.input).resolve()),
        "images": str(Path(pool.build.input).resolve()),
        "options": _told_options(options, pool),
        "pictures": pool.total,
        "candidates": len(kept),
        "copies": copies,
        "alike": len(instead) - copies,
        "light": {
            "centre": items[choice.centre].key,
            "candidates": choice.neighbours,
            "radius": round(choice.radius, 4),
        },
        "couples": {"twins": sum(c.twins for c in choice.couples), "all": len(choice.couples)},
        "figures": figures(features, choice, any_light),
        "worst_distortion": round(max(distortion(*pair) for pair in sizes), 4),
        "distorted": sum(distortion(*pair) > _BENT for pair in sizes),
        "enlarged": sum(enlargement(*pair) > _ENLARGED for pair in sizes),
        "chosen": [
            {"file": c.name, "key": c.item.key, "sha256": c.item.content, "caption": c.item.caption, "why": c.why}
            | ({"other_captions": list(c.item.captions[1:])} if c.item.captions[1:] else {})
            for c in chosen
        ],
        "left_out": [
            *({"key": pool.items[row].key, "reason": "the same picture as", "detail": pool.items[twin].key}
              for row, twin in sorted(instead.items())),
            *({"key": r.key, "reason": r.reason, "detail": r.detail} for r in pool.left_out),
        ],
    }  # fmt: skip
    return chosen, choice, about


def _told_options(options: SubsetOptions, pool: Pool) -> dict[str, Any]:
    """What decides the choice; where it is written to and by how many threads does not."""
    raw = dataclasses.asdict(options)
    for name in ("input", "output", "images", "workers", "device", "allow_fewer"):
        del raw[name]
    if pool.dataset:
        raw |= {name: getattr(pool.build, name) for name in ("text_encoder", "vision_encoder", "caption_field")}
    return raw


def _names(keys: list[str]) -> list[str]:
    """Path below the output for each key: the key's, as .png; where two would be the same, with its extension too.

    No part starts with a dot, so that `build` sees them all and none leads out of the folder.
    """
    plain = ["/".join(part.lstrip(".") or "_" for part in PurePosixPath(key).parts) for key in keys]
    stems = [str(PurePosixPath(name).with_suffix("")) for name in plain]
    count = collections.Counter(stem.casefold() for stem in stems)
    names = [f"{s if count[s.casefold()] == 1 else n}.png" for s, n in zip(stems, plain)]
    if len({name.casefold() for name in names}) < len(names):
        names = [f"{number:05d}_{name.replace('/', '_')}" for number, name in enumerate(names)]
    return names


# ---------------------------------------------------------------------------------------------------- writing


def _write(
    folder: Path,
    options: SubsetOptions,
    pool: Pool,
    chosen: list[Chosen],
    about: dict[str, Any],
    journal: Journal,
) -> dict[str, str]:
    """Everything but `subset.json`; returns sha256 by name below the folder."""
    files: dict[str, str] = {}
    pictures = []
    with journal.bar(len(chosen), "write") as bar:
        for one in chosen:
            path = folder / one.name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                picture = Image.fromarray(read_pixels(one.item, options.target(one.item)))
                caption = _caption(one.item, pool.found[one.item.key], about["images"])
            except Rejected as rejected:
                raise PreprocessError(f"{one.item.image.path}: {rejected}; give the same command again") from rejected
            with replacing(path) as temporary:
                picture.save(temporary, "PNG", compress_level=4)
            with replacing(path.with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps(caption, indent=1) + "\n", encoding="utf-8")
            for written in (path, path.with_suffix(".json")):
                files[written.relative_to(folder).as_posix()] = sha256_file(written)
            pictures.append(picture)
            bar.update()
    files |= _write_conditions(folder, pool, chosen)
    (folder / SHEET).parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(pictures, chosen, about).save(folder / SHEET, "PNG", compress_level=6)
    files[SHEET] = sha256_file(folder / SHEET)
    return files


def _write_conditions(folder: Path, pool: Pool, chosen: list[Chosen]) -> dict[str, str]:
    """The files of the dataset's further conditions under the names of the chosen pictures; returns as `_write`."""
    files: dict[str, str] = {}
    for each in folders(pool.build.condition, "", list(pool.found), ""):
        for one in chosen:
            path = folder / CONDITIONS / each.field.name / f"{one.name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.write_bytes(each.read(one.item.key)[0])
            except Rejected as rejected:
                raise PreprocessError(f"{each.directory}: {one.item.key}: {rejected}") from rejected
            files[path.relative_to(folder).as_posix()] = sha256_file(path)
    return files


def _caption(item: Item, found: InputImage, root: str) -> dict[str, Any]:
    """The fields of the source's `.json`, with the caption, or a list of all, where `build` looks, and the source."""
    raw: dict[str, Any] = {}
    file = next((source.place for source in found.captions if source.type == ".json"), None)
    if file is not None:
        with contextlib.suppress(ValueError, RecursionError, Rejected):  # its caption was in another source then
            raw = json.loads(captions.decode(file.read(captions.MAX_BYTES)))
    raw = raw if isinstance(raw, dict) else {}
    source: dict[str, Any] = {"folder": root, "key": item.key, "sha256": item.content}
    caption = list(item.captions) if len(item.captions) > 1 else item.caption
    if raw.get("caption", caption) != caption:
        source["caption"] = raw["caption"]  # the one used stood in another field
    if "subset_of" in raw:
        source["subset_of"] = raw["subset_of"]
    return raw | {"caption": caption, "subset_of": source}


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


def _report(options: SubsetOptions, pool: Pool, choice: Choice, result: Result, journal: Journal) -> None:
    about, say = result.about, journal.say
    size = f"{options.resolution}x{options.resolution}" if options.square else f"{options.resolution} px by bucket"
    say(f"{'Done' if result.changed else 'Up to date'}: {len(choice.rows)} pictures, {size}, in {result.output}")
    say(
        f"  from {about['candidates']:,} candidates among {about['pictures']:,} pictures; left out: "
        f"{about['copies']} copies byte by byte, {about['alike']} that look like another"
        + "".join(
            f", {count} {reason}"
            for reason, count in sorted(collections.Counter(r.reason for r in pool.left_out).items())
        )
    )
    if about["pictures"] > options.candidates:
        say(f"  {options.candidates:,} of the pictures were looked at (--candidates)")
    if several := sum("other_captions" in one for one in about["chosen"]):
        say(f"  {several} of them have several captions: all are kept, the first one is judged and framed")
    couples = about["couples"]
    say(
        f"  {couples['all']} couples for the gate's edit, {couples['twins']} of them with captions that it turns "
        f"into each other; light: the {about['light']['candidates']} candidates nearest to "
        + shown(about["light"]["centre"])
    )
    _report_figures(about["figures"], say)
    if not couples["all"]:
        say(
            "  warning: no two captions differ in the words of the gate's edit "
            f"({'; '.join(f'{rule.old} => {rule.new}' for rule in options.rules())}), so its third test cannot pass: "
            "choose words that your captions have, and give them here and to validate, as "
            '--edit "on the left=>on the right:right"'
        )
    if about["distorted"]:
        square = " to be square; without --square they keep their shape" if options.square else ""
        say(
            f"  warning: {about['distorted']} of {len(choice.rows)} pictures are stretched or squeezed by more than "
            f"{VISIBLE:.0%}, which is visible (worst {about['worst_distortion'] - 1:.0%}){square}"
        )
    if about["enlarged"]:
        say(f"  warning: {about['enlarged']} pictures are enlarged more than {_ENLARGED:g} times: they will look soft")
    say(f"Look at it:  {result.output / SHEET}  (why each: {ABOUT})")
    for command in commands(options, pool, result.output):
        say(command)


def _report_figures(figures: dict[str, dict[str, float]], say: Callable[[str], None]) -> None:
    say("  The chosen pictures beside as many drawn at random, and beside the same choice if any light were allowed.")
    say("  A difference is 0 for two alike; given is the mean over all pairs, or to the nearest other picture.")
    say("                                             wanted    chosen   any light   at random")
    for name, label, wanted in (
        ("light_spread", "difference in light", "small"),
        ("caption_spread", "difference of captions", "large"),
        ("pose_spread", "difference in what is seen and said", "large"),
        ("pose_spacing", "the same, to the nearest other", "large"),
        ("captions", "different captions", "many"),
    ):
        row = figures[name]
        digits = 0 if name == "captions" else 3
        say(
            f"    {label:38} {wanted:>8} {row['chosen']:9.{digits}f} {row['any_light']:11.{digits}f} "
            f"{row['by_chance']:11.{digits}f}"
        )


def commands(options: SubsetOptions, pool: Pool, output: Path) -> list[str]:
    """The two lines to go on with: build, then train and validate."""
    dataset = output.with_name(output.name + "-dataset")
    build = ["python -m preprocess build --input", str(output), "--output", str(dataset)]
    build += ["--resolution", str(options.resolution), "--holdout", "0"]
    if (dataset / MANIFEST).exists():
        build += ["--replace"]  # of a set that was chosen before
    if options.resolution < pool.build.min_side:
        build += ["--min-side", str(options.resolution)]
    encoders = [("--text-encoder", pool.build.text_encoder), ("--vision-encoder", pool.build.vision_encoder)]
    if pool.dataset:
        build += ["--vae", pool.build.vae]
        if pool.build.max_aspect != 4.0 and not options.square:
            build += ["--max-aspect", f"{pool.build.max_aspect:g}"]
    for name, _ in map(parse_option, pool.build.condition):
        build += ["--condition", f"{name}={output / CONDITIONS / name}"]
    for flag, value in encoders:
        if pool.dataset or not value.startswith("builtin:"):
            build += [flag, value]
    words = [build[0], *(shlex.quote(word) for word in build[1:])]
    run = f"--workdir={shlex.quote('runs/' + output.name)}"
    edits = "".join(f" --edit {shlex.quote(text)}" for text in options.edit)
    note = (
        ""
        if pool.dataset
        else "   # no downloads: --vae builtin:dct --text-encoder builtin:hash --vision-encoder builtin:tone"
    )
    return [
        " ".join(words) + note,
        f"{train_command('nano', shlex.quote(str(dataset)), run.removeprefix('--workdir='))} && "
        f"python -m fluxdit_jax.validate {run}{edits}",
    ]
