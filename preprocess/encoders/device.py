"""What the torch encoders share: the device, the dtype, strict loading, and moving arrays to and fro."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import torch

from preprocess import PreprocessError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def choose_device(device: str) -> torch.device:
    """The torch device of a `--device` value; "auto" takes CUDA or ROCm, then Apple's, then the CPU.

    Raises:
      PreprocessError: the device is unknown or not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise PreprocessError(f"--device {device}: not a device; use auto, cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise PreprocessError(
            f"--device {device}: this PyTorch ({torch.__version__}) sees {torch.cuda.device_count()} such "
            "devices; install the CUDA or ROCm build of PyTorch, or use --device cpu"
        )
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on an accelerator and float32 on a CPU, where bfloat16 is often emulated."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_bf16(tensor: torch.Tensor) -> np.ndarray:
    """Any float tensor to a bfloat16 array in host memory (numpy has no bfloat16 of its own)."""
    return tensor.to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the libraries' progress bars and the warnings about a T5 decoder that is left out on purpose."""
    import diffusers
    import transformers

    names = ("transformers", "diffusers")
    levels = {name: logging.getLogger(name).level for name in names}
    bars = [(lib, lib.utils.logging.is_progress_bar_enabled()) for lib in (transformers, diffusers)]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    for library, _ in bars:
        library.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for library, enabled in bars:
            if enabled:
                library.utils.logging.enable_progress_bar()


def refuse_missing(missing: list[str], option: str, spec: str) -> None:
    """Raises `PreprocessError` if weights were missing: the library would fill them with random numbers."""
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise PreprocessError(
            f"{option} {spec}: {len(missing)} weights of the model are not in its safetensors ({names}, ...): "
            "the files are incomplete or belong to another model"
        )


def in_halves(encode: Callable[[np.ndarray], np.ndarray], images: np.ndarray, option: str) -> np.ndarray:
    """`encode(images)`; when the device runs out of memory, its halves, down to one image.

    Raises:
      PreprocessError: one image alone does not fit.
    """
    try:
        return encode(images)
    except torch.OutOfMemoryError as error:
        if len(images) == 1:
            raise PreprocessError(
                f"{option}: one image of {images.shape[2]}x{images.shape[1]} (width x height) does not fit the "
                "device's memory; use a smaller --resolution, --dtype bfloat16 or --device cpu"
            ) from error
    torch.cuda.empty_cache()
    middle = len(images) // 2
    return np.concatenate([in_halves(encode, images[:middle], option), in_halves(encode, images[middle:], option)])
