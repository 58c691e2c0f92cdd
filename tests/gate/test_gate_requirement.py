"""The gate is a gate: which reports let a run start, and what the others are told."""

import dataclasses
import json
import re

import pytest
from training_helpers import conditions
from wording import lines_naming, naming

from fluxdit_jax.dataset.manifest import EncoderIdentity, Manifest, Shard
from fluxdit_jax.gate.report import Circumstances, build_report
from fluxdit_jax.gate.requirement import GateError, encoder_summary, family, is_of, report_pictures, require_report
from fluxdit_jax.gate.verdict import Verdict, not_judged
from fluxdit_jax.model.dit import ModelConfig
from fluxdit_jax.shared.json_files import write_json

pytest_plugins = ("training_fixtures",)

NANO = ModelConfig(
    width=48, depth=2, heads=3, patch=2, channels=16, conditions=conditions(64, 32), dtype="float32", remat="none",
    attention="xla",
)  # fmt: skip
LARGE = dataclasses.replace(NANO, width=128, depth=5, heads=4, dtype="bfloat16", remat="block")


ENCODERS = {
    "vae": EncoderIdentity("flux", "1", "aa" * 32, "bfloat16", 16, {"factor": 8}),
    "text": EncoderIdentity("t5", "2", "bb" * 32, "bfloat16", 64),
    "vision": EncoderIdentity("dino", "3", "cc" * 32, "bfloat16", 32),
}


def manifest(version: int = 1, name: str = "set", shards: dict | None = None, **encoders: EncoderIdentity) -> Manifest:
    """Of a dataset with these encoders besides, or instead of, `ENCODERS`."""
    values = {
        "name": name,
        "resolution": 128,
        "modulus": 16,
        "fit": "resize",
        "encoders": ENCODERS | encoders,
        "buckets": ((128, 128),),
        "latent_mean": (0.0,) * 16,
        "latent_std": (1.0,) * 16,
        "latent_count": 10,
        "lengths": {"text": 8},
        "shards": shards or {},
        "version": version,
    }
    return Manifest(**values)


TESTS = ("memorisation", "vision_swap", "text_edit")


def verdicts(failed=(), unjudged=()) -> list[Verdict]:
    return [
        not_judged(name, name, "?", 0.9, "which is no grid") if name in unjudged
        else Verdict(name, name, "?", 1.0, 0.9, "", {}, (), ("why",) if name in failed else (), ())
        for name in TESTS
    ]  # fmt: skip


def write(folder, config=NANO, of=None, failed=(), unjudged=()):
    circumstances = Circumstances("run", "data", 1500, 6, "rk3", 0, "cpu", "2026-11-24", {"total": 1.0}, 1)
    path = folder / "validation" / "report.json"
    write_json(build_report(verdicts(failed, unjudged), circumstances, config, of or manifest()), path)
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
        ({"conditions": conditions(128, 32)}, {}, ["text width", "64", "128"]),
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
        ({}, {"pose": EncoderIdentity("given", "", "", "float32", 3)}, ["encoders", "text, vae, vision", "pose"]),
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


def test_a_report_of_a_set_that_was_not_judged_is_told_from_a_failed_one(tmp_path):
    def refusal():
        with pytest.raises(GateError) as error:
            require_report(tmp_path, LARGE, manifest())
        return str(error.value)

    path = write(tmp_path, unjudged=TESTS[1:])
    assert lines_naming(refusal(), "does not allow all tests", "(vision_swap, text_edit)")
    assert "failed" not in refusal() and refusal().count("\n  - ") == 1
    write(tmp_path, failed=TESTS[:1], unjudged=TESTS[1:])
    assert lines_naming(refusal(), "failed", "(memorisation)") and refusal().count("\n  - ") == 2
    write(tmp_path, failed=TESTS)
    assert lines_naming(refusal(), "failed", "(memorisation, vision_swap, text_edit)")
    report = json.loads(path.read_text())
    for metric in report["metrics"].values():
        del metric["judged"]  # a report of before
    path.write_text(json.dumps(report))
    assert lines_naming(refusal(), "failed", "(memorisation, vision_swap, text_edit)")
    path.write_text(json.dumps(report | {"metrics": {}}))
    assert lines_naming(refusal(), "did not pass")


def test_a_network_of_another_structure_is_another_family(tmp_path):
    path = write(tmp_path)
    report = json.loads(path.read_text())
    report["model"]["family"]["parameters"] = "0" * 16
    path.write_text(json.dumps(report))
    with pytest.raises(GateError, match="structure"):
        require_report(path, LARGE, manifest())


def test_other_positions_are_another_family(tmp_path):
    """With the same parameters. Reports of earlier versions do not say which: there was one kind."""
    scaled, path = dataclasses.replace(LARGE, positions="scaled"), write(tmp_path)
    report = json.loads(path.read_text())
    for _ in range(2):
        require_report(path, LARGE, manifest())
        with pytest.raises(GateError, match=r"model\.positions was 'index' there, is 'scaled' here"):
            require_report(path, scaled, manifest())
        report["model"]["family"].pop("positions", None)
        path.write_text(json.dumps(report))


def test_the_family_sees_structure_and_not_size():
    assert family(NANO) == family(LARGE)
    assert family(NANO)["parameters"] == family(dataclasses.replace(NANO, channels=4))["parameters"]
    assert family(NANO) != family(dataclasses.replace(NANO, channels=4))
    assert re.fullmatch("[0-9a-f]{16}", family(NANO)["parameters"])  # as in the reports of before


@pytest.mark.parametrize("path", [None, ""])
def test_no_report_named(path):
    with pytest.raises(GateError, match=naming("config.gate.report", "--config.gate.required=False")):
        require_report(path, NANO, manifest())


def test_a_report_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(GateError, match=f"{tmp_path / 'report.json'}.*exist"):
        require_report(tmp_path / "report.json", NANO, manifest())
    path = write(tmp_path)
    whole = json.loads(path.read_text())
    for damage in (
        "", "[]", "{", '{"passed": "yes"}', '{"passed": true}', '{"passed": true, "model": 3}',
        '{"passed": true, "model": {"family": []}}', json.dumps(whole | {"passed": "yes"}), "[" * 100_000,
    ):  # fmt: skip
        path.write_text(damage)
        with pytest.raises(GateError, match=naming(path)) as error:
            require_report(path, NANO, manifest())
        assert str(path) in str(error.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(GateError, match=naming(tmp_path)):
        require_report(tmp_path, NANO, manifest())


def test_the_encoder_summary_has_what_the_comparison_needs():
    assert encoder_summary(manifest().text) == {"id": "t5", "revision": "2", "sha256": "bb" * 32, "width": 64}
    vae = dataclasses.replace(manifest().vae, options={"factor": 8, "scale": 0.5, "mean": 3})
    assert encoder_summary(vae).items() >= {"id": "flux", "width": 16, "factor": 8, "scale": 0.5}.items()
    assert "mean" not in encoder_summary(vae) and "shift" not in encoder_summary(vae)


# ---------------------------------------------------------------------------------- of which weights a report is


@pytest.mark.parametrize(
    ("weights", "digest", "same"),
    [
        ({"ema_step": 5, "folder": "ema", "digest": "aa"}, "aa", True),
        ({"ema_step": 4, "folder": "ema", "digest": "aa"}, "aa", True),
        ({"ema_step": 5, "folder": "ema", "digest": "bb"}, "aa", False),
        ({"ema_step": 5, "folder": "ema", "digest": "bb"}, None, True),
        ({"ema_step": 5, "folder": "ema", "digest": ""}, "aa", True),
        ({"ema_step": 4, "folder": "ema"}, "aa", False),
        ({"ema_step": 5}, None, True),
        ({"ema_step": 5, "folder": "short_ema"}, None, False),
        (None, None, False),
        ("ema/5", "aa", False),
    ],
)
def test_a_report_is_of_weights_by_their_digest_or_else_by_their_step(weights, digest, same):
    assert is_of({"weights": weights}, 5, digest) is same
    assert is_of({}, 5, digest) is False


def test_a_report_of_another_average_is_told_by_its_folder():
    short = {"weights": {"ema_step": 5, "folder": "short_ema"}}
    assert is_of(short, 5, None, "short_ema") and not is_of(short, 5, None)


@pytest.mark.parametrize(
    ("there", "allowed"),
    [
        ([], True),
        (["ema/1500"], True),
        (["ema/1000", "ema/1500"], True),
        (["ema/1500", "ema/2000"], False),
        (["ema/1500", "checkpoints/1700"], True),  # a run that is training replaces its checkpoint
        (["ema/1000", "checkpoints/1500"], True),
        (["ema/1000", "checkpoints/2000"], False),
    ],
)
def test_a_report_in_a_run_is_of_the_newest_weights_there(tmp_path, there, allowed):
    for name in there:
        (tmp_path / name).mkdir(parents=True)
    path = write(tmp_path)
    if allowed:
        assert require_report(path, LARGE, manifest()) == require_report(tmp_path, LARGE, manifest())
        return
    for weights, measured in ((json.loads(path.read_text())["weights"], "step 1500"), (None, "not known")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": weights}))
        with pytest.raises(GateError) as error:
            require_report(path, LARGE, manifest())
        assert measured in str(error.value) and "2000" in str(error.value) and str(tmp_path) in str(error.value)
    kept = path.rename(tmp_path / "kept.json")
    assert require_report(kept, LARGE, manifest())["passed"] is True  # it speaks for itself


# ---------------------------------------------------------------------------------- of which pictures a report is


def report_on(tested, drawn, config, of) -> dict:
    circumstances = Circumstances(
        "run", "SET", 8, 6, "rk3", 0, "cpu", "2026-11-24", {"total": 1.0}, 1, pictures=tested, drawn=drawn
    )
    return build_report(verdicts(), circumstances, config, of)


@pytest.mark.parametrize(
    ("tested", "drawn", "of", "warned", "words"),
    [
        (100, 0, "other", False, "passed on 100 pictures of SET"),
        (100, 100, "set", False, "passed on 100 pictures of SET"),
        (None, None, "other", False, "an older version wrote the report"),
        (100, None, "other", False, "an older version wrote the report"),
        (None, 100, "other", False, "an older version wrote the report"),
        (100, 50, "other", False, "50 of them drawn portraits"),
        (100, 51, "other", True, "51 of them drawn portraits"),
        (100, 60, "other", True, "60 of them drawn portraits"),
    ],
)
def test_which_pictures_the_gate_was_passed_on_is_told(package_log, tested, drawn, of, warned, words):
    shards = {name: {"train": (Shard("a", name, 1, 100, {}),)} for name in ("set", "other")}
    report = report_on(tested, drawn, NANO, manifest(shards=shards["set"]))
    report_pictures(report, manifest(shards=shards[of]))
    assert words in " ".join(package_log)
    assert ("portraits" in " ".join(package_log)) == bool(tested and drawn)
    assert any(line.startswith("WARNING") and "preprocess subset" in line for line in package_log) == warned
