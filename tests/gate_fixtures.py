"""Fixtures of the gate's tests. A test module asks for them with `pytest_plugins = ("gate_fixtures",)`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from gate_pictures import set_of
from ml_collections import ConfigDict
from PIL import Image

from fluxdit_jax import validate
from fluxdit_jax.config import default_config
from fluxdit_jax.dataset.grid import GRID_FILE, Place, write_grid
from fluxdit_jax.dataset.manifest import MANIFEST, Manifest, Shard, sha256_file, shard_name
from fluxdit_jax.dataset.records import WRITER_OPTIONS, encode_record
from fluxdit_jax.gate.eval_set import EvalSet
from preprocess.demo import COMPOSITIONS, LIGHTS, compose
from preprocess.encoders.builtin import DctVae, HashText, ToneVision


@pytest.fixture(scope="session")
def demo_set() -> EvalSet:
    """The demonstration set as the quickstart's codec keeps it: 100 pictures at their places."""
    vae, images, places = DctVae(), [], []
    for composition in COMPOSITIONS:
        drawing = compose(composition)
        for light in LIGHTS:
            picture = Image.fromarray(drawing.shade(light))
            size = tuple(side // 4 for side in picture.size)
            small = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
            images.append(vae.decode(vae.encode(small[None]))[0])
            places.append(Place(composition.character.name, composition.looking, light.name))
    return set_of(images, [composition.caption for composition in COMPOSITIONS for _ in LIGHTS], places)


def write_dataset(of: EvalSet, directory: Path) -> Manifest:
    """The records and the grid of a set as a dataset directory that training and the gate read."""
    directory.mkdir(parents=True)
    file = directory / shard_name("scenes", "train", 0, 1)
    writer = ArrayRecordWriter(str(file), WRITER_OPTIONS)
    for record in of.records:
        writer.write(encode_record(record))
    writer.close()
    values = np.concatenate([r.latent.astype(np.float64).reshape(16, -1) for r in of.records], axis=1)
    sizes = sorted({record.encoded_size for record in of.records})
    buckets = {f"{h}x{w}": sum(r.encoded_size == (h, w) for r in of.records) for h, w in sizes}
    manifest = Manifest(
        name="scenes",
        resolution=max(max(size) for size in sizes),
        modulus=16,
        fit="resize",
        encoders={"vae": DctVae().identity, "text": HashText().identity, "vision": ToneVision().identity},
        buckets=tuple(sizes),
        latent_mean=tuple(values.mean(1)),
        latent_std=tuple(values.std(1)),
        latent_count=values.shape[1],
        lengths={"text": max(len(record.text) for record in of.records)},
        shards={"train": (Shard(file.name, sha256_file(file), file.stat().st_size, len(of.records), buckets),)},
    )
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    write_grid(directory / GRID_FILE, of.grid)
    return manifest


def scene_config(dataset: Path, workdir: Path) -> ConfigDict:
    """A run that learns the scenes of `gate_scenes` well enough for the gate, in about a minute on two cores."""
    c = default_config()
    c.workdir, c.data.path = str(workdir), str(dataset)
    c.model.width, c.model.depth, c.model.heads = 128, 3, 4
    c.data.micro_batch_size = c.optim.global_batch_size = 20
    c.optim.name, c.optim.lr, c.optim.adam_lr = "muon", 8e-3, 3e-3
    c.optim.schedule, c.optim.warmup_steps, c.optim.final_fraction = "cosine", 50, 0.02
    c.flow.uniform_share, c.flow.shift = 1.0, 2.0
    c.flow.drop = "all 0.05, text 0.05, vision 0.1"
    c.train.steps = 500
    c.log.every, c.log.preview_every = 20, 0
    return c


def gate(workdir: Path, *options: str) -> tuple[int, dict]:
    """(exit status, report) of the command."""
    path = workdir / "validation" / "report.json"
    path.unlink(missing_ok=True)
    status = validate.command(["--workdir", str(workdir), *options])
    return status, json.loads(path.read_text()) if path.exists() else {}


def failed(report: dict) -> set[str]:
    return {name for name, metric in report["metrics"].items() if not metric["passed"]}
