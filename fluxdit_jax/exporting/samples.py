"""Pictures for a model's card: drawn for captions of its dataset, of the holdout split where there is one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fluxdit_jax.dataset.manifest import Manifest
from fluxdit_jax.loader import reader
from fluxdit_jax.run.weights import Weights
from fluxdit_jax.sampling import solvers
from fluxdit_jax.sampling.pipeline import Generator, besides_captions, record_conditions
from fluxdit_jax.settings import Settings
from fluxdit_jax.vae.decoder import decode_all, load_decoder

FOLDER = "samples"
STEPS, GUIDANCE, BATCH = 32, 4.0, 8


def draw(
    folder: Path,
    settings: Settings,
    manifest: Manifest,
    weights: Weights,
    dataset: Path,
    count: int,
    vae: str | None = None,
) -> list[tuple[str, str]]:
    """Writes `count` pictures to folder/samples; returns (file, caption) of each.

    Args:
      vae: directory of the dataset's; None: where the dataset found it.

    Of the caption alone where the model was trained so, else with the record's other conditions; seed 0, 1, and so on.

    Raises:
      DatasetError: the dataset is not there. DecoderError: its VAE is not.
    """
    decoder = load_decoder(manifest.vae, vae)
    split = "holdout" if manifest.records("holdout") else "train"
    source = reader.RecordSource(dataset, manifest, split)
    records = [record for _, record in source.iter_valid(reader.spread(len(source), count))]
    if len(records) < count:
        print(f"note: {len(records)} samples, of {count}: these are all records of the {split} split")
    kinds, model = settings.model.conditions, settings.model
    others = besides_captions(kinds)
    wanted = record_conditions(kinds, records, model.patch, settings.text_limit)
    if settings.flow.dropped(others):
        wanted |= {f"keep_{name}": np.zeros(len(records), bool) for name in others}
    scale = GUIDANCE if settings.flow.dropped([kind.name for kind in kinds]) else 1.0  # else it has nothing to lean on
    guidance = solvers.Guidance({kind.name: scale for kind in kinds if kind.name not in others})
    generator = Generator.of(settings, manifest, steps=STEPS, batch_size=min(BATCH, len(records)))
    noise = generator.noise(list(range(len(records))))
    with tqdm(total=len(records), unit="image", desc="samples", disable=not sys.stderr.isatty()) as bar:
        latents = generator.latents(generator.cast(weights.ema), wanted, noise, bar.update, guidance)
    (folder / FOLDER).mkdir()
    made = []
    for number, (record, pixels) in enumerate(zip(records, decode_all(decoder, latents), strict=True)):
        file = f"{FOLDER}/{number:03d}.png"
        Image.fromarray(pixels).save(folder / file)
        made.append((file, record.caption))
    return made
