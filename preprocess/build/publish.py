"""From finished units to a dataset directory, so that a kill at any moment leaves one or the other.

Everything new is written into `.build/next` first. Then `.build/commit.json` says which file goes where, and
from there the way only leads forward: `roll_forward` may be killed and called again as often as it likes.
While files are moved there is no manifest, so nobody takes the directory for a finished dataset.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa

from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.grid import GRID_FILE, write_grid
from fluxdit_jax.dataset.manifest import (
    INDEX,
    MANIFEST,
    REJECTS,
    SHARD_FILES,
    SPLITS,
    DatasetError,
    Manifest,
    Shard,
    json_checksum,
    load_manifest,
    sha256_file,
    shard_name,
)
from fluxdit_jax.shared.atomic_files import sync_folder, write_whole
from fluxdit_jax.shared.sanitize import plain_name
from preprocess import PreprocessError
from preprocess.build.options import Options
from preprocess.build.plan import Identities, Plan
from preprocess.build.rows import Finished, bucket_histogram, rows_schema, write_rows
from preprocess.build.statistics import Moments
from preprocess.build.units import SHARD_SUFFIX, WORK, disk_errors
from preprocess.input.findings import Reject, counted

OPTIONS_FILE = "build.json"
LOG_FILE = "build_log.jsonl"
_STORED = ("VAE latents", "T5 tokens", "DINO vectors")
_NEXT, _COMMIT = "next", "commit.json"


def dataset_name(directory: Path) -> str:
    """The TFDS name of a dataset: its folder's name in lower case, other characters than a-z, 0-9 as _."""
    name = re.sub(r"[^a-z0-9]+", "_", directory.resolve().name.lower()).strip("_")
    return name if name[:1].isalpha() else f"dataset_{name}".rstrip("_")


def _name_there(directory: Path, done: list[Finished]) -> str:
    """That of the dataset in a folder, by its manifest or its shards; "" if there is none.

    Runs know the shards of a folder that was moved by their names.
    """
    with contextlib.suppress(DatasetError):
        return load_manifest(directory).name
    ends = ((unit.info.file, f"-{unit.info.split}.array_record-") for unit in done)
    return next((file.partition(end)[0] for file, end in ends if end in file), "")


def publish(
    directory: Path, plan: Plan, done: list[Finished], identities: Identities, anew: bool = False
) -> tuple[Manifest, bool]:
    """Makes the dataset that consists of exactly these units.

    Args:
      done: every unit of the plan in order. `UnitInfo.file` tells whether its shard is in the dataset already or in
        `.build`.
      anew: also if it is that dataset already by what it lists.

    Returns:
      The manifest, and False if the directory was that dataset already.

    Raises:
      PreprocessError: no record is left in the train split, or a latent channel is constant.
    """
    name = _name_there(directory, done) or dataset_name(directory)
    placed = _place(name, done)
    manifest = _manifest(name, plan, placed, identities)
    rejects = [*plan.rejects, *(reject for unit, _ in placed for reject in unit.info.rejects)]
    work = directory / WORK
    next_folder = work / _NEXT
    shutil.rmtree(next_folder, ignore_errors=True)
    next_folder.mkdir(parents=True)
    with disk_errors(next_folder):
        save_rejects(next_folder / REJECTS, rejects)
        rejects_sha256 = sha256_file(next_folder / REJECTS)
        schema = rows_schema(["latent", *manifest.layout], placed=True)
        infos = [unit.info for unit, _ in placed]
        write_rows(next_folder / INDEX, schema, infos, (_index_part(unit) for unit, _ in placed), rejects_sha256)
        save_options(next_folder / OPTIONS_FILE, plan.options)
        keys = {key for unit, _ in placed for key in unit.read()["key"].to_pylist()} if plan.grid else set()
        grid = {key: place for key, place in plan.grid.items() if key in keys}
        if grid:
            write_grid(next_folder / GRID_FILE, grid)
        write_whole(next_folder / MANIFEST, manifest.to_json())
    moves = [(unit.info.uid, old, unit.info.file) for unit, old in placed if unit.info.records]
    if not anew and all(old == new for _, old, new in moves) and _same(directory, next_folder):
        finish(directory)
        return manifest, False
    with disk_errors(work / _COMMIT):
        keep = {old: uid for uid, old, _ in moves if old}
        commit = {"phase": 1, "keep": keep, "place": {uid: new for uid, _, new in moves}, "grid": bool(grid)}
        write_whole(work / _COMMIT, _to_json(commit))
    roll_forward(directory)
    return manifest, True


def _place(name: str, done: list[Finished]) -> list[tuple[Finished, str]]:
    """Gives shards their names; a unit without records gets none. Returns (unit, present name)."""
    placed = []
    for split in SPLITS:
        units = [unit for unit in done if unit.info.split == split]
        count = sum(unit.info.records > 0 for unit in units)
        number = 0
        for unit in units:
            file = ""
            if unit.info.records:
                file = shard_name(name, split, number, count)
                number += 1
            info = dataclasses.replace(unit.info, file=file)
            placed.append((dataclasses.replace(unit, info=info), unit.info.file))
    return placed


def _index_part(unit: Finished) -> pa.Table:
    info, table = unit.info, unit.read()
    place = {
        "split": pa.array([info.split] * info.records, pa.string()),
        "shard": pa.array([info.file] * info.records, pa.string()),
        "row": pa.array(range(info.records), pa.int32()),
    }
    return pa.table(place | {column: table[column] for column in table.column_names if column not in place})


def _manifest(name: str, plan: Plan, placed: list[tuple[Finished, str]], identities: Identities) -> Manifest:
    options = plan.options
    shards: dict[str, list[Shard]] = {}
    lengths = {"text": 0}  # of the longest of each sequence
    for unit, _ in placed:
        info, longest = unit.info, dict(unit.info.lengths)
        if info.records:
            table = unit.read()
            shard = Shard(info.file, info.sha256, info.bytes, info.records, bucket_histogram(table))
            shards.setdefault(info.split, []).append(shard)
            longest["text"] = max(table["tokens"].to_pylist())
        lengths |= {name: max(tokens, lengths.get(name, 0)) for name, tokens in longest.items()}
    infos = [unit.info for unit, _ in placed]
    moments = Moments.merged(info.moments for info in infos if info.moments and info.split == "train")
    if moments is None:
        output = Path(options.output)
        beside = output if (output / LOG_FILE).exists() else output.parent  # one log for all resolutions
        raise PreprocessError(
            "every image of the train split was rejected while it was decoded or encoded; the reasons are in "
            f"{beside / LOG_FILE}"
        )
    constant = [channel for channel, std in enumerate(moments.std) if not std > 0]
    if constant:
        raise PreprocessError(
            f"latent channel {constant[0]} has the same value everywhere in the train split, so it cannot be "
            "normalised: the images are all of one flat colour, or the VAE is broken"
        )
    return Manifest(
        name=name,
        resolution=options.resolution,
        modulus=options.modulus,
        fit=options.fit,
        encoders=identities,
        buckets=options.buckets(),
        latent_mean=tuple(moments.mean.tolist()),
        latent_std=tuple(moments.std.tolist()),
        latent_count=moments.count,
        lengths=lengths,
        shards={split: tuple(of_split) for split, of_split in shards.items()},
        vision_resolution=options.vision_resolution,
        rejects=counted(plan.rejects) + sum(len(info.rejects) for info in infos),
    )


def save_rejects(path: Path, rejects: list[Reject]) -> None:
    """Writes `rejects.jsonl`, sorted by key."""
    lines = []
    for reject in sorted(rejects, key=lambda reject: (reject.key, reject.reason, reject.detail)):
        raw = reject.to_dict()
        del raw["transient"]
        lines.append(json.dumps(raw, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def _to_json(raw: Any) -> str:
    return json.dumps(raw, indent=1, sort_keys=True) + "\n"


def _same(directory: Path, next_folder: Path) -> bool:
    """Whether the published files equal the next ones, byte for byte."""
    for path in next_folder.iterdir():
        try:
            if sha256_file(directory / path.name) != sha256_file(path):
                return False
        except FileNotFoundError:
            return False
    if (directory / GRID_FILE).exists() != (next_folder / GRID_FILE).exists():
        return False
    return all((directory / name).exists() for name in ("dataset_info.json", "features.json"))


def _read_commit(path: Path) -> dict[str, Any] | None:
    """What a publication was about to do; None if there is none. It moves files, so every name in it must be plain."""
    try:
        commit = json.loads(path.read_text(encoding="utf-8"))
        moves = [*commit["keep"].items(), *commit["place"].items()]
        if commit["phase"] not in (1, 2) or not all(plain_name(name) for pair in moves for name in pair):
            raise ValueError("not what `build` writes there")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PreprocessError(
            f"{path} is damaged ({error}): an interrupted publication cannot be completed. Move {path.parent} away and "
            "give the same command again; `python -m preprocess verify` tells what of the dataset is whole"
        ) from error
    return commit


def pending_index(directory: Path) -> Path | None:
    """The index of a publication that was begun and not completed; None if there is none."""
    work = directory / WORK
    pending = (work / _COMMIT).exists() and (work / _NEXT / INDEX).exists()
    return work / _NEXT / INDEX if pending else None


def roll_forward(directory: Path) -> bool:
    """Completes a publication that was begun, if there is one; returns whether there was."""
    work = directory / WORK
    commit = _read_commit(work / _COMMIT)
    if commit is None:
        return False
    with disk_errors(directory):
        if commit["phase"] == 1:
            (directory / MANIFEST).unlink(missing_ok=True)
            for file, uid in commit["keep"].items():
                if (directory / file).exists():
                    (directory / file).replace(work / (uid + SHARD_SUFFIX))
            sync_folder(work)
            sync_folder(directory)
            commit["phase"] = 2
            write_whole(work / _COMMIT, _to_json(commit))
        for uid, file in commit["place"].items():
            if (work / (uid + SHARD_SUFFIX)).exists():
                (work / (uid + SHARD_SUFFIX)).replace(directory / file)
        for path in directory.glob(SHARD_FILES):
            if path.name not in commit["place"].values():
                path.unlink()
        next_folder = work / _NEXT
        manifest_path = next_folder if (next_folder / MANIFEST).exists() else directory
        manifest = load_manifest(manifest_path)
        write_tfds_metadata(directory, manifest)
        if not commit.get("grid", True):
            (directory / GRID_FILE).unlink(missing_ok=True)
        for name in (INDEX, REJECTS, OPTIONS_FILE, GRID_FILE, MANIFEST):  # the manifest last
            if (next_folder / name).exists():
                (next_folder / name).replace(directory / name)
        sync_folder(directory)
    finish(directory)
    return True


def finish(directory: Path) -> None:
    """Removes `.build` (the lock in it goes last and its holder keeps it)."""
    work = directory / WORK
    (work / _COMMIT).unlink(missing_ok=True)
    for path in work.glob("*.parquet"):  # before the shards: a unit without rows does not count as finished
        path.unlink()
    shutil.rmtree(work, ignore_errors=True)


def write_tfds_metadata(directory: Path, manifest: Manifest) -> None:
    """`dataset_info.json` and `features.json`, as TFDS wants them; the shards must be there by name."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        dataset_name=manifest.name,
        data_dir=directory,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.records for shard in shards],
            num_bytes=sum(shard.bytes for shard in shards),
            filename_template=template,
        )
        for split, shards in manifest.shards.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=records.tfds_features(manifest),
        split_infos=splits,
        filename_template=template,
        version="1.0.0",
        check_data=False,
        description=f"Images encoded for fluxdit_jax: {', '.join([*_STORED, *manifest.further()])}.",
    )


def save_options(path: Path, options: Options, **more: Any) -> None:
    """Writes the file that `load_options` reads; `more` stands beside the options."""
    raw = {name: value for name, value in options.to_dict().items() if value != []}
    if not raw["vision_resolution"]:
        del raw["vision_resolution"]
    # With a checksum, as `verify --repair` would encode with what a flipped bit makes of them.
    with disk_errors(path):
        write_whole(path, _to_json({"options": raw, "checksum": json_checksum(raw)} | more))


def load_options(directory: Path) -> Options:
    """The options that a dataset was built with; raises `PreprocessError` if they are not there."""
    path = directory / OPTIONS_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("checksum", json_checksum(raw["options"])) != json_checksum(raw["options"]):
            raise ValueError(
                "its checksum is not that of its content: it is damaged, or was edited by hand; give the `build` "
                "command of the dataset again, it writes the file anew"
            )
        return Options.from_dict(raw["options"], str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PreprocessError(f"{path} cannot be read: {error}") from error
