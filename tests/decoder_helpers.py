"""Helpers of the decoders' tests: small random autoencoders of diffusers, and what these make of latents."""

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, Flux2Pipeline

from fluxdit_jax.dataset.manifest import EncoderIdentity

SCALE, SHIFT = 0.3611, 0.1159


def make_kl(widths=(8, 16, 16, 16), **changes):
    """A random AutoencoderKL: every parameter, norms and biases too, away from its initial value."""
    torch.manual_seed(0)
    settings = {
        "latent_channels": 16,
        "block_out_channels": widths,
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": SCALE,
        "shift_factor": SHIFT,
    }
    return randomise(AutoencoderKL(**(settings | changes)))


def make_tiny(**changes):
    torch.manual_seed(0)
    settings = {
        "latent_channels": 16,
        "encoder_block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
    }
    return randomise(AutoencoderTiny(**(settings | changes)), gain=2.0)


def make_flux2(widths=(8, 16, 16, 16), **changes):
    """A random AutoencoderKLFlux2 whose statistics differ by channel and by place in a patch."""
    torch.manual_seed(0)
    model = randomise(
        AutoencoderKLFlux2(**({"block_out_channels": widths, "layers_per_block": 1, "norm_num_groups": 4} | changes))
    )
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.25, 4)
    return model


def randomise(model, gain=1.0):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def identity(directory, channels=16, factor=8, sha256="", **options):
    return EncoderIdentity(str(directory), "", sha256, "float32", channels, {"factor": factor} | options)


def latents(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference(model, z):
    """diffusers' decoding of data set latents, f32 [B, H, W, 3]."""
    z = torch.from_numpy(z)
    if isinstance(model, AutoencoderKL):
        z = z / model.config.scaling_factor + (model.config.shift_factor or 0.0)
    if isinstance(model, AutoencoderKLFlux2):  # as diffusers' pipeline does
        std = torch.sqrt(model.bn.running_var + model.config.batch_norm_eps)[:, None, None]
        patches = Flux2Pipeline._patchify_latents(z) * std + model.bn.running_mean[:, None, None]
        z = Flux2Pipeline._unpatchify_latents(patches)
    with torch.no_grad():
        return model.decode(z).sample.permute(0, 2, 3, 1).numpy()


def relative(a, b):
    assert a.shape == b.shape and b.std() > 1e-2
    return np.abs(a - b).max() / np.abs(b).max()
