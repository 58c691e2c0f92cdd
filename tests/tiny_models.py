"""Tiny random encoders of the real classes, saved with `save_pretrained`.

Tests and benchmarks load them by directory through the code that loads the real ones. Sizes: latents 16
channels at 1/8, text width 64, vision width 32, patch 16 (DINOv2: 14).
"""

from __future__ import annotations

from pathlib import Path

# fmt: off
WORDS = [
    "a", "the", "of", "in", "on", "with", "and", "portrait", "photo", "old", "young", "man", "woman",
    "cat", "dog", "sea", "sky", "red", "blue", "green", "golden", "light", "looking", "left", "right",
    "front", "hair", "black", "white", "brown", "field", "forest", "window", "near", "under", "over",
    "tall", "small",
]
# fmt: on


def save_flux_vae(directory: Path, widths: tuple[int, ...], layers: int = 2, groups: int = 32) -> Path:
    """The Flux autoencoder with random weights; its own widths are (128, 256, 512, 512)."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=groups,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).save_pretrained(directory)
    return directory


def save_tiny_vae(folder: Path) -> Path:
    """The Flux autoencoder's class and layout (16 channels, factor 8, shift and scale) at 364 KB."""
    return save_flux_vae(folder / "tiny_vae", (8, 16, 16, 16), layers=1, groups=4)


def save_tiny_tiny_vae(folder: Path) -> Path:
    """An AutoencoderTiny (TAESD family): 16 channels, factor 8, its own scaling."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(1)
    directory = folder / "tiny_tiny_vae"
    AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(directory)
    return directory


def save_tiny_t5(folder: Path) -> Path:
    """A two-layer T5 encoder of width 64 with a Unigram tokenizer that appends EOS."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(2)
    directory = folder / "tiny_t5"
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789,.-'")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("\u2581", -6.0)]
    pieces += [("\u2581" + word, -3.0) for word in WORDS if len(word) > 1] + [(c, -8.0) for c in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    ).save_pretrained(directory)
    T5EncoderModel(
        T5Config(
            vocab_size=len(pieces),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    ).save_pretrained(directory)
    return directory


def save_dino(directory: Path, width: int, hidden: int, layers: int, heads: int) -> Path:
    """A DINOv3 ViT, patch 16, with random weights."""
    import torch
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(3)
    DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            patch_size=16,
        )
    ).save_pretrained(directory)
    return directory


def save_tiny_dino(folder: Path) -> Path:
    """A two-layer DINOv3 ViT of width 32, patch 16, with the real image-processor settings beside it."""
    directory = save_dino(folder / "tiny_dino", 32, 64, 2, 2)
    (directory / "preprocessor_config.json").write_text(
        '{"do_normalize": true, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}'
    )
    return directory


def save_tiny_dino2(folder: Path) -> Path:
    """A two-layer DINOv2 ViT of width 32, patch 14 (no preprocessor_config.json: ImageNet's values apply)."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(4)
    directory = folder / "tiny_dino2"
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56)
    ).save_pretrained(directory)
    return directory
