"""The gate is a gate: which reports let a run start, and what the others are told."""

import dataclasses
import json

import pytest

from fluxdit_jax.gate.requirement import GateError, encoder_summary, family, require_report
from fluxdit_jax.model import ModelConfig
from fluxdit_jax.records import EncoderIdentity, Manifest
from fluxdit_jax.report import Circumstances, build_report, write_json

NANO = ModelConfig(
    width=48, depth=2, heads=3, patch=2, channels=16, text_width=64, vision_width=32, dtype="float32", remat="none",
    attention="xla",
)  # fmt: skip
LARGE = dataclasses.replace(NANO, width=128, depth=5, heads=4, dtype="bfloat16", remat="block")


def manifest(**changes) -> Manifest:
    values = {
        "name": "set",
        "resolution": 128,
        "modulus": 16,
        "fit": "resize",
        "vae": EncoderIdentity("flux", "1", "aa" * 32, "bfloat16", 16, {"factor": 8}),
        "text": EncoderIdentity("t5", "2", "bb" * 32, "bfloat16", 64),
        "vision": EncoderIdentity("dino", "3", "cc" * 32, "bfloat16", 32),
        "buckets": ((128, 128),),
        "latent_mean": (0.0,) * 16,
        "latent_std": (1.0,) * 16,
        "latent_count": 10,
        "text_tokens": 8,
        "shards": {},
    }
    return Manifest(**(values | changes))


class Passed:
    """Stands for a verdict in a report: what `build_report` reads of one."""

    def __init__(self, name, passed=True):
        self.name, self.title, self.passed = name, name, passed

    def to_json(self):
        return {"passed": self.passed, "value": 1.0}


def write(folder, config=NANO, of=None, failed=()):
    circumstances = Circumstances("run", "data", 1500, 6, "kutta3", 0, "cpu", "2026-11-24", {"total": 1.0}, 1)
    verdicts = [Passed(name, name not in failed) for name in ("memorisation", "vision_swap", "text_edit")]
    path = folder / "validation" / "report.json"
    write_json(build_report(verdicts, circumstances, config, of or manifest()), path)
    return path


def test_a_larger_model_of_the_same_family_may_start(tmp_path):
    path = write(tmp_path)
    assert require_report(path, LARGE, manifest(name="other pictures"))["passed"] is True
    assert (
        require_report(tmp_path, LARGE, manifest())["weights"]["ema_step"] == 1500
    )  # the run directory will do


def test_moved_encoders_with_the_same_weights_are_the_same(tmp_path):
    moved = dataclasses.replace(manifest().vae, id="/models/flux", dtype="float32", revision="")
    assert require_report(write(tmp_path), LARGE, manifest(vae=moved))["passed"] is True


@pytest.mark.parametrize(
    ("config", "of", "words"),
    [
        ({"patch": 1}, {}, ["model.patch", "2", "1"]),
        ({"text_width": 128}, {}, ["model.text_width"]),
        (
            {},
            {"vae": EncoderIdentity("sdxl", "", "dd" * 32, "float32", 16, {"factor": 8})},
            ["vae", "'flux'", "'sdxl'"],
        ),
        (
            {},
            {"text": EncoderIdentity("t5", "2", "ee" * 32, "bfloat16", 64)},
            ["text encoder", "eeeeeeeeeeee"],
        ),
        ({}, {"vision": EncoderIdentity("dino", "3", "cc" * 32, "bfloat16", 48)}, ["vision", "width 48"]),
        ({}, {"version": 2}, ["data format", "version 1", "2"]),
    ],
)
def test_another_family_encoder_or_format_is_refused_by_name(tmp_path, config, of, words):
    with pytest.raises(GateError) as error:
        require_report(write(tmp_path), dataclasses.replace(LARGE, **config), manifest(**of))
    for word in [*words, "--config.gate.required=False", "fluxdit_jax.validate"]:
        assert word in str(error.value)


def test_every_difference_is_listed_at_once(tmp_path):
    path = write(tmp_path, failed=("vision_swap",))
    with pytest.raises(GateError) as error:
        require_report(path, dataclasses.replace(LARGE, patch=1), manifest(version=2))
    assert str(error.value).count("\n  - ") == 3
    assert "failed its validation (vision_swap)" in str(error.value)


def test_a_network_of_another_structure_is_another_family(tmp_path):
    path = write(tmp_path)
    report = json.loads(path.read_text())
    report["model"]["family"]["parameters"] = "0" * 16
    path.write_text(json.dumps(report))
    with pytest.raises(GateError, match="structure"):
        require_report(path, LARGE, manifest())


def test_the_family_sees_structure_and_not_size():
    assert family(NANO) == family(LARGE)
    assert family(NANO)["parameters"] == family(dataclasses.replace(NANO, channels=4))["parameters"]
    assert family(NANO) != family(dataclasses.replace(NANO, channels=4))


@pytest.mark.parametrize("path", [None, ""])
def test_no_report_named(path):
    with pytest.raises(GateError, match="names no report") as error:
        require_report(path, NANO, manifest())
    assert "--config.gate.required=False" in str(error.value)


def test_a_report_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(GateError, match="does not exist"):
        require_report(tmp_path / "report.json", NANO, manifest())
    path = write(tmp_path)
    for damage in ("", "[]", "{", '{"passed": "yes"}', '{"passed": true}', '{"passed": true, "model": 3}'):
        path.write_text(damage)
        with pytest.raises(GateError, match="is not a validation report"):
            require_report(path, NANO, manifest())


def test_the_encoder_summary_has_what_the_comparison_needs():
    assert encoder_summary(manifest().text) == {"id": "t5", "revision": "2", "sha256": "bb" * 32, "width": 64}
