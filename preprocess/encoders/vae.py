"""Any diffusers autoencoder of images (AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny) as a `Vae`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from fluxdit_jax.dataset.manifest import EncoderIdentity
from preprocess import PreprocessError
from preprocess.encoders import device as devices
from preprocess.encoders import weights

OPTION = "--vae"
_CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderTiny")


class TorchVae:
    """An autoencoder whose latents are (z - shift) * scale, the space that Flux and SD models are trained in.

    `AutoencoderTiny` returns latents that are already scaled, so nothing is applied to them. `AutoencoderKLFlux2` has
    a shift and a scale for each channel and place in a patch of 2 x 2 (its batch norm's statistics): its latents are
    those of Flux.2, not yet gathered into patches.

    Args: see `preprocess.encoders.load_vae`.
    """

    def __init__(self, spec: str, device: str, dtype: str, latent: str, seed: int) -> None:
        found = weights.find(spec, OPTION, weights.DIFFUSERS_WEIGHTS, subfolder="vae")
        name = found.config.get("_class_name")
        if name not in _CLASSES:
            raise PreprocessError(f"{OPTION} {spec}: config.json says {name!r}; supported are {', '.join(_CLASSES)}")
        self._device = devices.choose_device(device)
        self._dtype = devices.choose_dtype(dtype, self._device)
        self._tiny = name == "AutoencoderTiny"
        self._model = self._load(found, name)
        config = self._model.config
        blocks = config.encoder_block_out_channels if self._tiny else config.block_out_channels
        self.factor = 2 ** (len(blocks) - 1)
        self._step = self.factor
        self._scale: float | torch.Tensor = 1.0  # tensors: [C, rows, columns] of a patch
        self._shift: float | torch.Tensor = 0.0
        if name == "AutoencoderKL":
            self._scale, self._shift = float(config.scaling_factor), float(config.shift_factor or 0.0)
        elif name == "AutoencoderKLFlux2":
            self._step *= max(config.patch_size)
            self._scale, self._shift = self._statistics(found.directory)
        self._sample = latent == "sample" and not self._tiny  # AutoencoderTiny has no posterior
        self._seed = seed
        options = {"class": name, "factor": self.factor}
        if isinstance(self._scale, float):
            options |= {"scale": self._scale, "shift": self._shift}
        options["latent"] = f"sample, seed {seed}" if self._sample else "mean"
        self.identity = EncoderIdentity(
            id=spec,
            revision=found.revision,
            sha256=found.sha256,
            dtype=devices.dtype_name(self._dtype),
            width=int(config.latent_channels),
            options=options,
        )

    def _load(self, found: weights.Found, name: str) -> torch.nn.Module:
        import diffusers

        try:
            with devices.quiet_loading():
                model, info = getattr(diffusers, name).from_pretrained(
                    found.directory,
                    use_safetensors=True,
                    local_files_only=True,
                    low_cpu_mem_usage=False,
                    torch_dtype=self._dtype,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise PreprocessError(f"{OPTION} {found.spec}: cannot be loaded: {error}") from error
        devices.refuse_missing(info["missing_keys"], OPTION, found.spec)
        # NVIDIA's tensor cores want channels_last; on a CPU it measured the same, and ROCm prefers the default.
        nvidia = self._device.type == "cuda" and torch.version.hip is None
        self._format = torch.channels_last if nvidia else torch.contiguous_format
        return model.eval().requires_grad_(False).to(self._device, memory_format=self._format)

    def _statistics(self, directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift of an `AutoencoderKLFlux2`, from its file: the loaded model's are in its dtype."""
        config = self._model.config
        place = (config.latent_channels, *config.patch_size)
        found = {}
        for file in sorted(directory.glob(f"{weights.DIFFUSERS_WEIGHTS}*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in {"bn.running_mean", "bn.running_var"} & set(tensors.keys()):
                    found[name] = tensors.get_tensor(name).to(self._device, torch.float32).reshape(place)
        scale = torch.rsqrt(found["bn.running_var"] + config.batch_norm_eps)
        return scale, found["bn.running_mean"]

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] to bfloat16 [B, C, H/factor, W/factor].

        Raises:
          PreprocessError: a side is not a multiple of `factor` (of patches, for `AutoencoderKLFlux2`), or one image
            does not fit the device.
        """
        height, width = images.shape[1:3]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise PreprocessError(f"{OPTION}: takes uint8 [B, H, W, 3], got {images.dtype} {images.shape}")
        if height % self._step or width % self._step:
            raise PreprocessError(
                f"{OPTION}: sides {width}x{height} (width x height) are not multiples of {self._step}"
            )
        return devices.in_halves(self._encode, images, OPTION)

    @torch.inference_mode()
    def _encode(self, images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(self._device).permute(0, 3, 1, 2)
        pixels = pixels.to(self._dtype, memory_format=self._format) / 127.5 - 1
        if self._tiny:
            return devices.to_bf16(self._model.encode(pixels).latents)
        posterior = self._model.encode(pixels).latent_dist
        latents = posterior.mean.float()
        if self._sample:
            latents = latents + posterior.std.float() * self._noise(images, latents.shape)
        return devices.to_bf16((latents - _over(self._shift, latents)) * _over(self._scale, latents))

    def _noise(self, images: np.ndarray, shape: torch.Size) -> torch.Tensor:
        """Normal noise that depends on the seed and the image only, not on its batch or its place there."""
        noise = np.empty(shape, np.float32)
        for row, image in zip(noise, images):
            key = hashlib.sha256(f"latent {self._seed} ".encode() + image.tobytes()).digest()[:16]
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
            row[...] = generator.standard_normal(row.shape, np.float32)
        return torch.from_numpy(noise).to(self._device)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Float [B, C, h, w] (as `encode` returns them) to uint8 [B, h * factor, w * factor, 3]."""
        return devices.in_halves(self._decode, np.asarray(latents), OPTION)

    @torch.inference_mode()
    def _decode(self, latents: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(latents.astype(np.float32)).to(self._device)
        z = (z / _over(self._scale, z) + _over(self._shift, z)).to(self._dtype, memory_format=self._format)
        pixels = (self._model.decode(z).sample.float().clamp(-1, 1) + 1) * 127.5
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous().numpy()


def _over(values: float | torch.Tensor, latents: torch.Tensor) -> float | torch.Tensor:
    """[C, rows, columns] of a patch repeated over latents [B, C, h, w]; a number stays one."""
    if isinstance(values, float):
        return values
    return values.repeat(1, latents.shape[2] // values.shape[1], latents.shape[3] // values.shape[2])
