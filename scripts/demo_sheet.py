"""Draws the README's picture from a quickstart run: what the model remembers, relights and turns.

python scripts/demo_sheet.py RUN OUT.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from absl import logging as absl_logging

from fluxdit_jax.loader import reader
from fluxdit_jax.run.averages import restore_ema
from fluxdit_jax.run.run_directory import load_stage
from fluxdit_jax.sampling.pipeline import Generator, conditions
from fluxdit_jax.sampling.prompts import encode_prompts
from fluxdit_jax.settings import resolve
from fluxdit_jax.shared import image_grid
from fluxdit_jax.shared.paths import given_path
from fluxdit_jax.vae.decoder import decode_all, load_decoder

SHOWN = ("c00", "c04", "c07", "c09", "c12", "c15")  # compositions of the demonstration set
ROWS = (
    "in the data set",
    "drawn from its caption and its vision vector",
    "the same caption, the vector of another picture: other light, same scene",
    "the same vector, the caption edited to look the other way",
)


def turn(caption: str) -> str:
    """The caption with the subject looking the other way."""
    if "looking left" in caption:
        return caption.replace("looking left", "looking right")
    return caption.replace("looking right", "looking left").replace("facing front", "looking left")


def draw(workdir: Path, shown: tuple[str, ...] = SHOWN, step: int | None = None) -> list[list[np.ndarray]]:
    """A row of uint8 [H, W, 3] pictures for each of `ROWS`, a column for each composition.

    Args:
      workdir: a run on the demonstration set. shown: compositions. step: of the EMA weights; None: the newest.
    """
    step, ema = restore_ema(workdir, step)
    stage, manifest = load_stage(workdir, step)
    config, settings = stage.config, resolve(stage.config, manifest, stage.first)
    by_key = {}
    for split in ("train", "holdout"):
        source = reader.RecordSource(config.data.path, manifest, split) if manifest.records(split) else ()
        by_key.update((record.key, record) for record in (source[i] for i in range(len(source))))
    # The k-th composition in the k-th light; its partner is another composition in another light.
    own = [by_key[f"{name}_l{k % 5}.png"] for k, name in enumerate(shown)]
    partners = [(k + 2) % len(shown) for k in range(len(shown))]
    other = [by_key[f"{shown[k]}_l{k % 5}.png"] for k in partners]
    patch = settings.model.patch
    grids = [(record.latent.shape[1] // patch, record.latent.shape[2] // patch) for record in own]
    turned = encode_prompts([turn(record.caption) for record in own], manifest, None)
    plain = [record.conditions for record in own]
    relit = [mine | {"vision": record.vision} for mine, record in zip(plain, other, strict=True)]
    edited = [mine | made for mine, made in zip(plain, turned, strict=True)]
    wanted = conditions(settings.model.conditions, [*plain, *relit, *edited], grids * 3)
    generator = Generator.of(settings, manifest, steps=16, batch_size=len(own))
    latents = generator.latents(generator.cast(ema), wanted, generator.noise(list(range(3 * len(own)))))
    images = decode_all(load_decoder(manifest.vae), [record.latent for record in own] + latents)
    return [images[start : start + len(own)] for start in range(0, len(images), len(own))]


def main(workdir: Path, out: Path) -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    out.parent.mkdir(parents=True, exist_ok=True)
    image_grid.grid(draw(workdir), row_titles=ROWS, cell=160).save(out, optimize=True)
    print(out)


if __name__ == "__main__":
    main(given_path(sys.argv[1]), given_path(sys.argv[2]))
