"""DINOv3 and DINOv2 vision transformers of transformers as a `VisionEncoder`.

The library's image processor needs torchvision, so the two things it does (resize, normalise) are done here
with Pillow and torch.
"""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from PIL import Image

from fluxdit_jax.dataset.manifest import EncoderIdentity
from preprocess import PreprocessError
from preprocess.encoders import device as devices
from preprocess.encoders import weights

OPTION = "--vision-encoder"
SIDE = 512  # DINOv3 was post-trained at 512; beyond it the global vector costs more and says the same
_MODELS = ("dinov3_vit", "dinov2", "dinov2_with_registers")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def input_size(height: int, width: int, patch: int, side: int = SIDE) -> tuple[int, int]:
    """(height, width) in pixels at which a picture is shown to the vision transformer.

    The whole picture, never a crop: scaled down (never up) to an area of at most side x side, each side then
    rounded to the nearest multiple of the patch. The rounding bends the aspect ratio by half a patch at most. A size
    that this function gives is its own, though rounding may have made its area a little larger.
    """
    if not (height % patch or width % patch) and height * width <= (side + patch) ** 2:
        return height, width
    scale = min(1.0, side / math.sqrt(height * width))
    return (
        max(patch, round(height * scale / patch) * patch),
        max(patch, round(width * scale / patch) * patch),
    )


class TorchVision:
    """The normed CLS token of a DINO ViT, scaled to unit length, and its patches.

    Attributes:
      also_patches: whether `encode` gets the patches, too; `encode_patches` of the same pictures is then free.

    Args: see `preprocess.encoders.load_vision_encoder`.
    """

    def __init__(self, spec: str, device: str, dtype: str) -> None:
        found = weights.find(spec, OPTION, weights.TRANSFORMERS_WEIGHTS, extra=("preprocessor_config.json",))
        if found.config.get("model_type") not in _MODELS:
            raise PreprocessError(
                f"{OPTION} {spec}: config.json says model_type {found.config.get('model_type')!r}; "
                f"supported are {', '.join(_MODELS)}"
            )
        self._device = devices.choose_device(device)
        self._dtype = devices.choose_dtype(dtype, self._device)
        self._model = self._load(found)
        self._patch = int(self._model.config.patch_size)
        mean, std = _normalisation(found)
        self._mean = torch.tensor(mean, device=self._device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=self._device).view(1, 3, 1, 1)
        self._prefix = 1 + int(getattr(self._model.config, "num_register_tokens", 0))  # tokens before the patches
        self._last: tuple[np.ndarray, np.ndarray] | None = None
        self.also_patches = False
        options = {"class": type(self._model).__name__, "patch": self._patch, "side": SIDE}
        options |= {"resample": "bicubic", "mean": list(mean), "std": list(std)}
        self.identity = EncoderIdentity(
            id=spec,
            revision=found.revision,
            sha256=found.sha256,
            dtype=devices.dtype_name(self._dtype),
            width=int(self._model.config.hidden_size),
            options=options,
        )

    def _load(self, found: weights.Found) -> torch.nn.Module:
        import transformers

        try:
            with devices.quiet_loading():
                model, info = transformers.AutoModel.from_pretrained(
                    found.directory,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    dtype=self._dtype,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise PreprocessError(f"{OPTION} {found.spec}: cannot be loaded: {error}") from error
        devices.refuse_missing(list(info["missing_keys"]), OPTION, found.spec)
        return model.eval().requires_grad_(False).to(self._device)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] to the same picture at `input_size`, uint8.

        Needs no device, so that loading threads can do it ahead of `encode`, which otherwise does.
        """
        height, width = input_size(image.shape[0], image.shape[1], self._patch)
        if (height, width) == image.shape[:2]:
            return image
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3], as the VAE sees them or as `prepare` returns them, to float32 [B, width], unit L2.

        Raises:
          PreprocessError: one image does not fit the device.
        """
        vectors = self._features(images)[:, 0].astype(np.float64)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def encode_patches(self, images: np.ndarray) -> np.ndarray:
        """The same pictures to float32 [B, h, w, width]: the normed token of each patch."""
        self.also_patches = True
        features = self._features(images)[:, 1:]
        height, width = input_size(images.shape[1], images.shape[2], self._patch)
        return features.reshape(len(features), height // self._patch, width // self._patch, -1)

    def _features(self, images: np.ndarray) -> np.ndarray:
        """float32 [B, 1 + patches, width]: the pooled output, then the patches.

        With `also_patches` those of the last pictures are kept, so that the model runs once for both.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise PreprocessError(f"{OPTION}: takes uint8 [B, H, W, 3], got {images.dtype} {images.shape}")
        prepared = np.stack([self.prepare(image) for image in images])
        if not self.also_patches:
            return devices.in_halves(self._run, prepared, OPTION)
        if self._last is None or not np.array_equal(prepared, self._last[0]):
            self._last = prepared, devices.in_halves(self._run, prepared, OPTION)
        return self._last[1]

    @torch.inference_mode()
    def _run(self, images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).float() / 255
        pixels = ((pixels - self._mean) / self._std).to(self._dtype)
        out = self._model(pixel_values=pixels)
        features = out.pooler_output[:, None]
        if self.also_patches:
            features = torch.cat([features, out.last_hidden_state[:, self._prefix :]], dim=1)
        return features.float().cpu().numpy()


def _normalisation(found: weights.Found) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std from `preprocessor_config.json`; ImageNet's, which every DINO uses, if there is none."""
    path = found.directory / "preprocessor_config.json"
    if not path.is_file():
        return _IMAGENET_MEAN, _IMAGENET_STD
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        mean = tuple(float(v) for v in raw.get("image_mean", _IMAGENET_MEAN))
        std = tuple(float(v) for v in raw.get("image_std", _IMAGENET_STD))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PreprocessError(f"{OPTION} {found.spec}: {path} cannot be read: {error}") from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise PreprocessError(f"{OPTION} {found.spec}: {path}: image_mean and image_std must be 3 numbers")
    return mean, std
