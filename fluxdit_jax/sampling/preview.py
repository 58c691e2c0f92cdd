"""Pictures of a run: the same few records, drawn by the EMA from the same noise at every visit.

Of a record with several captions the first is drawn.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.loader import reader
from fluxdit_jax.loader.reader import RecordSource
from fluxdit_jax.model import dit
from fluxdit_jax.sampling import solvers
from fluxdit_jax.sampling.pipeline import Generator, besides_captions, record_conditions
from fluxdit_jax.settings import Settings
from fluxdit_jax.shared import image_grid
from fluxdit_jax.vae.decoder import Decoder, decode_all, load_decoder
from fluxdit_jax.vae.files import DecoderError

log = logging.getLogger(__name__)


class Preview:
    """A fixed set of records and noises. The truth beside each picture is the record's own decoded latent."""

    def __init__(
        self,
        records: list[Record],
        generator: Generator,
        decoder: Decoder,
        model: dit.ModelConfig,
        text_limit: int | None,
        guidance: float = 1.0,
        caption_alone: bool = False,
    ):
        """
        Args:
          text_limit: text tokens that longer captions are cut to, as in training.
          guidance: text scale of all pictures.
          caption_alone: also draws each caption without the other conditions.
        """
        others = besides_captions(model.conditions)
        of_captions = [c.name for c in model.conditions if c.name not in others]
        self._guidance = solvers.Guidance(dict.fromkeys(of_captions, guidance))
        self._records = records
        self._generator = generator
        self._decoder = decoder
        described = record_conditions(model.conditions, records, model.patch, text_limit)
        self._columns = {"EMA": described}
        if caption_alone:
            absent = np.zeros(len(records), bool)
            self._columns["EMA, caption alone"] = described | {f"keep_{name}": absent for name in others}
        self._noise = generator.noise(list(range(len(records))))
        self._truth = decode_all(decoder, [record.latent for record in records])

    def draw(self, ema: Any) -> Image.Image:
        """A row per record: the data set's picture, the EMA's, and, if asked for, the EMA's of the caption alone."""
        params, columns = self._generator.cast(ema), [self._truth]
        for wanted in self._columns.values():
            latents = self._generator.latents(params, wanted, self._noise, guidance=self._guidance)
            columns.append(decode_all(self._decoder, latents))
        return image_grid.grid(
            list(zip(*columns, strict=True)),
            column_titles=("data set", *self._columns),
            row_titles=[record.caption for record in self._records],
        )


def make_preview(
    path: str | Path,
    manifest: Manifest,
    settings: Settings,
    *,
    count: int,
    steps: int,
    guidance: float,
    vae: str | None,
    on_corrupt: str = "stop",
) -> Preview | None:
    """A preview of records spread over the holdout split, or over the train split where there is none.

    Args:
      count: pictures; 0 for no preview. steps: of the solver. guidance: text scale.
      vae: directory or id of the decoder, or None for the one the data set names. If that one cannot be
        found the run goes on without pictures, with a warning.
      on_corrupt: see `RecordSource`.
    """
    if count == 0:
        return None
    try:
        decoder = load_decoder(manifest.vae, vae)
    except DecoderError as error:
        if vae:
            raise
        log.warning("no pictures while training: %s", error)
        return None
    split = "holdout" if manifest.records("holdout") else "train"
    source = RecordSource(path, manifest, split, on_corrupt)
    batch = min(count, max(1, settings.micro_batch_size // jax.device_count()))  # training's own size fits
    generator = Generator.of(settings, manifest, steps=steps, batch_size=batch)
    records = [record for _, record in source.iter_valid(reader.spread(len(source), count))]
    # Otherwise a picture of the caption alone means nothing.
    trained = settings.flow.dropped(besides_captions(settings.model.conditions)) > 0
    return Preview(records, generator, decoder, settings.model, settings.text_limit, guidance, trained)
