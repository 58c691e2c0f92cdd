"""The run under test: its weights, its records with their true pictures, and the tests of them."""

from __future__ import annotations

import collections
import dataclasses
import functools
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from fluxdit_jax.dataset.grid import GRID_FILE, Grid, read_grid
from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.gate.edit import TextEdit
from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.memorisation import Memorisation
from fluxdit_jax.gate.swap import Swap
from fluxdit_jax.loader.reader import RecordSource, spread
from fluxdit_jax.run.differences import find_dataset
from fluxdit_jax.run.metrics import METRICS, read_metrics
from fluxdit_jax.run.run_directory import load_config, load_stage
from fluxdit_jax.run.weights import Weights, restore_weights
from fluxdit_jax.sampling.prompts import encode_prompts
from fluxdit_jax.settings import Settings, resolve
from fluxdit_jax.vae.decoder import Decoder, decode_all, load_decoder


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A run that the gate judges, and the records that it is judged by.

    Attributes:
      config, manifest, settings: of the run, or of its stage that the weights are of.
      log: entries of its `metrics.jsonl`; empty if there is none.
      weights: that are tested.
      directory: of the dataset. available: how many records it has for training.
      decoder: of the VAE.
      records: under test.
      grid: the places of pictures, by record key; empty for a dataset that is no gate set.
      seed: of the noise and of who is paired with whom.
    """

    config: ConfigDict
    manifest: Manifest
    settings: Settings
    log: list[dict[str, Any]]
    weights: Weights
    directory: Path
    available: int
    decoder: Decoder
    records: tuple[Record, ...]
    grid: Grid
    seed: int

    @classmethod
    def load(
        cls,
        workdir: Path,
        limit: int,
        *,
        data: Path | None = None,
        step: int | None = None,
        vae: str | None = None,
        seed: int = 0,
    ) -> Subject:
        """
        Args:
          workdir: of `fluxdit_jax.train`.
          limit: records at most; see `_under_test`.
          data: directory of the dataset; None: where it was when the run was trained.
          step: of the weights; None: the newest.
          vae: directory of the VAE; None: `config.log.vae`, or where the dataset found it.
          seed: of the noise and of who is paired with whom.
        """
        load_config(workdir)  # raises for a folder that is no run, before its weights are looked for
        path = workdir / METRICS
        log = read_metrics(path) if path.exists() else []  # before minutes of drawing: it may be damaged
        weights = restore_weights(workdir, step)
        stage, manifest = load_stage(workdir, weights.step)
        log = [entry for entry in log if entry["step"] > stage.first]  # losses of other stages do not compare
        config, settings = stage.config, resolve(stage.config, manifest, stage.first)
        directory = find_dataset(workdir, stage, data)
        grid = read_grid(directory / GRID_FILE)
        source = RecordSource(directory, manifest, "train", config.data.get("on_corrupt", "stop"))
        records = tuple(
            record.having(text=record.text[: settings.text_limit])  # as in training
            for _, record in source.iter_valid(_under_test(source, grid, limit))
        )
        decoder = load_decoder(manifest.vae, vae or config.log.vae)
        return cls(config, manifest, settings, log, weights, directory, len(source), decoder, records, grid, seed)

    @functools.cached_property
    def eval_set(self) -> EvalSet:
        """The records with their pictures, which the VAE decodes on the first call."""
        truths = decode_all(self.decoder, [record.latent for record in self.records])
        left_out = self.available - len(self.records) if self.grid else 0
        return EvalSet(self.records, tuple(truths), self.settings.model.patch, self.grid, self.seed, left_out)

    def tests(
        self, pairs: int, edits: int, unrelated: str | None = None, text_encoder: str | None = None
    ) -> tuple[Memorisation, Swap, TextEdit]:
        """The three tests, planned.

        Args:
          pairs, edits: questions at most.
          unrelated: "OLD=>NEW", harmless words to change as a control; None: found in the captions.
          text_encoder: directory or id; None: the dataset's.
        """
        return (
            Memorisation.plan(self.eval_set),
            Swap.plan(self.eval_set, pairs),
            TextEdit.plan(
                self.eval_set,
                edits,
                unrelated,
                lambda captions: encode_prompts(captions, self.manifest, text_encoder, self.settings.text_limit),
            ),
        )


_FEWEST = 3  # photographs with which each light can be swapped often enough


def _under_test(source: RecordSource, grid: Grid, limit: int) -> list[int]:
    """Numbers of at most `limit` records, spread evenly: of a grid whole photographs, if there is room for a few, as
    the questions are between pictures of one and of others."""
    everything = list(range(len(source)))
    if not grid or len(everything) <= limit:
        return spread(len(everything), limit)
    photographs: dict[str, list[int]] = collections.defaultdict(list)
    for number, record in source.iter_valid(everything):
        place = grid.get(record.key)
        photographs[record.key if place is None else place.photograph].append(number)
    of_each = list(photographs.values())
    if (room := limit // max(map(len, of_each))) < _FEWEST:
        return spread(len(everything), limit)
    return sorted(number for chosen in spread(len(of_each), room) for number in of_each[chosen])
