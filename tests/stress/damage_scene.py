"""What is damaged: a small dataset made by `preprocess build`, a run trained on it, a report that opens the gate."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from build_fixtures import options
from ml_collections import ConfigDict
from PIL import Image
from training_helpers import tiny_config, write_config

from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.gate.requirement import encoder_summary, family
from fluxdit_jax.run.checkpoint import EMA, ema_digest
from fluxdit_jax.settings import resolve
from fluxdit_jax.train import train
from preprocess.build.build import build

STEPS = 4
PICTURES = 120  # so that a record of the train split may be damaged and passed over


@dataclasses.dataclass(frozen=True)
class Scene:
    """A folder with photos/, data/, run/ and config.py. Copies of it are damaged, never itself."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def run(self) -> Path:
        return self.root / "run"

    def config(self, data: Path | None = None, run: Path | None = None) -> ConfigDict:
        """The run's configuration, on another dataset or in another directory."""
        return _config(data or self.data, run or self.run)

    @contextlib.contextmanager
    def copy(self, what: str) -> Iterator[Path]:
        """A copy of data or run to damage, gone afterwards."""
        target = self.root / "damaged" / what
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.root / what, target)
        try:
            yield target
        finally:
            shutil.rmtree(target, ignore_errors=True)


def make(root: Path) -> Scene:
    """Draws, builds and trains: some ten seconds."""
    _draw(root / "photos", range(PICTURES))
    with quiet():
        build(options(root / "photos", root / "data", resolution=64, shard_size=40))
    scene = Scene(root)
    write_config(root / "config.py", scene.config())
    with quiet():
        assert train(scene.config()) == 0
    folder = scene.run / "validation"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(_report(scene), indent=1) + "\n")
    return scene


def draw_one(folder: Path, number: int) -> None:
    """A noise picture with a caption."""
    rng = np.random.default_rng(number)
    size = [(80, 80), (70, 90), (90, 70)][number % 3]
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
    side = "left" if number % 2 else "right"
    (folder / f"{number:03}.txt").write_text(f"fox number {number} looking {side}")


def _draw(folder: Path, numbers: range) -> None:
    folder.mkdir(parents=True)
    for number in numbers:
        draw_one(folder, number)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("a caption")


def _config(data: Path, run: Path) -> ConfigDict:
    c = tiny_config(data, run)
    c.flow.drop = "all 0.1, text 0.2, vision 0.2"
    c.train.steps = STEPS
    c.checkpoint.minutes, c.checkpoint.ema_every = (
        1e-9,
        2,
    )  # a checkpoint after every step, of which two are kept
    c.log.heldout_every, c.log.heldout_count = 4, 3
    return c


def _report(scene: Scene) -> dict:
    """What the gate reads of a validation report, passed."""
    manifest = load_manifest(scene.data)
    network = resolve(scene.config(), manifest).model
    return {
        "passed": True,
        "weights": {"ema_step": STEPS, "folder": EMA, "digest": ema_digest(scene.run, STEPS)},
        "model": {"family": family(network)},
        "encoders": {name: encoder_summary(encoder) for name, encoder in manifest.encoders.items()},
        "dataset": {"format_version": manifest.version},
        "metrics": {},
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what programs say to people."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def fast_compilation(cache: Path) -> None:
    """Half the compiler's time, and its results kept: nothing here depends on speed."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
