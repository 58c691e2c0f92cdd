"""Numbers that could poison a run: are they right, refused, or passed over?

    python tests/stress/numerics.py

Each case is a record that is written as another program might, past `encode_record`'s check. It must be refused by
`encode_record` or be right there; a training run must stop with its place (`stop`), pass over it with the same bits as
if it were damaged (`skip`), or train on it with finite losses; the same for the held-out split.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import damage_scene  # noqa: E402
from fault_table import Row, as_script  # noqa: E402
from training_helpers import LATENT_SIZES, TEXT_WIDTH, make_record, tiny_config, write_dataset, write_shard  # noqa: E402

from fluxdit_jax.dataset.fields import BF16  # noqa: E402
from fluxdit_jax.dataset.manifest import MANIFEST, DatasetError, sha256_file  # noqa: E402
from fluxdit_jax.dataset.records import Record, encode_record, serialize_unchecked  # noqa: E402
from fluxdit_jax.run.metrics import read_metrics  # noqa: E402
from fluxdit_jax.train import train  # noqa: E402

BAD, GOOD = 5, "right"


def _with(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed.reshape(-1)[array.size // 2] = value
    return changed


CASES = {
    "one NaN in a latent": lambda r: {"latent": _with(r.latent, math.nan)},
    "one NaN in a text": lambda r: {"text": _with(r.text, math.nan)},
    "an infinite vector": lambda r: {"vision": np.full_like(r.vision, math.inf)},
    "a vector with one NaN": lambda r: {"vision": _with(r.vision, math.nan)},
    "a zero vector": lambda r: {"vision": np.zeros_like(r.vision)},
    "no text token": lambda r: {"text": np.zeros((0, TEXT_WIDTH), BF16)},
    "an empty caption of one token": lambda r: {"caption": "", "text": r.text[:1]},
    "a caption of 512 tokens": lambda r: {"text": np.random.default_rng(0).normal(size=(512, TEXT_WIDTH)).astype(BF16)},
    "a latent of one token": lambda r: {"latent": r.latent[:, :2, :2].copy(), "encoded_size": (16, 16)},
}
RIGHT = {"an empty caption of one token", "a caption of 512 tokens", "a latent of one token"}


def changed(record: Record, case: str) -> Record:
    """The record with the case's fields."""
    fields = CASES[case](record)
    conditions = {name: fields.pop(name) for name in record.conditions if name in fields}
    return dataclasses.replace(record.having(**conditions), **fields)


def dataset(folder: Path, split: str, case: str) -> None:
    """A dataset whose record number `BAD` of the split is the case's."""
    manifest = write_dataset(folder, train=24, holdout=8, sizes=LATENT_SIZES, shards=1)
    first = 0 if split == "train" else 1000
    made = [make_record(first + i, LATENT_SIZES[i % len(LATENT_SIZES)]) for i in range(manifest.records(split))]
    base = dataclasses.replace(make_record(first + BAD), latent=make_record(first + BAD, (4, 4)).latent)
    made[BAD] = changed(base, case)
    (shard,) = manifest.shards[split]
    path = folder / shard.file
    write_shard(path, [serialize_unchecked(record) for record in made])
    shard = dataclasses.replace(shard, sha256=sha256_file(path), bytes=path.stat().st_size)
    manifest = dataclasses.replace(
        manifest,
        shards=manifest.shards | {split: (shard,)},
        buckets=(*manifest.buckets, (16, 16)),
        lengths={"text": 512} if "512" in case else manifest.lengths,
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def writer(case: str) -> str:
    """What `encode_record` makes of it."""
    base: Record = make_record(BAD)
    try:
        encode_record(changed(base, case))
    except DatasetError:
        return "refused"
    return GOOD


def reader(root: Path, case: str, split: str, on_corrupt: str) -> str:
    """What a run of two epochs with held-out losses makes of it."""
    folder = root / "data"
    dataset(folder, split, case)
    c = tiny_config(folder, root / "run")
    c.data.on_corrupt, c.log.heldout_every, c.log.heldout_count, c.train.steps = on_corrupt, 3, 8, 6
    name = "-train." if split == "train" else "-holdout."
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            status = train(c)
    except DatasetError as error:
        return "refused" if f"row {BAD}" in str(error) and name in str(error) else f"lost: {error}"
    entries = read_metrics(root / "run" / "metrics.jsonl")
    values = [value for entry in entries for value in entry.values() if not isinstance(value, str)]
    if status or None in values:  # None stands for what is not finite
        return f"lost: status {status}, a value that is not finite: {None in values}"
    if sum(entry.get("skipped", 0) for entry in entries):
        return "lost: a micro-batch was skipped"
    told = "".join(line for line in (root / "run" / "train.log").open() if " W " in line and "damaged" in line)
    if told:
        return "passed over" if f"row {BAD}" in told and name in told else "lost: told of another record"
    return GOOD


def run(quick: bool = False) -> list[Row]:
    """Rows of (case, tried, survived, lost); prints what each case got."""
    rows = []
    places = [(split, policy) for split in ("train", "holdout") for policy in ("stop", "skip")]
    print(f"{'case':32} {'written':8} " + " ".join(f"{split + ', ' + policy:14}" for split, policy in places))
    with tempfile.TemporaryDirectory() as folder:
        damage_scene.fast_compilation(Path(folder) / "cache")
        for case in CASES:
            expected = [GOOD if case in RIGHT else "refused"]
            expected += [GOOD if case in RIGHT else {"stop": "refused", "skip": "passed over"}[p] for _, p in places]
            found = [writer(case)]
            wanted = [("train", "stop")] if quick else places
            for number, (split, policy) in enumerate(wanted):
                root = Path(folder) / f"{len(rows)}-{number}"
                found.append(reader(root, case, split, policy))
            lost = sum(got != want for got, want in zip(found, expected))
            print(f"{case:32} {found[0]:8} " + " ".join(f"{got:14}" for got in found[1:]), flush=True)
            rows.append((f"numerics: {case}", len(found), len(found) - lost, lost))
    return rows


if __name__ == "__main__":
    sys.exit(as_script(__doc__, run))
