"""What the tests of preprocessing share: small folders of photographs, options, and reading a dataset back."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from fluxdit_jax.dataset import records
from fluxdit_jax.dataset.manifest import INDEX, load_manifest
from preprocess.build.build import build
from preprocess.build.encode import Counts
from preprocess.build.options import Options
from preprocess.build.rows import Rows
from preprocess.build.units import read_rows
from preprocess.inspect.verify import verify

SIZES = [(160, 160), (140, 180), (180, 140), (300, 310), (128, 150)]
ENCODERS = {"vae": "builtin:dct", "text_encoder": "builtin:hash", "vision_encoder": "builtin:tone"}
FLAGS = ["--vae", "builtin:dct", "--text-encoder", "builtin:hash", "--vision-encoder", "builtin:tone"]


@contextlib.contextmanager
def killed_before(file: Path) -> Iterator[None]:
    """What runs inside is stopped at the moment when it would put `file` in its place, and must come to it."""
    replace = Path.replace

    def kill(self: Path, target: Path) -> Path:
        if Path(target) == file:
            raise KeyboardInterrupt
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", kill)
        yield


def write_image(path: Path, seed: int, caption: str | None, draw: Callable) -> None:
    """A drawn photograph, with its caption in a .json beside it if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(*SIZES[seed % len(SIZES)], seed)).save(path)
    if caption is not None:
        path.with_suffix(".json").write_text(json.dumps({"caption": caption}))


def write_photos(folder: Path, count: int, draw: Callable) -> Path:
    """`count` photographs of several sizes in two folders."""
    for seed in range(count):
        write_image(folder / f"set{seed % 2}" / f"p{seed:02}.png", seed, f"photo number {seed} of a dog", draw)
    return folder


def options(photos: Path, output: Path, **more: object) -> Options:
    """A small build with the built-in encoders."""
    values = {
        "resolution": 128,
        "modulus": 16,
        "holdout": 0.2,
        "shard_size": 8,
        "batch_size": 3,
        "workers": 2,
    }
    return Options(input=str(photos), output=str(output), **(ENCODERS | values | more))


SMALL = ("--resolution", "128", "--modulus", "16", "--holdout", "0.2", "--shard-size", "3", "--batch-size", "2")


def small(photos: Path, output: Path, **more: object) -> Options:
    """As `options`, in shards of three; `SMALL` with `FLAGS` are the same on the command line."""
    return options(photos, output, **{"shard_size": 3, "batch_size": 2} | more)


def read(directory: Path) -> dict[str, records.Record]:
    """All records by key."""
    manifest = load_manifest(directory)
    found = {}
    for shards in manifest.shards.values():
        for shard in shards:
            for _, data in read_rows(directory / shard.file, list(range(shard.records))):
                record = records.decode_record(data, manifest.layout)
                found[record.key] = record
    return found


def made(counts: Counts) -> tuple[int, int, int]:
    """Latents, captions and vision vectors that a build encoded, and nothing else."""
    assert counts.made.keys() <= {"latent", "text", "vision"}
    return counts.made.get("latent", 0), counts.made.get("text", 0), counts.made.get("vision", 0)


def index(directory: Path) -> list[dict]:
    """The rows of the index."""
    return Rows.load(directory / INDEX).table.to_pylist()


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a dataset that the contract names."""
    names = [p for p in directory.iterdir() if p.name not in ("build.json", "build_log.jsonl", "plan.png", "inspect")]
    return {path.name: path.read_bytes() for path in names}


def assert_as_fresh(photos: Path, directory: Path, tmp_path: Path, **more: object) -> None:
    """The directory equals what a build from nothing makes of the same input, byte for byte."""
    fresh = tmp_path / "fresh" / directory.name
    shutil.rmtree(fresh, ignore_errors=True)
    build(options(photos, fresh, **more))
    assert contents(directory) == contents(fresh)
    assert verify(directory) == []
