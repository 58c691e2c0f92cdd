"""The settings that a configuration and a data set resolve to, and what of them does not fit together."""

from __future__ import annotations

import dataclasses

import pytest
from training_helpers import CHANNELS, TEXT_WIDTH, VISION_WIDTH, tiny_config
from wording import naming

from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.settings import resolve

pytest_plugins = ("training_fixtures",)


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "data", tmp_path / "run")


def test_the_parts_get_the_values(config, tiny_dataset):
    config.data.path = str(tiny_dataset)
    settings = resolve(config, load_manifest(tiny_dataset))
    assert settings.model.width == 32 and settings.model.channels == CHANNELS
    assert settings.tokens == 4  # the largest of 4, 3 and 3
    assert settings.text_tokens == 8  # the longest stored is 5
    assert settings.optimizer.grad_accum_steps == 2 and settings.optimizer.total_steps == 8
    assert (settings.micro_batch_size, settings.global_batch_size, settings.seed) == (4, 8, 0)
    assert settings.ema_decay == 0.9999
    assert settings.flow.shift == 1.0  # of 4 tokens
    assert settings.model.dtype == "float32" and settings.model.attention == "xla"
    for part in (settings, settings.model, settings.flow, settings.optimizer):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.anything = 1


@pytest.mark.parametrize(("longest", "padded"), [(1, 8), (8, 8), (9, 16), (15, 16), (16, 16), (17, 24)])
def test_the_longest_caption_is_padded_to_eights_and_not_cut(config, tiny_dataset, longest, padded):
    manifest = dataclasses.replace(load_manifest(tiny_dataset), lengths={"text": longest})
    settings = resolve(config, manifest)
    assert (settings.text_tokens, settings.text_limit) == (padded, None)
    config.data.text_tokens = 4
    assert resolve(config, manifest).text_limit == (None if longest <= 4 else 4)


def test_given_values_go_before_defaults(config, tiny_dataset):
    config.flow.shift, config.data.text_tokens, config.model.dtype = 2.5, 3, "bfloat16"
    settings = resolve(config, load_manifest(tiny_dataset))
    assert (settings.flow.shift, settings.text_tokens, settings.model.dtype) == (2.5, 3, "bfloat16")
    config.model.dtype = "auto"
    assert resolve(config, load_manifest(tiny_dataset)).model.dtype == "float32"  # on a CPU


def test_the_dataset_decides_what_the_network_is_given(config, tiny_dataset):
    manifest = load_manifest(tiny_dataset)
    further = {
        "pose": dataclasses.replace(manifest.vision, width=3),
        "depth": dataclasses.replace(manifest.text, width=5),
    }
    lengths = manifest.lengths | {"depth": 9}
    settings = resolve(config, dataclasses.replace(manifest, encoders=manifest.encoders | further, lengths=lengths))
    assert [(c.name, c.width, c.sequence) for c in settings.model.conditions] == [
        ("text", TEXT_WIDTH, True), ("vision", VISION_WIDTH, False), ("depth", 5, True), ("pose", 3, False),
    ]  # fmt: skip
    assert settings.model.channels == CHANNELS
    assert settings.batch.lengths == {"text": 8, "depth": 16}
    assert settings.batch.widths == {"text": TEXT_WIDTH, "vision": VISION_WIDTH, "depth": 5, "pose": 3}
    assert settings.flow.dropped(["text", "vision", "depth", "pose"]) == pytest.approx(0.1)


@pytest.mark.parametrize("drop", ["pose 0.2", "text 0.6, vision 0.6"])
def test_a_dropout_that_does_not_fit_the_dataset_is_named_by_its_key(config, tiny_dataset, drop):
    config.flow.drop = drop
    with pytest.raises(ConfigError, match=naming("config.flow.drop", drop.split()[1])):
        resolve(config, load_manifest(tiny_dataset))


def test_a_patch_that_does_not_divide_a_bucket_is_named(config, tiny_dataset):
    config.model.patch = 4
    with pytest.raises(ConfigError, match=naming("config.model.patch", 4, "6x2")):
        resolve(config, load_manifest(tiny_dataset))
