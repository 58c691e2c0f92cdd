"""The gate is a gate: which reports let a run start, and what the others are told."""

import dataclasses
import json
import re

import pytest
from build_fixtures import options
from PIL import Image
from training_helpers import tiny_config
from wording import lines_naming, naming

from fluxdit_jax.config import resolve
from fluxdit_jax.data import RecordSource
from fluxdit_jax.gate.requirement import GateError, encoder_summary, family, require_report, tell_pictures
from fluxdit_jax.model import ModelConfig
from fluxdit_jax.records import EncoderIdentity, Manifest, Shard, load_manifest
from fluxdit_jax.report import Circumstances, build_report, write_json
from fluxdit_jax.train import train
from fluxdit_jax.validate import count_drawn
from preprocess.build import build
from preprocess.demo import draw_dataset
from preprocess.demo.cast import COMPOSITIONS

pytest_plugins = ("training_fixtures",)

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

    causes = advice = ()

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
    assert require_report(tmp_path, LARGE, manifest())["weights"]["ema_step"] == 1500  # the run directory will do


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


def test_the_same_vae_with_another_scale_and_shift_is_refused(tmp_path):
    """The same weights: only their config.json differs, and every latent with it."""

    def vae(**options):
        return dataclasses.replace(manifest().vae, options={"factor": 8} | options)

    path = write(tmp_path, of=manifest(vae=vae(scale=0.3611, shift=0.1159)))
    assert require_report(path, LARGE, manifest(vae=vae(scale=0.3611, shift=0.1159)))["passed"] is True
    with pytest.raises(GateError) as error:
        require_report(path, LARGE, manifest(vae=vae(scale=0.18215, shift=0.0)))
    for parts in (("vae", "scale", 0.3611, 0.18215), ("vae", "shift", 0.1159, 0.0)):
        assert lines_naming(str(error.value), *parts)
    report = json.loads(path.read_text())
    for option in ("scale", "shift", "factor"):  # a report of before does not tell
        del report["encoders"]["vae"][option]
    path.write_text(json.dumps(report))
    assert require_report(path, LARGE, manifest(vae=vae(scale=0.18215, shift=0.0)))["passed"] is True


def test_every_difference_is_listed_at_once(tmp_path):
    path = write(tmp_path, failed=("vision_swap",))
    with pytest.raises(GateError) as error:
        require_report(path, dataclasses.replace(LARGE, patch=1), manifest(version=2))
    assert str(error.value).count("\n  - ") == 3
    assert "(vision_swap)" in str(error.value)


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
    with pytest.raises(GateError, match=naming("config.gate.report", "--config.gate.required=False")):
        require_report(path, NANO, manifest())


def test_a_report_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(GateError, match=f"{tmp_path / 'report.json'}.*exist"):
        require_report(tmp_path / "report.json", NANO, manifest())
    path = write(tmp_path)
    for damage in ("", "[]", "{", '{"passed": "yes"}', '{"passed": true}', '{"passed": true, "model": 3}'):
        path.write_text(damage)
        with pytest.raises(GateError, match=f"config.gate.report.*{path}"):
            require_report(path, NANO, manifest())


def test_the_encoder_summary_has_what_the_comparison_needs():
    assert encoder_summary(manifest().text) == {"id": "t5", "revision": "2", "sha256": "bb" * 32, "width": 64}


# ---------------------------------------------------------------------------------- of which pictures a report is


def test_the_report_knows_the_drawn_portraits(tmp_path):
    drawn = draw_dataset(tmp_path / "photos", progress=False, compositions=COMPOSITIONS[:1])
    Image.new("RGB", (96, 96), "red").save(tmp_path / "photos" / "own.png")
    (tmp_path / "photos" / "own.txt").write_text("a red wall")
    build(options(tmp_path / "photos", tmp_path / "data", resolution=64, holdout=0.0))
    source = RecordSource(tmp_path / "data", load_manifest(tmp_path / "data"), "train", "stop")
    records = [record for _, record in source.sound(range(len(source)))]
    assert (len(records), count_drawn(records)) == (drawn + 1, drawn)


def report_on(tested, drawn, config, of) -> dict:
    circumstances = Circumstances(
        "run", "SET", 8, 6, "kutta3", 0, "cpu", "2026-11-24", {"total": 1.0}, 1, pictures=tested, drawn=drawn
    )
    verdicts = [Passed(name) for name in ("memorisation", "vision_swap", "text_edit")]
    return build_report(verdicts, circumstances, config, of)


@pytest.mark.parametrize(
    ("tested", "drawn", "of", "warned", "words"),
    [
        (100, 0, "other", False, ["SET", 100]),
        (100, 100, "set", False, ["SET", 100]),
        (None, None, "other", False, ["SET", "older version"]),
        (100, 60, "other", True, ["SET", 100, 60, "preprocess demo"]),
    ],
)
def test_which_pictures_the_gate_was_passed_on_is_told(package_log, tested, drawn, of, warned, words):
    shards = {name: {"train": (Shard("a", name, 1, 100, {}),)} for name in ("set", "other")}
    report = report_on(tested, drawn, NANO, manifest(shards=shards["set"]))
    tell_pictures(report, manifest(shards=shards[of]))
    assert re.search(naming(*words), package_log[0])
    assert any(line.startswith("WARNING") and "preprocess subset" in line for line in package_log) == warned


def test_production_after_a_gate_of_drawings_is_warned(tiny_dataset, tmp_path, quick_compile):
    """By the start of a real run."""
    config, of = tiny_config(tiny_dataset, tmp_path / "run"), load_manifest(tiny_dataset)
    config.gate.required, config.train.steps = True, 1
    there = dataclasses.replace(of, shards={"train": of.shards["holdout"]})
    write_json(report_on(100, 100, resolve(config, of).model, there), tmp_path / "report.json")
    config.gate.report = str(tmp_path / "report.json")
    assert train(config) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert lines_naming(log, " W config.gate.report", "preprocess subset")
