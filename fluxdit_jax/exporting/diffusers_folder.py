"""An export that diffusers draws from, in a process without JAX or this project: `FluxDiTPipeline`'s folder.

Its code is that of `fluxdit_jax.portable`, copied. Encoders are named or, with `bundle`, lie beside it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from fluxdit_jax import portable
from fluxdit_jax.dataset.manifest import EncoderIdentity, Manifest
from fluxdit_jax.exporting.torch_names import torch_arguments, torch_weights
from fluxdit_jax.run.weights import Weights
from fluxdit_jax.sampling.exported import ExportError, flatten
from fluxdit_jax.sampling.sizes import pictures_by_size
from fluxdit_jax.settings import Settings
from fluxdit_jax.shared.json_files import write_json

INDEX = "model_index.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
BUNDLES = {"none": (), "vae": ("vae",), "all": ("vae", "text", "vision")}
VERSION = "0.40.0"  # of diffusers, the oldest that is tried
REQUIREMENTS = f"torch\ndiffusers>={VERSION}\ntransformers\nsentencepiece\nprotobuf\ngradio\n"  # of a Space
_SOURCES = Path(portable.__file__).parent
_T5 = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
_COMPONENTS = {"vae": "vae", "text": "text_encoder", "vision": "vision_encoder"}  # by encoder
USAGE = """    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)
    pipe("...", seed=0, guidance_text=4).images[0].save("picture.png")

On a GPU add `.to("cuda")` and `pipe.transformer.to(torch.bfloat16)`. `trust_remote_code` lets diffusers run
`pipeline.py` and the two other Python files of this directory: read them first. `reference=` takes a picture whose
light and mood to draw, see `help(pipe.__call__)`. Encoders that are not in here are looked for under the names above
when they are first needed. `app.py` is a page for a Space."""


def write(
    folder: Path,
    settings: Settings,
    manifest: Manifest,
    weights: Weights,
    *,
    dtype: str = "float32",
    bundle: str = "none",
) -> None:
    """Writes everything but the card.

    Args:
      folder: an empty one.
      weights: without what serves training alone.
      dtype: of the stored weights, one of `DTYPES`. bundle: which encoders are copied, one of `BUNDLES`.

    Raises:
      ExportError: the dataset's conditions or encoders cannot be exported.
    """
    index: dict[str, Any] = {
        "_class_name": ["pipeline", "FluxDiTPipeline"],
        "_diffusers_version": VERSION,
        "transformer": ["modeling_fluxdit", "FluxDiT"],
        "scheduler": ["scheduling_fluxdit", "RectifiedFlowSolver"],
        "facts": facts(settings, manifest, weights),
    }
    for name in _COMPONENTS:
        index |= _encoder(folder, name, manifest.encoders[name], bundle)
    transformer, scheduler = folder / "transformer", folder / "scheduler"
    for part in (transformer, scheduler):
        part.mkdir()
    shutil.copyfile(_SOURCES / "modeling_fluxdit.py", transformer / "modeling_fluxdit.py")
    shutil.copyfile(_SOURCES / "scheduling_fluxdit.py", scheduler / "scheduling_fluxdit.py")
    shutil.copyfile(_SOURCES / "app.py", folder / "app.py")
    (folder / "requirements.txt").write_text(REQUIREMENTS)
    (folder / "pipeline.py").write_text(in_one_file("pipeline"), encoding="utf-8")
    named = torch_weights(flatten(weights.ema), settings.model.conditions)
    tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in named.items()}
    save_file(tensors, transformer / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    network = {"_class_name": "FluxDiT", "auto_map": {"AutoModel": "modeling_fluxdit.FluxDiT"}}
    solver = {"_class_name": "RectifiedFlowSolver", "shift": settings.flow.shift}
    version = {"_diffusers_version": VERSION}
    write_json(network | version | torch_arguments(settings.model), transformer / "config.json")
    write_json(solver | version, scheduler / "scheduler_config.json")
    write_json(index, folder / INDEX)


def facts(settings: Settings, manifest: Manifest, weights: Weights) -> dict[str, Any]:
    """`FluxDiTPipeline`'s `facts`."""
    sizes = pictures_by_size(manifest).items()
    encoders = {name: dataclasses.asdict(manifest.encoders[name]) for name in _COMPONENTS}
    return {
        "encoders": {name: about | {"id": public(about["id"])} for name, about in encoders.items()},
        "latent_mean": list(manifest.latent_mean),
        "latent_std": list(manifest.latent_std),
        "sizes": [[width, height, count] for (height, width), count in sizes],
        "fit": manifest.fit,
        "resolution": manifest.resolution,
        "vision_resolution": manifest.vision_resolution,
        "text_tokens": settings.text_limit,
        "weights": {"step": weights.step, "average": weights.folder, "digest": weights.digest},
    }


def public(identity: str) -> str:
    """The id of an encoder for strangers: of a folder of this machine its name alone."""
    return Path(identity).name if Path(identity).is_absolute() or Path(identity).is_dir() else identity


def in_one_file(name: str) -> str:
    """A module of `fluxdit_jax.portable` with those that it imports from there put in their place.

    diffusers fetches one file for a pipeline.
    """
    seen: set[str] = set()

    def text_of(module: str) -> str:
        return (_SOURCES / f"{module}.py").read_text(encoding="utf-8")

    def included(found: re.Match[str]) -> str:
        module = found[1]
        if module in seen:
            return ""
        seen.add(module)
        return text_of(module).replace("from __future__ import annotations\n", "")

    return re.sub(r"^from \.(\w+) import .+$", included, text_of(name), flags=re.MULTILINE)


def _encoder(folder: Path, name: str, identity: EncoderIdentity, bundle: str) -> dict[str, Any]:
    """What the index says of an encoder, whose files are copied if they are to be."""
    component = _COMPONENTS[name]
    index: dict[str, Any] = {component: [None, None]} | ({"tokenizer": [None, None]} if name == "text" else {})
    if identity.id.startswith(("builtin:", "precomputed")):
        return index
    if name not in BUNDLES[bundle]:
        if public(identity.id) != identity.id:
            print(f"note: the {name} encoder is the folder {identity.id}: who draws needs it; --bundle all copies it")
        return index
    from preprocess import PreprocessError
    from preprocess.encoders import weights as files
    from preprocess.encoders.text import TOKENIZER_FILES

    stem = files.DIFFUSERS_WEIGHTS if name == "vae" else files.TRANSFORMERS_WEIGHTS
    extra = {"text": TOKENIZER_FILES, "vision": ("preprocessor_config.json",)}.get(name, ())
    try:
        found = files.find(
            identity.spec, f"--bundle {bundle}", stem, subfolder="vae" if name == "vae" else "", extra=extra
        )
    except PreprocessError as error:
        raise ExportError(f"the {name} encoder of the training set cannot be bundled: {error}") from error
    if found.sha256 != identity.sha256:
        raise ExportError(
            f"--bundle {bundle}: {identity.spec} has other weights (sha256 {found.sha256[:12]}) than the {name} "
            f"encoder of the training set ({identity.sha256[:12]}): pictures would come out wrong"
        )
    _copy(found.directory, folder / component, ("config.json", f"{stem}*.safetensors", f"{stem}*.index.json"))
    config: Mapping[str, Any] = found.config
    if name == "vae":
        return index | {component: ["diffusers", config["_class_name"]]}
    if name == "vision":
        return index | {component: ["transformers", config["architectures"][0]]}
    _copy(found.directory, folder / "tokenizer", TOKENIZER_FILES)
    about = found.directory / "tokenizer_config.json"
    tokenizer = json.loads(about.read_text()).get("tokenizer_class") if about.exists() else None
    return index | {
        component: ["transformers", _T5[config["model_type"]]],
        "tokenizer": ["transformers", tokenizer or "T5TokenizerFast"],
    }


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    target.mkdir()
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        shutil.copyfile(path, target / path.name)
