"""The JAX decoders against diffusers', whole and in strips."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from decoder_helpers import identity, latents, make_flux2, make_kl, make_tiny, reference, relative
from diffusers import Flux2Pipeline
from wording import naming

from fluxdit_jax.vae import strips
from fluxdit_jax.vae.decoder import DecoderError, load_decoder
from preprocess.encoders import load_vae
from preprocess.encoders.builtin import DctVae

pytest_plugins = ("decoder_fixtures",)
pytestmark = pytest.mark.usefixtures("products_in_f32")


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


def test_builtin_is_the_codec_itself(recwarn):
    codec = DctVae()
    decoder = load_decoder(codec.identity)
    z = latents(2, 16, 3, 4)
    np.testing.assert_array_equal(decoder.decode(jnp.asarray(z)), codec.decode(z))
    assert (decoder.channels, decoder.factor) == (16, 8) and not recwarn.list
    with pytest.raises(DecoderError, match="'builtin:dct'.*'/somewhere'"):
        load_decoder(codec.identity, path="/somewhere")
