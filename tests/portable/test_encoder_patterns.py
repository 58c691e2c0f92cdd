"""Which files of a repository an exported pipeline asks for."""

from __future__ import annotations

from huggingface_hub.utils import filter_repo_objects

from fluxdit_jax.portable import encoders


def test_only_the_encoders_own_files_are_asked_of_a_repository():
    """FLUX.1-schnell holds a transformer and two text encoders beside its VAE, 57 GB in all."""
    files = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    others = ["flux1-schnell.safetensors", "ae.safetensors", "model_index.json", "transformer/config.json",
              "transformer/diffusion_pytorch_model-00001-of-00003.safetensors", "text_encoder/model.safetensors",
              "text_encoder_2/model-00001-of-00002.safetensors", "tokenizer_2/tokenizer.json"]  # fmt: skip
    assert list(filter_repo_objects([*files, *others], allow_patterns=encoders.patterns("vae"))) == files
    t5 = ["config.json", "model.safetensors", "spiece.model", "tokenizer.json", "pytorch_model.bin", "tf_model.h5"]
    assert list(filter_repo_objects(t5, allow_patterns=encoders.patterns("text"))) == [*t5[:3], t5[3]]
