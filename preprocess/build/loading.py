"""Loading the encoders of a build."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxdit_jax.dataset.fields import CAPTION, CELLS, DECLARED, GRID, Field
from fluxdit_jax.shared.host_memory import keep_freed_memory
from preprocess import PreprocessError
from preprocess.build.encode import Encoders
from preprocess.build.options import Options, option_of
from preprocess.encoders import load_all, load_text_encoder, load_vae, load_vision_encoder, require_libraries
from preprocess.encoders.patches import Cells
from preprocess.input.precomputed import Folder

if TYPE_CHECKING:
    import torch


def real_encoders(options: Options) -> list[tuple[str, str]]:
    """(option, spec) of the encoders that need PyTorch."""
    return [
        (f"--{option_of(name).replace('_', '-')}", spec)
        for name, spec in options.specs().items()
        if not spec.startswith("builtin:")
    ]


def torch_device(options: Options) -> torch.device:
    """The device of the encoders that need PyTorch; raises `PreprocessError` if it is not installed."""
    require_libraries(*real_encoders(options)[0])
    from preprocess.encoders.device import choose_device

    return choose_device(options.device)


def are_here(options: Options) -> bool:
    """Whether all encoders can be loaded without a download, or one cannot be loaded at all."""
    from preprocess.encoders.weights import looks_like_path

    return all(Path(spec).is_dir() or looks_like_path(spec) for _, spec in real_encoders(options))


def load_encoders(options: Options, precomputed: list[Folder]) -> Encoders:
    """All that a build needs, on the device of the options; raises `PreprocessError` if one cannot be loaded."""
    # What an encoder on a CPU allocates for each picture would else be faulted in anew: 1.4 to 1.8 times the images/s.
    keep_freed_memory(large_too=not real_encoders(options) or torch_device(options).type == "cpu")
    specs = options.specs()
    fields = [field for field in DECLARED.values() if field.encoder in specs]
    vision = functools.cache(lambda: load_vision_encoder(options.vision_encoder, options.device, options.dtype))
    loaded = load_all(*(functools.partial(_encoder, field, specs[field.encoder], options, vision) for field in fields))
    by_name = {folder.field.name: folder for folder in precomputed}
    encoders = Encoders({field.name: made for field, made in zip(fields, loaded, strict=True)}, by_name)
    if options.modulus % encoders.vae.factor:
        raise PreprocessError(
            f"--modulus {options.modulus} is not a multiple of the VAE's factor {encoders.vae.factor}"
        )
    return encoders


def _encoder(field: Field, spec: str, options: Options, vision: Callable[[], Any]) -> Any:
    """Loads what makes a field; `vision` gives the vision encoder, which is loaded once."""
    if field.kind == GRID:
        return load_vae(spec, options.device, options.dtype, options.latent, options.seed)
    if field.made_from == CAPTION:
        return load_text_encoder(spec, options.device, options.dtype, options.max_tokens)
    if field.kind == CELLS:
        return Cells(vision(), options.vision_resolution or options.resolution, options.vision_patches)
    return vision()


def device_name(options: Options) -> str:
    """Of the device that a build's encoders run on."""
    if not real_encoders(options):
        return f"cpu: {platform.machine()}"
    import torch

    device = torch_device(options)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type}: {name}"
