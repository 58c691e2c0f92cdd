"""What stands behind the playground's page: the model, its history, and the dataset that vectors are taken from."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fluxdit_jax.dataset.manifest import Manifest, load_manifest
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.loader.reader import RecordSource
from fluxdit_jax.playground.form import NEWEST, Form
from fluxdit_jax.run.checkpoint import EMA, SHORT_EMA, CheckpointError
from fluxdit_jax.run.differences import find_dataset
from fluxdit_jax.run.run_directory import RunError, load_stage
from fluxdit_jax.run.weights import places
from fluxdit_jax.sample import kept_decoder, sample
from fluxdit_jax.sampling import exported, recipe
from fluxdit_jax.sampling.arguments import parse_arguments
from fluxdit_jax.sampling.kept import Kept
from fluxdit_jax.sampling.prompts import SampleError
from fluxdit_jax.sampling.sizes import in_words, pictures_by_size

_NAME = re.compile(r"play-(\d+)\.png")


class Stopped(Exception):
    """Drawing was asked to stop."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A picture of the history, and what `sample` noted while drawing it, a line each."""

    path: Path
    notes: list[str]


class Session:
    """Draws with one run or export, whose parts stay loaded; used by one thread at a time.

    Attributes:
      folder: of the run or the export.
      out: the folder of the history: play-000001.png and so on, each with its recipe.
      scratch: a folder for vectors that are taken from the dataset.
      stop: set to stop drawing after the batch that is being computed.
    """

    def __init__(self, arguments: argparse.Namespace, scratch: Path):
        """Reads descriptions only.

        Args:
          arguments: of `fluxdit_jax.play`.

        Raises:
          RunError, CheckpointError, ExportError, DatasetError: there is no such model, or it has no weights yet.
        """
        self.folder: Path = arguments.workdir or arguments.model
        self.out: Path = arguments.out or self.folder / "play"
        self.scratch, self.stop = scratch, threading.Event()
        self._is_run = arguments.workdir is not None
        self._model = [f"--{'workdir' if self._is_run else 'model'}={self.folder}"]
        for name in ("vae", "text_encoder", "vision_encoder"):
            if value := getattr(arguments, name):
                self._model.append(f"--{name.replace('_', '-')}={value}")
        self._vae, self._data = arguments.vae, arguments.data
        self._kept = Kept()
        if not self.averages():
            raise CheckpointError(f"{self.folder} has no weights yet: train first, or wait for the first checkpoint")
        self.manifest()

    # ----------------------------------------------------------------------------------------------- the model

    def averages(self) -> list[str]:
        """The weights that can be chosen, FOLDER/STEP, the newest first; of a run that trains there come more."""
        if not self._is_run:
            about = exported.read_description(self.folder)[2]
            return [f"{about['folder']}/{about['step']}"]
        found = [(step, folder) for folder in (EMA, SHORT_EMA) for step in places(self.folder, folder)]
        return [f"{folder}/{step}" for step, folder in sorted(found, key=lambda each: (-each[0], each[1]))]

    def manifest(self, weights: str = NEWEST) -> Manifest:
        """Of the dataset that these weights were trained on."""
        if not self._is_run:
            return exported.read_description(self.folder)[1]
        return load_stage(self.folder, self._step(weights))[1]

    def sizes(self, weights: str = NEWEST) -> dict[str, int]:
        """Training pictures of each size, "WIDTHxHEIGHT", the most common first."""
        return {in_words(size): count for size, count in pictures_by_size(self.manifest(weights)).items()}

    def _step(self, weights: str) -> int:
        return int((self.averages()[0] if weights == NEWEST else weights).partition("/")[2])

    # ------------------------------------------------------------------------------------------------- drawing

    def draw(self, form: Form, done: Callable[[int], None]) -> Drawn:
        """Draws one picture or sheet: what `python -m fluxdit_jax.sample` with the same arguments draws.

        Args:
          form: of `Form.pictures`.
          done: called with the number of pictures done since the last call.

        Raises:
          SampleError and whatever else `fluxdit_jax.sample.USER_ERRORS` lists; Stopped.
        """
        chosen = self.averages()[0] if form.weights == NEWEST else form.weights
        folder, _, step = chosen.partition("/")
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"play-{self._number() + 1:06d}.png"
        argv = [*self._model, f"--weights={folder}", f"--step={step}", *form.arguments(), f"--out={path}"]

        def progress(count: int) -> None:
            done(count)
            if self.stop.is_set():
                raise Stopped

        said, refused = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said):
            try:
                with contextlib.redirect_stderr(refused):
                    arguments = parse_arguments(argv)
            except SystemExit as error:
                raise SampleError(refused.getvalue().strip().rpartition("error: ")[2]) from error
            try:
                sample(arguments, self._kept, progress)
            except Stopped:  # those that were drawn before
                for written in self.out.glob(f"{path.stem}*.png"):
                    written.unlink()
                raise
        return Drawn(path, [line for line in said.getvalue().splitlines() if line.startswith("note: ")])

    def _number(self) -> int:
        names = (_NAME.fullmatch(path.name) for path in self.out.iterdir())
        return max((int(name[1]) for name in names if name), default=0)

    # ------------------------------------------------------------------------------------------------- history

    def history(self, most: int = 60) -> list[Path]:
        """The pictures drawn here, the newest first."""
        if not self.out.is_dir():
            return []
        return sorted((path for path in self.out.iterdir() if _NAME.fullmatch(path.name)), reverse=True)[:most]

    def restore(self, path: Path) -> tuple[Form, list[str]]:
        """The form that draws a picture of `sample` again, and notes; raises `SampleError` if it has no recipe."""
        found = recipe.read(path)
        chosen = f"{found.arguments['weights']}/{found.arguments['step']}"
        known = self.averages()
        sizes = list(self.sizes(chosen if chosen in known else NEWEST))
        return Form.of_recipe(found, path, known, sizes)

    # ------------------------------------------------------------------------------------------------- dataset

    def records(self, count: int) -> list[tuple[int, str, np.ndarray]]:
        """Training records drawn at random: (index, key, picture uint8 [H, W, 3] as the VAE decodes its latent).

        Raises:
          DatasetError, RunError: the dataset is not here, or is another one.
        """
        source, manifest = self._source()
        decoder = kept_decoder(self._kept, manifest, self._vae)
        chosen = np.random.default_rng(time.time_ns()).permutation(len(source))[:count].tolist()
        found: list[Record] = [source[index] for index in chosen]
        pictures = [decoder.decode(record.latent[None].astype(np.float32))[0] for record in found]
        return [(index, record.key, picture) for index, record, picture in zip(chosen, found, pictures)]

    def vector(self, index: int) -> Path:
        """A file of the vision vector of a training record."""
        path = self.scratch / f"vector-{index}.npy"
        np.save(path, self._source()[0][index].vision)
        return path

    def _source(self) -> tuple[RecordSource, Manifest]:
        if self._is_run:
            stage, manifest = load_stage(self.folder, self._step(NEWEST))
            return RecordSource(find_dataset(self.folder, stage, self._data), manifest, "train"), manifest
        if self._data is None:
            raise RunError("an export does not know where its dataset is: give it with --data")
        manifest = load_manifest(self._data)
        if manifest.vision.sha256 != self.manifest().vision.sha256:
            raise RunError(f"--data {self._data}: its vectors are of another vision encoder than this model's")
        return RecordSource(self._data, manifest, "train"), manifest
