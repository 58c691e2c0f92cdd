"""The configuration: every value that cannot be names its key."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from training_helpers import REPOSITORY, flat, tiny_config
from wording import naming

from fluxdit_jax import renamed_keys
from fluxdit_jax.config import KEYS, ConfigError, check, default_config, profile_steps
from fluxdit_jax.stages import stages_of


def with_tuples(members):
    """JSON knows lists only, a configuration tuples only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in members.items()}


def set_key(config, key, value):
    *groups, last = key.split(".")
    for group in groups:
        config = config[group]
    config[last] = value


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "data", tmp_path / "run")


DEFAULTS = flat(default_config().to_dict())
FLOATS = [key for key, value in DEFAULTS if isinstance(value, float)] + ["flow.shift", "log.peak_tflops"]
INTEGERS = [key for key, value in DEFAULTS if isinstance(value, int) and not isinstance(value, bool)] + [
    "data.text_tokens",
    "data.resolution",
    "train.images",
]


def test_the_tiny_configuration_and_every_file_in_configs_are_valid(config):
    check(config)
    names = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py") if path.stem != "__init__")
    assert {"demo", "nano", "prod"} <= set(names)
    for name in names:
        shipped = importlib.import_module(f"configs.{name}").get_config()
        shipped.workdir, shipped.data.path = "run", "data"
        check(shipped)
        keys = {key for key, _ in flat(shipped.to_dict()) if not key.startswith("stages.")}
        assert keys == dict(DEFAULTS).keys(), name
        assert stages_of(shipped)


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_names_its_key(config, key, value):
    set_key(config, key, value)
    with pytest.raises(ConfigError, match=rf"^config\.{key}"):
        check(config)


@pytest.mark.parametrize("key", INTEGERS)
def test_a_negative_count_names_its_key(config, key):
    set_key(config, key, -5)
    with pytest.raises(ConfigError, match=rf"^config\.{key}\D+-5\b"):
        check(config)


ZERO_IS_FINE = {
    "seed",
    "optim.warmup_steps",
    "log.minutes",
    "log.preview_every",
    "log.heldout_every",
    "score.every",
    "mesh.process_id",
    "routing.first",
    "routing.last",
    "alignment.block",
}


@pytest.mark.parametrize("key", [key for key in INTEGERS if key not in ZERO_IS_FINE])
def test_a_count_of_zero_names_its_key(config, key):
    set_key(config, key, 0)
    with pytest.raises(ConfigError, match=rf"^config\.{key}\D+0\b"):
        check(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workdir": ""}, ["workdir", "--config.workdir=DIR"]),
        ({"data.path": ""}, ["data.path", "--config.data.path=DIR"]),
        ({"seed": 2**32}, ["seed"]),
        ({"data.caption_weights": (1.0, -0.5)}, ["data.caption_weights", "-0.5"]),
        ({"data.caption_weights": (1.0, math.nan)}, ["data.caption_weights", "nan"]),
        ({"data.caption_weights": (math.inf,)}, ["data.caption_weights", "inf"]),
        ({"data.caption_weights": (1e300, 1e300)}, ["data.caption_weights", "1e+300"]),
        ({"data.caption_weights": ("1.0",)}, ["data.caption_weights", "'1.0'"]),
        ({"data.caption_weights": (True, 1.0)}, ["data.caption_weights", "True"]),
        ({"data.caption_weights": ((1.0,),)}, ["data.caption_weights", "(1.0,)"]),
        ({"data.caption_weights": (0.0, 0)}, ["data.caption_weights", "(0.0, 0)"]),
        ({"data.caption_weights": (1.0,) * 101}, ["data.caption_weights", "100"]),
        ({"flow.std": 0.0}, ["flow.std", 0]),
        ({"flow.shift": 0.0}, ["flow.shift", 0]),
        ({"flow.uniform_share": 1.1}, ["flow.uniform_share", 0, 1]),
        ({"optim.lr": 0.0}, ["optim.lr", 0]),
        ({"optim.lr": -1e-4}, ["optim.lr", "-0.0001"]),
        ({"optim.b1": 1.0}, ["optim.b1", 1]),
        ({"optim.b2": -0.1}, ["optim.b2", 0]),
        ({"ema.decay": 1.0}, ["ema.decay", 1]),
        ({"optim.grad_clip_norm": 0.0}, ["optim.grad_clip_norm", 0]),
        ({"optim.final_fraction": 1.5}, ["optim.final_fraction", 0, 1]),
        ({"optim.weight_decay": -0.1}, ["optim.weight_decay", 0]),
        ({"optim.name": "lion"}, ["optim.name", "'lion'", "adamw, muon"]),
        ({"optim.schedule": "linear"}, ["optim.schedule", "constant, cosine"]),
        ({"optim.global_batch_size": 10}, ["optim.global_batch_size", "data.micro_batch_size", 4]),
        ({"optim.global_batch_size": 2}, ["optim.global_batch_size", "data.micro_batch_size", 4]),
        ({"optim.schedule": "cosine", "optim.warmup_steps": 99}, ["optim.warmup_steps", "train.steps", 8]),
        ({"model.heads": 3}, ["model.width", 32, "model.heads", 3]),
        ({"model.heads": 16}, ["model.width", 4]),
        ({"model.remat": "all"}, ["model.remat", "none, dots, attention, block"]),
        ({"model.attention": "flash"}, ["model.attention", "auto, cudnn, xla"]),
        ({"model.dtype": "float64"}, ["model.dtype", "auto, bfloat16, float32"]),
        ({"health.action": "ignore"}, ["health.action", "warn, stop"]),
        ({"resume.take": "all"}, ["resume.take", "ema, state"]),
        ({"mesh.data": 0}, ["mesh.data", "-1"]),
        ({"mesh.coordinator": "foo"}, ["mesh.coordinator", "host:port"]),
        ({"mesh.coordinator": "localhost:abc"}, ["mesh.coordinator", "host:port"]),
        ({"mesh.num_processes": 2}, ["mesh.num_processes", "mesh.coordinator"]),
        ({"profile": "5"}, ["profile", "START:STOP"]),
        ({"profile": "5:5"}, ["profile", "START:STOP"]),
        ({"profile": "a:b"}, ["profile", "START:STOP"]),
        ({"profile": "-1:3"}, ["profile", "START:STOP"]),
        ({"log.peak_tflops": -1.0}, ["log.peak_tflops", 0]),
        ({"checkpoint.minutes": 0.0}, ["checkpoint.minutes", 0]),
        ({"device_memory_gb": 0.0}, ["device_memory_gb", 0]),
    ],
)
def test_an_impossible_value_names_its_key_and_what_is_possible(config, changes, words):
    for key, value in changes.items():
        set_key(config, key, value)
    with pytest.raises(ConfigError) as refusal:
        check(config)
    assert str(refusal.value).startswith("config.")
    assert re.search(naming(*words), str(refusal.value)), str(refusal.value)


@pytest.mark.parametrize("name", ["float16", "fp16", "half", "Float16"])
def test_float16_is_refused_with_the_reason(config, name):
    config.model.dtype = name
    with pytest.raises(ConfigError) as refusal:
        check(config)
    for word in ("config.model.dtype", name, "65,504", "overflow", "bfloat16"):
        assert word in str(refusal.value)


def test_profile_steps():
    assert profile_steps("3:7") == range(3, 7)


ODD = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, -(2**64), 10**400, 0.0, -0.0, 0.5, 2.5, 1e308, 1e-320, math.nan,
    math.inf, -math.inf, "", "x", "auto", "1", "\0", "\ud800", "0:1", "9" * 5000 + ":" + "9" * 5001, b"x", (), [], [1],
    {}, {"a": 1}, np.int64(4), np.float32(0.5), np.float64(0.5), 1j, object, ConfigDict(),
)  # fmt: skip
GROUPS = [name for name, value in default_config().items() if isinstance(value, ConfigDict)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([key for key, _ in DEFAULTS] + GROUPS),
            st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=6),
        ),
        min_size=1,
        max_size=2,
    )
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_key_is_accepted_or_refused_by_its_name(changes):
    """A file of Python can put anything into a configuration; what `check` accepts is a plain configuration."""
    config = tiny_config(Path("data"), Path("run"))
    for key, value in changes:
        group, _, name = key.rpartition(".")
        where = config[group] if group else config
        if isinstance(where, ConfigDict):  # it may have been changed just before
            try:
                with where.ignore_type(), where.unlocked():
                    where[name] = value
            except OverflowError:  # ml_collections makes an integer a float where the default is one
                return
    try:
        check(config)
    except ConfigError as refusal:
        text = str(refusal)
        assert text.startswith("config.") and len(text) < 600
        assert any(key in text for key, _ in changes)
    else:
        plain = json.loads(json.dumps(config.to_dict()), object_hook=with_tuples)
        assert plain == config.to_dict()
        assert dict(flat(config.to_dict())).keys() == dict(DEFAULTS).keys()


def test_a_missing_key_and_a_group_that_is_none_are_named():
    config = tiny_config(Path("data"), Path("run"))
    with config.unlocked():
        del config.optim.lr
    with pytest.raises(ConfigError, match=r"^config\.optim\.lr\b.*\bNone\b"):
        check(config)


@pytest.mark.parametrize("name", renamed_keys.EARLIER)
def test_a_key_of_an_earlier_version_is_refused_by_name(config, name):
    group, _, key = name.partition(".")
    assert name not in KEYS
    config[group][key] = 1
    with pytest.raises(ConfigError, match=naming(f"config.{name}")) as refusal:
        check(config)
    successor = str(refusal.value).split()[-1]
    assert successor == "out" or successor.removeprefix("config.") in KEYS


def test_what_an_earlier_version_recorded_has_todays_keys():
    recorded = {
        "seed": 3,
        "data": {"path": "d", "batch_size": 4},
        "flow": {"std": 1.0, "drop_text": 0.05, "drop_vision": 0.1, "drop_both": 0.025},
        "model": {"width": 32, "channels": 4, "text_width": 8, "vision_width": 6},
        "optim": {"effective_batch": 8, "clip": 1.0},
    }
    assert renamed_keys.converted(recorded) == {
        "seed": 3,
        "data": {"path": "d", "micro_batch_size": 4},
        "flow": {"std": 1.0, "drop": "all 0.025, text 0.05, vision 0.1"},
        "model": {"width": 32},
        "optim": {"global_batch_size": 8, "grad_clip_norm": 1.0},
    }
