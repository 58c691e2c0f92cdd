"""Prompts, reference pictures and latents through encoders of transformers and diffusers, as `preprocess` does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

Size = tuple[int, int]  # (width, height) in pixels


@torch.no_grad()
def encode_texts(model: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int) -> list[torch.Tensor]:
    """bfloat16 [n, width] of each prompt: its own tokens and the end token; of too many the first."""
    found = []
    for ids in tokenizer(list(prompts), verbose=False).input_ids:
        kept = ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], tokenizer.eos_token_id]
        hidden = model(torch.tensor([kept], device=model.device)).last_hidden_state
        found.append(hidden[0].to("cpu", torch.bfloat16))
    return found


@torch.no_grad()
def encode_picture(model: Any, picture: np.ndarray, options: dict[str, Any]) -> np.ndarray:
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
    pixels = torch.from_numpy(picture.copy()).to(model.device).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(options[name], device=model.device).view(1, 3, 1, 1) for name in ("mean", "std"))
    vector = model(pixel_values=((pixels - mean) / std).to(model.dtype)).pooler_output[0].float().cpu().numpy()
    wide = vector.astype(np.float64)
    return (wide / np.linalg.norm(wide)).astype(np.float32)


def fitted(picture: Image.Image, sizes: Sequence[Size], fit: str) -> np.ndarray:
    """uint8 [H, W, 3]: an upright picture on white, brought to the nearest of the sizes in aspect ratio.

    Args:
      fit: "resize" bends it to the size; anything else cuts what is too much.
    """
    upright = ImageOps.exif_transpose(picture).convert("RGBA")
    upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    aspect = math.log(upright.width / upright.height)
    size = min(sizes, key=lambda each: (round(abs(math.log(each[0] / each[1]) - aspect), 12), -each[0] * each[1]))
    box = (0.0, 0.0, float(upright.width), float(upright.height))
    if fit != "resize":
        scale = max(size[0] / upright.width, size[1] / upright.height)
        width, height = min(upright.width, size[0] / scale), min(upright.height, size[1] / scale)
        left, top = (upright.width - width) / 2, (upright.height - height) / 2
        box = (left, top, left + width, top + height)
    return np.asarray(upright.resize(size, Image.Resampling.LANCZOS, box=box))


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
        std = torch.sqrt(vae.bn.running_var.float() + config.batch_norm_eps).reshape(place).repeat(times)
        z = z * std + vae.bn.running_mean.float().reshape(place).repeat(times)
    # One by one: memory, and a picture that does not depend on those drawn beside it.
    pictures = [vae.decode(each[None].to(vae.dtype)).sample[0].float() for each in z]
    pixels = (torch.stack(pictures).clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
