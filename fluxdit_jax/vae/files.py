"""Finding and reading the files of a VAE's decoder, without PyTorch.

A directory in diffusers' format: `config.json` and `diffusion_pytorch_model.safetensors`, or shards of it and
their index. It is a local one, or a Hugging Face repository's through the hub's cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from fluxdit_jax.dataset.manifest import EncoderIdentity, sha256_file
from fluxdit_jax.shared.sanitize import plain_name
from fluxdit_jax.vae.network import ACTIVATIONS, KlDecoder, TinyDecoder
from fluxdit_jax.vae.settings import Flux2Config, KlConfig, TinyConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
SUBFOLDER = "vae"  # of a repository or directory that holds a whole pipeline
CLASSES: dict[str, tuple[type, type]] = {
    "AutoencoderKL": (KlDecoder, KlConfig),
    "AutoencoderKLFlux2": (KlDecoder, Flux2Config),
    "AutoencoderTiny": (TinyDecoder, TinyConfig),
}
NOT_READ = ("encoder.", "quant_conv.", "bn.num_batches_tracked")  # what a decoder does without
# Names of the attention's weights in files written before diffusers 0.17 (Stable Diffusion's own VAE).
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class DecoderError(Exception):
    """The decoder's weights are missing, incomplete, or not what the data set was encoded with."""


def find_directory(identity: EncoderIdentity, path: str | None = None) -> Path:
    """The directory with `config.json` and the weights.

    Args:
      identity: of the data set's VAE; its id is a local directory, or a Hugging Face `owner/name` or
        `owner/name@revision`, which is looked for in the local cache first and downloaded only if it is not there.
      path: local directory to look in instead.

    Raises:
      DecoderError: nothing there; says what to download and where to put it.
    """
    local = Path(path or identity.id).expanduser()
    tried = []
    if path or local.is_dir():
        found = _with_weights(local)
        if found:
            return found
        tried.append(f"{local}: {f'no config.json with {WEIGHTS}' if local.is_dir() else 'no such directory'}")
    else:
        for offline in (True, False):
            try:
                found = _with_weights(_hub_snapshot(identity, offline))
                if found:
                    return found
                why = f"no config.json with {WEIGHTS}"
            except Exception as error:  # noqa: BLE001  OSError, ValueError and the hub's transport's own
                why = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
            tried.append(f"{'cache' if offline else 'download'}: {why}")
    repository = identity.id.partition("@")[0]
    revision = f" --revision {identity.revision}" if identity.revision else ""
    raise DecoderError(
        f"The decoder of the data set's VAE, {identity.id!r}, cannot be found ({'; '.join(tried)}). Copy here the "
        f"directory that the data set was encoded with, or on a machine with access run `hf download {repository}"
        f"{revision} --include '{SUBFOLDER}/*' --local-dir DIR` (without the --include if the repository is the VAE "
        f"alone); it needs config.json and {WEIGHTS}, in DIR or DIR/{SUBFOLDER}. Then give it with "
        "`--config.log.vae=DIR` when training and `--vae DIR` when sampling."
    )


def _with_weights(root: Path) -> Path | None:
    """`root` or its subfolder, whichever holds a VAE."""
    for directory in (root / SUBFOLDER, root):
        has_weights = (directory / WEIGHTS).is_file() or (directory / INDEX).is_file()
        if has_weights and (directory / "config.json").is_file():
            return directory
    return None


def _hub_snapshot(identity: EncoderIdentity, offline: bool) -> Path:
    """Snapshot directory of a Hugging Face repository; raises whatever the hub raises."""
    from huggingface_hub import snapshot_download  # imports neither torch nor jax

    repository, _, revision = identity.spec.partition("@")
    names = ("config.json", WEIGHTS, INDEX, WEIGHTS.replace(".", "-*-of-*.", 1))
    root = snapshot_download(
        repository,
        revision=revision or None,
        allow_patterns=[*names, *(f"{SUBFOLDER}/{name}" for name in names)],
        local_files_only=offline,
    )
    return Path(root)


def read_config(directory: Path) -> tuple[type, KlConfig | TinyConfig]:
    """Reads and checks `config.json`; returns the network's class and its settings.

    Raises:
      DecoderError: unreadable, another class, or a setting that changes the decoder in a way not written here.
    """
    file = directory / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DecoderError(f"{file} cannot be read: {error}") from error

    def demand(key: str, *allowed: Any) -> None:
        if raw.get(key, allowed[0]) not in allowed:
            raise DecoderError(f"{file}: {key} is {raw[key]!r}; this decoder only has {allowed[0]!r}")

    name = raw.get("_class_name") if isinstance(raw, dict) else None
    if not isinstance(name, str) or name not in CLASSES:
        raise DecoderError(f"{file}: _class_name is {name!r}, expected one of {sorted(CLASSES)}")
    network_class, config_class = CLASSES[name]
    values = {}
    for field in dataclasses.fields(config_class):
        if field.init and field.name in raw:
            if not _fits(raw[field.name], str(field.type)):
                raise DecoderError(f"{file}: {field.name} is {raw[field.name]!r}; expected {field.type}")
            value = raw[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    config = config_class(**values)
    demand("out_channels", 3)
    if config.act_fn not in ACTIVATIONS:
        raise DecoderError(f"{file}: act_fn is {config.act_fn!r}, expected one of {sorted(ACTIVATIONS)}")
    if isinstance(config, KlConfig):
        blocks = len(config.block_out_channels)
        demand("up_block_types", ["UpDecoderBlock2D"] * blocks)
        if len(config.decoder_widths) != blocks:
            raise DecoderError(f"{file}: decoder_block_out_channels {config.decoder_widths} are not of {blocks} blocks")
        if isinstance(config, Flux2Config) and len(config.patch_size) != 2:
            raise DecoderError(f"{file}: patch_size is {config.patch_size}; expected two numbers")
    else:
        width = config.decoder_block_out_channels[0]
        demand("decoder_block_out_channels", [width] * len(config.num_decoder_blocks))
        demand("upsample_fn", "nearest")
    return network_class, config


def _fits(value: Any, kind: str) -> bool:
    """Whether a value of a `config.json` is of a field's kind, and of a size that a decoder can have."""
    if kind.endswith(" | None"):
        return value is None or _fits(value, kind.removesuffix(" | None"))
    if kind == "tuple[int, ...]":
        return isinstance(value, list) and bool(value) and all(_fits(one, "int") for one in value)
    if kind == "int":
        return type(value) is int and 1 <= value <= 2**16
    if kind == "float":
        return type(value) in (int, float) and abs(value) < 1e6
    return isinstance(value, {"str": str, "bool": bool}[kind])


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: one, or the shards that its index names, sorted."""
    if not (directory / INDEX).is_file():
        return [directory / WEIGHTS]
    try:
        names = set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DecoderError(f"{directory / INDEX} cannot be read: {type(error).__name__}: {error}") from error
    outside = sorted(map(repr, (name for name in names if not plain_name(name))))
    if outside:
        raise DecoderError(f"{directory / INDEX} names what is no file beside it: {', '.join(outside[:8])}")
    missing = sorted(name for name in names if not (directory / name).is_file())
    if missing:
        raise DecoderError(f"{directory}: {INDEX} names files that are not there: {', '.join(missing)}")
    return sorted(directory / name for name in names)


def read_params(files: list[Path], network: KlDecoder | TinyDecoder) -> nnx.State[Any, Any]:
    """Reads the decoder's weights (stored as f32, f16 or bf16) into the dtype of the abstract `network`.

    Raises:
      DecoderError: a file is damaged, or a weight is missing, unexpected or of the wrong shape; names them.
    """
    state = nnx.state(network)
    wanted = {_stored_name(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    where = files[0].parent
    arrays: dict[str, np.ndarray] = {}
    unexpected: list[str] = []
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for stored in tensors.keys():  # noqa: SIM118  not a dict
                    name = _current_name(stored)
                    if name in wanted:
                        arrays[name] = tensors.get_tensor(stored)
                    elif not stored.startswith(NOT_READ):
                        unexpected.append(stored)
        except (SafetensorError, OSError) as error:
            raise DecoderError(f"{file} cannot be read: {error}; fetch it again") from error
    missing = sorted(set(wanted) - set(arrays))
    for what, names in (("missing", missing), ("unexpected", sorted(unexpected))):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise DecoderError(
                f"{where}: {len(names)} {what} decoder weights: {', '.join(names[:8])}{more}; config.json and the "
                "weights do not belong together, or the file is not diffusers' (a single-file `ae.safetensors` is not)"
            )
    loaded = []
    for name, (path, variable) in wanted.items():
        array = arrays[name]
        # Convolutions: [out, in, kh, kw] to [kh, kw, in, out]. Linear layers: [out, in] to [in, out].
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif array.ndim == 2:
            array = array.T
        if array.shape != variable.shape:
            raise DecoderError(
                f"{where}: {name} is {list(arrays[name].shape)} where config.json implies "
                f"{list(variable.shape)} (transposed: {list(variable.shape[::-1])})"
            )
        loaded.append((path, variable.replace(jnp.asarray(array.astype(variable.dtype)))))
    return nnx.from_flat_state(loaded)


def _stored_name(path: tuple[Any, ...]) -> str:
    """A parameter's path in the module to its name in the file."""
    *module, leaf = map(str, path)
    return ".".join([*module, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def _current_name(stored: str) -> str:
    if ".attentions." in stored:
        for old, new in OLD_NAMES.items():
            stored = stored.replace(old, new)
    return stored


def hash_files(files: list[Path]) -> str:
    """sha256 over names and contents, hex: the rule by which `preprocess` makes an encoder's identity."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()
