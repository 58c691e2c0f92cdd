"""What an export says of itself in `config.json`, and reading an export back to draw from it.

`config.json` holds or names all that sampling needs: the network, the time shift, the latent statistics, the sizes, how
a reference is fitted, and the encoders and the VAE with the digests of their weights. Those are not copied.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fluxdit_jax import config as configuration
from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.fields import LATENT
from fluxdit_jax.dataset.manifest import DatasetError, EncoderIdentity, Manifest, Shard
from fluxdit_jax.model import dit
from fluxdit_jax.renamed_keys import converted
from fluxdit_jax.run.checkpoint import EMA, SHORT_EMA
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.run.soundness import weights_fault
from fluxdit_jax.run.weights import Weights
from fluxdit_jax.sampling.sizes import pictures_by_size
from fluxdit_jax.settings import Settings, resolve
from fluxdit_jax.state import shape_difference

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"
_UNUSABLE = (OSError, ValueError, TypeError, AttributeError, RecursionError, ConfigError, DatasetError)


class ExportError(Exception):
    """An export cannot be written or read; the message names the file."""


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Nested dicts of arrays as {"blocks.mlp.down.kernel": array}, f32."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(key.key for key in path): np.ascontiguousarray(leaf, np.float32) for path, leaf in leaves}


def describe(config: ConfigDict, settings: Settings, manifest: Manifest, weights: Weights) -> dict[str, Any]:
    """What `config.json` says. The model's dtype and attention are the run's own keys: "auto" stays "auto"."""
    flow = {"shift": settings.flow.shift, "prediction": "velocity", "time": "1 is noise, 0 is the image"}
    sizes = pictures_by_size(manifest).items()
    return {
        "model": dict(config.model) | {"channels": settings.model.channels},
        "flow": flow | {"drop": config.flow.drop},
        "tokens": settings.tokens,
        "text_tokens": settings.text_tokens,
        "longest": {name: manifest.lengths[name] for name in manifest.conditions if name in manifest.lengths},
        "latent_mean": manifest.latent_mean,
        "latent_std": manifest.latent_std,
        "resolution": manifest.resolution,
        "modulus": manifest.modulus,
        "fit": manifest.fit,
        "vision_resolution": manifest.vision_resolution,
        "sizes": [{"width": w, "height": h, "pictures": count} for (h, w), count in sizes],
        "encoders": {
            name: dataclasses.asdict(manifest.encoders[name]) for name in (LATENT.encoder, *manifest.conditions)
        },
        "ema_step": weights.step,
        "weights": {"average": weights.folder, "digest": weights.digest, "from": weights.path.parent.name},
    }


def read_description(folder: Path) -> tuple[Settings, Manifest, dict[str, Any]]:
    """(settings, manifest of the training set, step, average and digest of the weights) of an export.

    Of the manifest there is what sampling needs: its pictures are counted by size, and are in no shard.

    Raises:
      ExportError: there is no export, or it says what cannot be.
    """
    path = folder / DESCRIPTION
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        manifest = _manifest(raw, str(path))
        settings = resolve(_config(raw, folder), manifest)
        about = {
            "step": raw["ema_step"],
            "folder": raw["weights"]["average"],
            "digest": raw["weights"]["digest"],
        }
        if type(about["step"]) is not int or about["folder"] not in (EMA, SHORT_EMA):
            raise ValueError(f"it says of its weights {about}")
        if settings.tokens != raw["tokens"]:
            raise ValueError(f"tokens is {raw['tokens']!r}, its largest size has {settings.tokens}")
        return settings, manifest, about
    except (FileNotFoundError, NotADirectoryError) as error:
        if (folder / "model_index.json").exists():
            raise ExportError(
                f"{folder} is an export for diffusers: draw from it by DiffusionPipeline, or export without --format"
            ) from error
        raise ExportError(f"{path} does not exist: {folder} is no directory of fluxdit_jax.export") from error
    except KeyError as error:
        is_run = (folder / "dataset.json").exists()
        what = "a run directory: give it with --workdir" if is_run else "no export, or an older version's: export again"
        raise ExportError(f"{path} lacks {error}: it is {what}") from error
    except _UNUSABLE as error:
        raise ExportError(f"{path} cannot be used: {str(error)[:400]}") from error


def _manifest(raw: dict[str, Any], source: str) -> Manifest:
    sizes = {(size["height"], size["width"]): size["pictures"] for size in raw["sizes"]}
    held = {f"{height}x{width}": count for (height, width), count in sizes.items() if count}
    whole = Manifest(
        name="export",
        **{name: raw[name] for name in ("resolution", "modulus", "fit", "latent_mean", "latent_std")},
        vision_resolution=raw.get("vision_resolution", 0),
        encoders={name: EncoderIdentity(**identity) for name, identity in raw["encoders"].items()},
        buckets=tuple(sizes),
        latent_count=1,
        lengths=raw.get("longest") or {"text": raw["longest_caption"]},  # as an earlier version wrote it
        shards={"train": (Shard("export", "", 0, sum(held.values()), held),)},
    )
    return Manifest.from_json(whole.to_json(), source)  # checks it


def _config(raw: dict[str, Any], folder: Path) -> ConfigDict:
    config = configuration.default_config()
    config.workdir = config.data.path = str(folder)
    config.data.text_tokens = raw["text_tokens"]
    for name in config.model:
        config.model[name] = raw["model"].get(name, "index") if name == "positions" else raw["model"][name]
    flow = converted({"flow": dict(raw["flow"])})["flow"]
    config.flow.shift, config.flow.drop = flow["shift"], flow["drop"]
    configuration.check(config)
    return config


def read_weights(folder: Path, settings: Settings, about: dict[str, Any]) -> Weights:
    """The weights of an export, held against the digest of its `config.json`.

    Args:
      about: of `read_description`.

    Raises:
      ExportError: they are missing, damaged, of another network, or not those that `config.json` describes.
    """
    path = folder / WEIGHTS
    try:
        ema = traverse_util.unflatten_dict(load_file(path), sep=".")
        difference = shape_difference(ema, dit.build(settings.model)[1])
        if difference:
            raise ValueError(f"it does not fit {DESCRIPTION}: {difference}")
        if any(leaf.dtype != np.float32 for leaf in jax.tree.leaves(ema)):
            raise ValueError("its numbers are not float32")
        digest = tree_digest(ema)
        if digest != about["digest"]:
            raise ValueError(f"its numbers are not those that {DESCRIPTION} describes; copy the export again, whole")
        fault = weights_fault(ema)
        if fault:
            raise ValueError(f"its weights are broken: {fault}")
    except (SafetensorError, OSError, ValueError, TypeError, IndexError) as error:
        raise ExportError(f"{path} cannot be used: {error}") from error
    return Weights(ema, about["step"], about["folder"], folder, digest, ", of an export")
