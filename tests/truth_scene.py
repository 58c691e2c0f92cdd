"""One small run to hold modules against each other by: its folder, and what it says of itself.

The run has a time shift, pictures that are not square, a holdout split with a copy of one of its pictures in the
input, a preview with guidance, captions of more than 8 tokens, two averages and a seed that is not 0.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from build_fixtures import options
from drawing_helpers import config
from ml_collections import ConfigDict
from PIL import Image
from training_helpers import lively

import fluxdit_jax.train
from fluxdit_jax.dataset.manifest import Manifest, load_manifest
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.loader import reader
from fluxdit_jax.model import dit
from fluxdit_jax.objective import patch_statistics
from fluxdit_jax.run import weights
from fluxdit_jax.run.checkpoint import Checkpoints
from fluxdit_jax.run.metrics import read_metrics
from fluxdit_jax.sample import sample
from fluxdit_jax.sampling.arguments import parse_arguments
from fluxdit_jax.sampling.pipeline import Generator
from fluxdit_jax.settings import Settings, resolve
from preprocess.build.build import build

SEED, SHIFT, STEPS = 5, 3.0, 8
PREVIEW = {"count": 3, "steps": 3, "guidance": 2.5}
SIZES = ((96, 192), (192, 96), (128, 128), (90, 150))  # height, width of the photographs


@dataclasses.dataclass(frozen=True)
class Scene:
    """A folder with photos/, ds/ and run/, what they say of themselves, and the micro-batches of the run."""

    root: Path
    settings: Settings
    manifest: Manifest
    batches: list[dict]

    @property
    def run(self) -> Path:
        return self.root / "run"

    def photo(self, record: Record) -> Path:
        return self.root / "photos" / record.key

    def records(self, split: str) -> list[Record]:
        source = reader.RecordSource(self.root / "ds", self.manifest, split)
        return [source[i] for i in range(len(source))]

    def logged(self) -> dict[str, float]:
        """Everything logged at the last step."""
        return {k: v for entry in read_metrics(self.run / "metrics.jsonl") if entry["step"] == STEPS
                for k, v in entry.items()}  # fmt: skip

    def trained(self, name: str):
        """Part of the state in the last resumable checkpoint."""
        return weights._read_average(self.run / "checkpoints" / str(STEPS), name)

    def draw_all(self, *arguments: str, of: str = "--workdir=run") -> list[np.ndarray]:
        option, _, folder = of.partition("=")
        given = [option, str(self.root / folder), "--out", str(self.root / "x.png"), *arguments]
        return sample(parse_arguments(given))

    def draw(self, *arguments: str, of: str = "--workdir=run") -> np.ndarray:
        return self.draw_all(*arguments, of=of)[0]

    def drawn_as(self, record: Record, seed: int, *more: str, reference: bool = True) -> np.ndarray:
        """The picture of a record by the command: its caption and size, its photograph as the reference."""
        height, width = record.encoded_size
        light = ["--reference", str(self.photo(record))] if reference else []
        return self.draw("--prompt", record.caption, "--size", f"{width}x{height}", "--seed", str(seed), *light, *more)

    def generator(self, **changes) -> Generator:
        values = {
            "tokens": self.settings.tokens, "lengths": self.settings.batch.lengths, "shift": SHIFT, "steps": 2,
            "statistics": patch_statistics(self.manifest.latent_mean, self.manifest.latent_std, 2), "batch_size": 4,
        }  # fmt: skip
        return Generator(self.settings.model, **values | changes)


def write_photos(folder: Path, draw: Callable, count: int = 20) -> None:
    folder.mkdir()
    for number in range(count):
        image = Image.fromarray(draw(*SIZES[number % len(SIZES)], number))
        turned = Image.Exif()
        turned[0x0112] = 6 if number % 5 == 4 else 1  # lies on its side
        image.save(folder / f"p{number:02}.png", exif=turned)
        (folder / f"p{number:02}.txt").write_text(f"photo number {number} of a dog by the sea at dusk")
        if number % 4 == 0:
            shutil.copy(folder / f"p{number:02}.png", folder / f"p{number:02}_copy.png")
            (folder / f"p{number:02}_copy.txt").write_text(f"the same picture as number {number} once more")


def start_from_lively_weights(c: ConfigDict, folder: Path) -> None:
    """So that pictures depend on all that is given: a new network predicts next to nothing."""
    settings = resolve(c, load_manifest(Path(c.data.path)))
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save_ema(1, lively(dit.initialize(settings.model, jax.random.key(0)), scale=0.1))
    c.resume.from_run = str(folder)


def make_run(root: Path, draw: Callable) -> list[dict]:
    """Fills the folder; returns the micro-batches that the run asked for, the text left out."""
    write_photos(root / "photos", draw)
    build(options(root / "photos", root / "ds", resolution=96, holdout=0.25, fit="pad"))
    c = config(root / "ds", root / "run")
    start_from_lively_weights(c, root / "start")
    c.seed, c.flow.shift, c.ema.decay, c.ema.short_decay = SEED, SHIFT, 0.9, 0.3
    c.flow.drop = "all 0.1, text 0.1, vision 0.2"
    c.log.heldout_every = c.log.preview_every = STEPS
    c.log.preview_count, c.log.preview_steps, c.log.preview_guidance = PREVIEW.values()
    c.log.peak_tflops = 2.0
    asked: list[dict] = []
    original = reader.batches

    def batches(*args, **kwargs) -> Iterator[dict]:
        for batch in original(*args, **kwargs):
            asked.append({name: np.array(batch[name]) for name in ("vision", "index")})
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "batches", batches)
        assert fluxdit_jax.train.train(c) == 0
    return asked
