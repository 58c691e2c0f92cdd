"""The JAX decoders against diffusers', and everything that can be wrong with the files they are read from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, Flux2Pipeline
from safetensors.numpy import load_file, save_file
from wording import naming

from fluxdit_jax.dataset.manifest import EncoderIdentity
from fluxdit_jax.vae import strips
from fluxdit_jax.vae.decoder import DecoderError, load_decoder
from fluxdit_jax.vae.files import INDEX, WEIGHTS
from preprocess.encoders import load_vae
from preprocess.encoders.builtin import DctVae

SCALE, SHIFT = 0.3611, 0.1159


@pytest.fixture(autouse=True)
def products_in_f32():
    """On a GPU f32 products are TF32 by default, 2e-3 away; it is the networks that are compared here."""
    with jax.default_matmul_precision("float32"):
        yield


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


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    """(model, directory) of one tiny AutoencoderKL; tests that change files copy it."""
    model, directory = make_kl(), tmp_path_factory.mktemp("kl")
    model.save_pretrained(directory)
    return model, directory


def copy_of(directory, to):
    for file in Path(directory).iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": 2, "widths": (8, 8, 16), "norm_num_groups": 2},
        {"mid_block_add_attention": False},
        {"use_quant_conv": True, "use_post_quant_conv": True, "latent_channels": 4, "shift_factor": None},
        {"act_fn": "gelu"},
    ],
)
def test_kl_equals_diffusers(tmp_path, changes):
    model = make_kl(**changes)
    model.save_pretrained(tmp_path)
    channels, factor = model.config.latent_channels, 2 ** (len(model.config.block_out_channels) - 1)
    decoder = load_decoder(identity(tmp_path, channels, factor))
    assert (decoder.channels, decoder.factor) == (channels, factor)
    z = latents(2, channels, 6, 10)
    assert relative(decoder.decode_float(z), reference(model, z)) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"decoder_block_out_channels": (8, 8, 16, 16), "latent_channels": 8}])
def test_flux2_equals_diffusers(tmp_path, changes):
    model = make_flux2(**changes)
    model.save_pretrained(tmp_path)
    channels = model.config.latent_channels
    z = latents(2, channels, 6, 10)
    assert relative(load_decoder(identity(tmp_path, channels)).decode_float(z), reference(model, z)) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"act_fn": "mish", "num_decoder_blocks": (1, 2, 1, 1)}])
def test_tiny_equals_diffusers(tmp_path, changes):
    model = make_tiny(**changes)
    model.save_pretrained(tmp_path)
    z = 3 * latents(2, 16, 6, 10)  # large enough for the soft clamp to matter
    assert relative(load_decoder(identity(tmp_path)).decode_float(z), reference(model, z)) < 1e-4


@pytest.mark.slow
def test_full_flux_width_equals_diffusers(tmp_path):
    model = make_kl((128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
    model.save_pretrained(tmp_path)
    z = latents(1, 16, 8, 10)
    expected = reference(model, z)
    assert relative(load_decoder(identity(tmp_path)).decode_float(z), expected) < 1e-4
    in_strips = load_decoder(identity(tmp_path), whole=1)
    in_strips.strip = 2**19
    assert relative(in_strips.decode_float(z), expected) < 1e-4


@pytest.mark.slow
def test_full_flux2_width_equals_diffusers(tmp_path):
    model = make_flux2((128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
    model.save_pretrained(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8)
    encoder = load_vae(str(tmp_path), device="cpu")
    z = encoder.encode(images).astype(np.float32)
    with torch.no_grad():
        mean = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
    patches = (Flux2Pipeline._patchify_latents(mean) - model.bn.running_mean[:, None, None]) / torch.sqrt(
        model.bn.running_var + model.config.batch_norm_eps
    )[:, None, None]
    theirs = Flux2Pipeline._unpatchify_latents(patches).numpy()
    assert relative(z, theirs) < 2**-8  # bfloat16
    decoded = load_decoder(encoder.identity).decode_float(z)
    assert relative(decoded, reference(model, z)) < 1e-4
    in_strips = load_decoder(encoder.identity, whole=1)
    in_strips.strip = 2**20
    assert relative(in_strips.decode_float(z), decoded) < 1e-4


def test_encoder_and_decoder_belong_together(kl, recwarn):
    """The identity that preprocessing writes is accepted without a warning, and both decode alike."""
    _, directory = kl
    encoder = load_vae(str(directory), device="cpu")
    decoder = load_decoder(encoder.identity)
    assert not [w for w in recwarn if "sha256" in str(w.message)]
    z = latents(1, 16, 4, 6).astype(ml_dtypes.bfloat16)
    ours, theirs = decoder.decode(z), encoder.decode(z)
    assert ours.dtype == np.uint8 and ours.shape == (1, 32, 48, 3)
    assert np.abs(ours.astype(int) - theirs).max() <= 1 and ours.std() > 1
    np.testing.assert_array_equal(decoder.decode(jnp.asarray(z)), ours)


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


def test_bfloat16_is_near_and_float16_refused(kl):
    model, directory = kl
    z = latents(1, 16, 6, 6)
    error = load_decoder(identity(directory), dtype="bfloat16").decode_float(z) - reference(model, z)
    assert 1e-4 < np.sqrt(np.square(error).mean()) / reference(model, z).std() < 0.05
    with pytest.raises(ValueError, match="float16.*overflows"):
        load_decoder(identity(directory), dtype="float16")


# ---------------------------------------------------------------------------------- large images and compiling


def structured(h, w):
    """Dark left, bright right: what makes per-tile group norm statistics wrong."""
    side = np.tanh((np.arange(w) / w - 0.5) * 20) * latents(16, 1, 1, seed=1)
    return (1.5 * side + 0.3 * latents(16, h, w))[None].astype(np.float32)


def test_strips_equal_the_whole(kl):
    _, directory = kl
    z = structured(24, 16)
    whole = load_decoder(identity(directory)).decode_float(z)
    in_strips = load_decoder(identity(directory), whole=24 * 16 - 1)
    in_strips.strip = 2**14
    assert len(strips.strips(24 * 8, 2**14 // (16 * 8 * 8), 2)) == 14  # of the last resnet
    assert relative(in_strips.decode_float(z), whole) < 1e-4
    # The test can fail: decoding the halves apart is visibly different.
    apart = load_decoder(identity(directory)).decode_float
    halves = np.concatenate([apart(z[..., :8]), apart(z[..., 8:])], axis=2)
    assert np.sqrt(np.square(halves - whole).mean()) / whole.std() > 0.05


def test_strips_equal_the_whole_for_tiny(tmp_path):
    make_tiny().save_pretrained(tmp_path)
    z = structured(160, 6)
    in_strips = load_decoder(identity(tmp_path), whole=1)
    in_strips.strip = 1
    assert len(strips.strips(160, 4 * in_strips._network.halo, 2 * in_strips._network.halo)) == 4
    whole = load_decoder(identity(tmp_path)).decode_float(z)
    assert relative(in_strips.decode_float(z), whole) < 1e-5
    in_strips._network.halo = 1  # what the halo is for
    assert relative(in_strips.decode_float(z), whole) > 1e-3


@pytest.mark.parametrize("side, height, overlap", [(10, 10, 2), (11, 10, 2), (160, 76, 38), (97, 13, 12)])
def test_strips_cover_and_keep_their_distance(side, height, overlap):
    parts = strips.strips(side, height, overlap)
    assert [part[1] for part in parts[1:]] == [part[2] for part in parts[:-1]]
    assert (parts[0][1], parts[-1][2]) == (0, side)
    for start, first, last in parts:
        end = start + min(height, side)
        assert 0 <= start < end <= side
        assert first == 0 or first - start >= overlap // 2
        assert last == side or end - last >= overlap // 2


def test_attention_in_pieces_is_exact(kl, monkeypatch):
    model, directory = kl
    monkeypatch.setattr("fluxdit_jax.vae.network.SCORES", 7 * 60)
    z = latents(1, 16, 6, 10)
    assert relative(load_decoder(identity(directory)).decode_float(z), reference(model, z)) < 1e-4


def test_one_program_per_latent_size(kl):
    decoder = load_decoder(identity(kl[1]))
    for batch in (1, 3, 2):
        for h, w in ((4, 6), (6, 4)):
            assert decoder.decode(latents(batch, 16, h, w)).shape == (batch, 8 * h, 8 * w, 3)
    assert decoder._both._cache_size() == 2


def test_batch_members_do_not_touch(kl):
    decoder = load_decoder(identity(kl[1]))
    z = latents(3, 16, 4, 4)
    np.testing.assert_array_equal(decoder.decode(z)[1], decoder.decode(z[1:2])[0])


def test_not_finite_is_black_and_said(kl):
    decoder = load_decoder(identity(kl[1]))
    z = latents(2, 16, 4, 4)
    z[1, 3, 2, 2] = np.nan
    with pytest.warns(UserWarning, match=naming(1, 2, "[1]")):
        images = decoder.decode(z)
    assert images[0].any() and not images[1].any()


@pytest.mark.parametrize("bad", [latents(1, 4, 4, 4), latents(16, 4, 4), np.zeros((1, 16, 4, 4), np.uint8)])
def test_wrong_latents_are_named(kl, bad):
    with pytest.raises(ValueError, match=naming("[B, 16, h, w]", bad.dtype)):
        load_decoder(identity(kl[1])).decode(bad)


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


def test_builtin_is_the_codec_itself(recwarn):
    codec = DctVae()
    decoder = load_decoder(codec.identity)
    z = latents(2, 16, 3, 4)
    np.testing.assert_array_equal(decoder.decode(jnp.asarray(z)), codec.decode(z))
    assert (decoder.channels, decoder.factor) == (16, 8) and not recwarn.list
    with pytest.raises(DecoderError, match="'builtin:dct'.*'/somewhere'"):
        load_decoder(codec.identity, path="/somewhere")


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
