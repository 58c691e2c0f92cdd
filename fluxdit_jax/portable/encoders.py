"""Prompts, reference pictures and latents through encoders of transformers and diffusers, as `preprocess` does it."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

Size = tuple[int, int]  # (width, height) in pixels
# Of each encoder's files: the stem of its weights, and what else decides its output.
STEMS = {"vae": "diffusion_pytorch_model", "text": "model", "vision": "model"}
BESIDE = {
    "vae": (),
    "text": ("tokenizer*.json", "spiece.model", "special_tokens_map.json", "added_tokens.json"),
    "vision": ("preprocessor_config.json",),
}


def patterns(name: str) -> list[str]:
    """The files of an encoder in a repository of the Hub, where a VAE may lie in a folder of its own."""
    stem = STEMS[name]
    files = ["config.json", f"{stem}.safetensors", f"{stem}-*-of-*.safetensors", f"{stem}.safetensors.index.json"]
    files += BESIDE[name]
    return files + [f"vae/{file}" for file in files] if name == "vae" else files


def digest(folder: Path, name: str) -> str:
    """What a dataset knows an encoder's files by: sha256 over names and contents, hex."""
    stem, found = STEMS[name], hashlib.sha256()
    weights = sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")])
    others = sorted({path for pattern in BESIDE[name] for path in folder.glob(pattern)})
    for path in [*weights, *others]:
        with path.open("rb") as file:
            found.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


@torch.no_grad()
def encode_texts(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int, device: torch.device
) -> list[torch.Tensor]:
    """bfloat16 [n, width] of each prompt: its own tokens and the end token; of too many the first."""
    found = []
    for ids in tokenizer(list(prompts), verbose=False).input_ids:
        kept = ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], tokenizer.eos_token_id]
        hidden = model(torch.tensor([kept], device=device)).last_hidden_state
        found.append(hidden[0].to("cpu", torch.bfloat16))
    return found


@torch.no_grad()
def encode_picture(model: Any, picture: np.ndarray, options: dict[str, Any], device: torch.device) -> np.ndarray:
    """f32 [V], of unit length: the pooled output of a DINO for a picture uint8 [H, W, 3].

    Args:
      options: of the encoder of the training set: patch, side (pixels of the square with the largest area that it is
        shown), mean and std.
    """
    height, width = picture.shape[:2]
    scale, patch = min(1.0, options["side"] / math.sqrt(height * width)), options["patch"]
    shown = tuple(max(patch, round(side * scale / patch) * patch) for side in (width, height))
    if shown != (width, height):
        picture = np.asarray(Image.fromarray(picture).resize(shown, Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(picture.copy()).to(device).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(options[name], device=device).view(1, 3, 1, 1) for name in ("mean", "std"))
    vector = model(pixel_values=((pixels - mean) / std).to(model.dtype)).pooler_output[0].float().cpu().numpy()
    wide = vector.astype(np.float64)
    return (wide / np.linalg.norm(wide)).astype(np.float32)


def fitted(picture: Image.Image, sizes: Sequence[Size], fit: str) -> np.ndarray:
    """uint8 [H, W, 3]: an upright picture in sRGB on white, brought to the nearest of the sizes in aspect ratio.

    Args:
      fit: how the dataset's pictures were: "resize" bends, "crop" cuts what is too much.

    Raises:
      ValueError: floating point pixels, or another fit.
    """
    if fit not in ("resize", "crop"):
        raise ValueError(f"the dataset's pictures were fitted by {fit!r}: give conditions={{'vision': vector}} instead")
    upright = _in_srgb(_eight_bits(ImageOps.exif_transpose(picture)))
    aspect = math.log(upright.width / upright.height)
    size = min(sizes, key=lambda each: (round(abs(math.log(each[0] / each[1]) - aspect), 12), -each[0] * each[1]))
    box = (0.0, 0.0, float(upright.width), float(upright.height))
    if fit == "crop":
        scale = max(size[0] / upright.width, size[1] / upright.height)
        width, height = min(upright.width, size[0] / scale), min(upright.height, size[1] / scale)
        left, top = (upright.width - width) / 2, (upright.height - height) / 2
        box = (left, top, left + width, top + height)
    return np.asarray(upright.resize(size, Image.Resampling.LANCZOS, box=box))


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Without transparency, 8 bits a channel; the colour profile stays in `info`."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64).clip(0, 65535)
        plain = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("the reference has floating point pixels; save it as PNG or JPEG")
    elif picture.mode in ("L", "RGB", "CMYK") and "transparency" not in picture.info:
        plain = picture.copy()
    else:
        layered = picture.convert("RGBA")
        plain = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    plain.info |= {name: value for name, value in picture.info.items() if name == "icc_profile"}
    return plain


def _in_srgb(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted or picture.convert("RGB")
        except (ImageCms.PyCMSError, OSError):  # one that cannot be used is as good as none
            pass
    return picture.convert("RGB")


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor) -> np.ndarray:
    """uint8 [B, H, W, 3] of f32 [B, C, h, w], scaled and shifted as the dataset stores them."""
    config, name = vae.config, type(vae).__name__
    z = latents
    if name == "AutoencoderKL":
        z = z / config.scaling_factor + (config.shift_factor or 0.0)
    elif name == "AutoencoderKLFlux2":  # its batch norm's statistics, per channel and place in a patch
        place = (config.latent_channels, *config.patch_size)
        times = (1, z.shape[2] // place[1], z.shape[3] // place[2])
        mean, variance = (
            each.to(z.device).float().reshape(place) for each in (vae.bn.running_mean, vae.bn.running_var)
        )
        z = z * torch.sqrt(variance + config.batch_norm_eps).repeat(times) + mean.repeat(times)
    # One by one: memory, and a picture that does not depend on those drawn beside it.
    pictures = [vae.decode(each[None].to(vae.dtype)).sample[0].float() for each in z]
    pixels = (torch.stack(pictures).clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
