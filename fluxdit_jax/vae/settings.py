"""What decides a VAE's decoder: the parts of diffusers' `config.json` that are read."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class KlConfig:
    """What decides the decoder of an `AutoencoderKL`; names and defaults are those of its `config.json`."""

    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    act_fn: str = "silu"
    mid_block_add_attention: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = None

    @property
    def factor(self) -> int:
        """Pixels per latent side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of the decoder's blocks, from the picture's side."""
        return self.block_out_channels


@dataclasses.dataclass(frozen=True)
class Flux2Config(KlConfig):
    """What decides the decoder of an `AutoencoderKLFlux2`; it has `LatentStatistics` instead of scale and shift."""

    latent_channels: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    scaling_factor: float = dataclasses.field(default=1.0, init=False)
    shift_factor: float | None = dataclasses.field(default=None, init=False)
    decoder_block_out_channels: tuple[int, ...] | None = None
    batch_norm_eps: float = 1e-4
    patch_size: tuple[int, ...] = (2, 2)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """What decides the decoder of an `AutoencoderTiny`; names and defaults are those of its `config.json`.

    Its `scaling_factor` and `shift_factor` are not here: its latents are already scaled.
    """

    latent_channels: int = 4
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    upsampling_scaling_factor: int = 2
    act_fn: str = "relu"

    @property
    def factor(self) -> int:
        """Pixels per latent side."""
        return self.upsampling_scaling_factor ** (len(self.num_decoder_blocks) - 1)
