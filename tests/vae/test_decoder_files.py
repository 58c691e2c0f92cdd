"""The files that a decoder is read from: how they are stored, what can be wrong with them, and the Hub's cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from decoder_helpers import SCALE, SHIFT, identity, latents, make_kl, reference, relative
from safetensors.numpy import load_file, save_file
from wording import naming

from fluxdit_jax.vae.decoder import DecoderError, load_decoder
from fluxdit_jax.vae.files import INDEX, WEIGHTS

pytest_plugins = ("decoder_fixtures",)
pytestmark = pytest.mark.usefixtures("products_in_f32")


def copy_of(directory, to):
    for file in Path(directory).iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_other_weights_are_warned_about(kl):
    with pytest.warns(UserWarning, match="sha256 0000.*sha256 [0-9a-f]{64}"):
        load_decoder(identity(kl[1], sha256="0000"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_half_precision(tmp_path, dtype):
    model = make_kl().to(dtype)
    model.save_pretrained(tmp_path)
    z = latents(1, 16, 4, 4)
    assert relative(load_decoder(identity(tmp_path)).decode_float(z), reference(model.float(), z)) < 1e-4


def test_sharded_weights_in_a_subfolder(tmp_path, kl):
    model, _ = kl
    model.save_pretrained(tmp_path / "vae", max_shard_size="60KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1
    z = latents(1, 16, 4, 4)
    decoder = load_decoder(identity("acme/vae"), path=str(tmp_path))
    assert relative(decoder.decode_float(z), reference(model, z)) < 1e-4
    shard = sorted((tmp_path / "vae").glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(DecoderError, match=f"{INDEX}.*{shard.name}"):
        load_decoder(identity(tmp_path))


def test_old_attention_names(tmp_path, kl):
    model, directory = kl
    copy_of(directory, tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, array in load_file(tmp_path / WEIGHTS).items():
        for new_part, old_part in old.items():
            name = name.replace(f".{new_part}.", f".{old_part}.")
        renamed[name] = array
    assert any("proj_attn" in name for name in renamed)
    save_file(renamed, tmp_path / WEIGHTS)
    z = latents(1, 16, 4, 4)
    assert relative(load_decoder(identity(tmp_path)).decode_float(z), reference(model, z)) < 1e-4


# ------------------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize("name", ["decoder.mid_block.attentions.0.to_v.bias", "decoder.conv_in.weight"])
def test_missing_weight_is_named(tmp_path, kl, name):
    weights = load_file(copy_of(kl[1], tmp_path) / WEIGHTS)
    del weights[name]
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(DecoderError, match=f"1 missing .*{name}"):
        load_decoder(identity(tmp_path))


@pytest.mark.parametrize("name", ["decoder.extra.weight", "post_quant_conv.weight", "first_stage.bias"])
def test_unexpected_weight_is_named(tmp_path, kl, name):
    weights = load_file(copy_of(kl[1], tmp_path) / WEIGHTS)
    save_file(weights | {name: np.zeros(3, np.float32)}, tmp_path / WEIGHTS)
    with pytest.raises(DecoderError, match=f"1 unexpected .*{name}"):
        load_decoder(identity(tmp_path))


def test_wrong_shape_is_named(tmp_path, kl):
    weights = load_file(copy_of(kl[1], tmp_path) / WEIGHTS)
    weights["decoder.conv_out.bias"] = np.zeros(4, np.float32)
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(DecoderError, match=r"decoder.conv_out.bias .*\[4\].*config.json.*\[3\]"):
        load_decoder(identity(tmp_path))


def test_damaged_file_is_named(tmp_path, kl):
    file = copy_of(kl[1], tmp_path) / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DecoderError, match=str(file)):
        load_decoder(identity(tmp_path))


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("_class_name", "AutoencoderDC", ["_class_name", "'AutoencoderDC'"]),
        ("act_fn", "elu", ["act_fn", "'elu'"]),
        ("out_channels", 4, ["out_channels", 4]),
        ("up_block_types", ["AttnUpDecoderBlock2D"] * 4, ["up_block_types", "AttnUpDecoderBlock2D"]),
        ("latent_channels", 8, ["channels", 8, 16]),
        ("scaling_factor", 0.5, ["scale", 0.5, 0.3611]),
    ],
)
def test_other_architecture_is_refused(tmp_path, kl, key, value, named):
    file = copy_of(kl[1], tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(DecoderError, match=naming(*named)):
        load_decoder(identity(tmp_path, scale=SCALE, shift=SHIFT))


# ---------------------------------------------------------------------------------------------------- the hub

PROBE = """
import sys
import numpy as np
from fluxdit_jax.dataset.manifest import EncoderIdentity
from fluxdit_jax.vae.decoder import DecoderError, load_decoder
try:
    decoder = load_decoder(EncoderIdentity(sys.argv[1], sys.argv[2], "", "float32", 16, {"factor": 8}))
    print(decoder.decode(np.zeros((1, 16, 2, 2), np.float32)).shape)
except DecoderError as error:
    print(error)
print([name for name in ("torch", "diffusers", "transformers", "tensorflow") if name in sys.modules])
"""


def probe(cache, *arguments):
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_hub_cache_is_used_offline_without_torch(tmp_path, kl):
    commit = "a" * 40
    repository = tmp_path / "models--acme--flux"
    snapshot = repository / "snapshots" / commit / "vae"
    snapshot.mkdir(parents=True)
    copy_of(kl[1], snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for arguments in (("acme/flux", ""), ("acme/flux", commit), ("acme/flux@main", commit)):
        assert probe(tmp_path, *arguments) == ["(1, 16, 16, 3)", "[]"]


def test_not_found_says_what_to_do(tmp_path):
    message, modules = probe(tmp_path, "acme/flux@main", "b" * 40)
    assert modules == "[]"
    for part in (
        "'acme/flux@main'",
        f"hf download acme/flux --revision {'b' * 40} --include 'vae/*' --local-dir DIR",
        "--config.log.vae=DIR",
        "--vae DIR",
        WEIGHTS,
    ):
        assert part in message
    with pytest.raises(DecoderError, match=str(tmp_path / "nowhere")):
        load_decoder(identity("acme/flux"), path=str(tmp_path / "nowhere"))
    with pytest.raises(DecoderError, match=f"{tmp_path}.*config.json"):
        load_decoder(identity(tmp_path))
