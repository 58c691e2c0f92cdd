"""The three encoders: what they promise, and how to load one from a name.

A spec is a Hugging Face id (`owner/name`, or `owner/name@revision`), a local directory, or `builtin:...`.
Everything heavy (torch, transformers, diffusers) is imported when a real encoder is loaded and not before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from preprocess import PreprocessError

if TYPE_CHECKING:
    import numpy as np

    from fluxdit_jax.dataset.manifest import EncoderIdentity

DEFAULT_VAE = "black-forest-labs/FLUX.1-schnell"
DEFAULT_TEXT = "google/t5-v1_1-large"
DEFAULT_VISION = "facebook/dinov3-vitl16-pretrain-lvd1689m"
DTYPES = ("auto", "bfloat16", "float32")
MAX_TOKENS = 512


class Vae(Protocol):
    """Images to latents and back.

    Attributes:
      identity: width is the number of latent channels, options["factor"] the pixels per latent side.
      factor: pixels per latent side; image sides must be multiples of it.
    """

    identity: EncoderIdentity
    factor: int

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] to bfloat16 [B, C, H/factor, W/factor], the VAE's shift and scale applied."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Float [B, C, h, w], as `encode` returns them, to uint8 [B, H, W, 3]."""


class TextEncoder(Protocol):
    """Captions to token sequences.

    Attributes:
      identity: width is the token width.
      truncated: captions cut to options["max_tokens"] since construction.
    """

    identity: EncoderIdentity
    truncated: int

    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """One bfloat16 [n, width] per caption: its valid tokens with the end token, so n >= 1."""

    def count(self, captions: list[str]) -> list[int]:
        """Tokens of each caption with the end token, before any is cut."""


class VisionEncoder(Protocol):
    """Images to one vector each. A torch encoder also has `prepare`, see `vision.TorchVision`.

    Attributes:
      identity: width is the vector's length.
    """

    identity: EncoderIdentity

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3], the same whole picture that the VAE sees, to float32 [B, width], unit L2."""


def load_vae(
    spec: str = DEFAULT_VAE, device: str = "auto", dtype: str = "auto", latent: str = "mean", seed: int = 0
) -> Vae:
    """Loads an autoencoder.

    Args:
      spec: id, directory (with or without a `vae` folder inside) or `builtin:dct`.
      device: "auto", "cpu", "cuda", "cuda:1", "mps"; ROCm calls itself cuda.
      dtype: "bfloat16", "float32", or "auto": bfloat16 on an accelerator, float32 on a CPU.
      latent: "mean" of the posterior, or "sample" from it, with noise that is a function of seed and image.
      seed: for "sample".

    Raises:
      PreprocessError: it cannot be found, is not an autoencoder, or an argument is impossible.
    """
    check_arguments(dtype, latent)
    if spec.startswith("builtin:"):
        from preprocess.encoders import builtin

        return _builtin(spec, {"builtin:dct": builtin.DctVae})()
    require_libraries("--vae", spec)
    from preprocess.encoders.vae import TorchVae

    return TorchVae(spec, device, dtype, latent, seed)


def load_text_encoder(
    spec: str = DEFAULT_TEXT, device: str = "auto", dtype: str = "auto", max_tokens: int = MAX_TOKENS
) -> TextEncoder:
    """Loads a T5 encoder, or `builtin:hash`; captions are cut to `max_tokens`. Otherwise as `load_vae`."""
    check_arguments(dtype)
    if max_tokens < 1:
        raise PreprocessError(f"max_tokens must be at least 1, got {max_tokens}")
    if spec.startswith("builtin:"):
        from preprocess.encoders import builtin

        return _builtin(spec, {"builtin:hash": builtin.HashText})(max_tokens)
    require_libraries("--text-encoder", spec)
    from preprocess.encoders.text import T5Text

    return T5Text(spec, device, dtype, max_tokens)


def load_vision_encoder(spec: str = DEFAULT_VISION, device: str = "auto", dtype: str = "auto") -> VisionEncoder:
    """Loads a DINOv3 or DINOv2 ViT, or `builtin:tone`. Otherwise as `load_vae`."""
    check_arguments(dtype)
    if spec == "precomputed" or spec.startswith("precomputed:"):
        raise PreprocessError(
            f"the vision vectors are {spec!r}: they came from files (--vision-embeddings), so give the encoder that "
            "made them by its id or directory (--vision-encoder)"
        )
    if spec.startswith("builtin:"):
        from preprocess.encoders import builtin

        return _builtin(spec, {"builtin:tone": builtin.ToneVision})()
    require_libraries("--vision-encoder", spec)
    from preprocess.encoders.vision import TorchVision

    return TorchVision(spec, device, dtype)


def load_all(*loaders: Callable[[], Any]) -> list[Any]:
    """Loads encoders; those that must be downloaded first are named together.

    Raises:
      PreprocessError: one cannot be loaded.
    """
    from preprocess.encoders.downloads import Unreachable, together

    loaded: list[Any] = []
    missing: list[Unreachable] = []
    for load in loaders:
        try:
            loaded.append(load())
        except Unreachable as error:
            if all(each.wanted != error.wanted for each in missing):  # one encoder may make several fields
                missing.append(error)
    if missing:
        raise together(missing)
    return loaded


def require_libraries(option: str, spec: str) -> None:
    """Raises `PreprocessError` if a real encoder's libraries, the extra [encoders], cannot be imported."""
    from preprocess.encoders.downloads import BUILTIN

    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: torch's own shared libraries
        raise PreprocessError(
            f"{option} {spec}: a real encoder needs the extra [encoders] (torch, transformers, diffusers), which is "
            f"not there or does not work ({error}). Install it: bash scripts/install.sh --encoders, or pip install "
            f"'fluxdit_jax[encoders]'. To try the system without it use the built-in encoders: {BUILTIN}."
        ) from error


def _builtin(spec: str, known: dict[str, type]) -> type:
    if spec not in known:
        raise PreprocessError(f"there is no encoder {spec!r} here; the built-in one is {', '.join(known)}")
    return known[spec]


def check_arguments(dtype: str, latent: str = "mean") -> None:
    """Raises `PreprocessError` if a dtype or kind of latent is impossible."""
    if dtype in ("float16", "fp16", "half"):
        raise PreprocessError(
            "dtype float16 is refused: T5 in float16 returns finite but wrong values (its activations overflow "
            "inside); use bfloat16 or float32"
        )
    if dtype not in DTYPES:
        raise PreprocessError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if latent not in ("mean", "sample"):
        raise PreprocessError(f"latent must be 'mean' or 'sample', got {latent!r}")
