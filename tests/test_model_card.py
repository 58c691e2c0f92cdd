"""A verdict belongs to the weights it was measured on: in the card of an export, and where production asks for it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jax
import pytest
from training_helpers import tiny_config, tiny_optimizer
from wording import naming

from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.export import ExportError, export
from fluxdit_jax.gate.report import Circumstances, build_report
from fluxdit_jax.gate.requirement import GateError, is_of, require_report
from fluxdit_jax.gate.verdict import Verdict
from fluxdit_jax.model import dit
from fluxdit_jax.optimizer import build_optimizer
from fluxdit_jax.run.checkpoint import EMA, SHORT_EMA, Checkpoints, ema_digest
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.run.run_directory import record_start
from fluxdit_jax.run.weights import restore_weights
from fluxdit_jax.settings import resolve
from fluxdit_jax.shared.json_files import write_json
from fluxdit_jax.state import create_state

pytest_plugins = ("training_fixtures",)


def verdict(passed: bool) -> Verdict:
    return Verdict("memorisation", "Memorisation", "?", 1.0, 0.99, "", {}, (), () if passed else ("why",), ())


@pytest.fixture
def scene(tiny_dataset, tmp_path):
    """(run directory, settings, manifest): EMA weights of steps 4 and 8, the last also as the short average."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    config, manifest = tiny_config(tiny_dataset, workdir), load_manifest(tiny_dataset)
    record_start(workdir, config, manifest)
    settings = resolve(config, manifest)
    for step in (4, 8):
        write_weights(workdir, settings, step, seed=step)
    return workdir, settings, manifest


def write_weights(workdir, settings, step, seed):
    with Checkpoints(workdir, 1) as checkpoints:
        for folder, number in ((EMA, seed), (SHORT_EMA, seed + 100)):
            checkpoints.save_ema(step, dit.initialize(settings.model, jax.random.key(number)), folder)


def write_checkpoint(scene, step, seed):
    """What a run that is training writes between two EMA weights."""
    workdir, settings, _ = scene
    state = create_state(dit.initialize(settings.model, jax.random.key(seed)), build_optimizer(tiny_optimizer()))
    with Checkpoints(workdir, 1) as checkpoints:
        checkpoints.save(step, state, {"samples": 0, "batch_size": 4})


def write_report(scene, step, passed=True, digest=True):
    workdir, settings, manifest = scene
    known = restore_weights(workdir, step).digest if digest else ""
    circumstances = Circumstances(
        str(workdir), "data", step, 6, "rk3", 0, "cpu", "2026-11-24", {"total": 1.0}, 1, known
    )
    path = workdir / "validation" / "report.json"
    write_json(build_report([verdict(passed)], circumstances, settings.model, manifest), path)
    return path


def card(scene, step, folder=EMA):
    """(what the card says of the weights, of their validation)."""
    workdir, _, _ = scene
    export(workdir, workdir.parent / "out", step, folder)
    rows = (workdir.parent / "out" / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.startswith("| ")]
    told = {row[0]: row[1] for row in cells if len(row) == 2}
    return told["weights"], told["validation"]


def other_weights_at(scene, step):
    """The run has gone back and come to the step again."""
    workdir, settings, _ = scene
    for folder in (EMA, SHORT_EMA):
        shutil.rmtree(workdir / folder / str(step))
    write_weights(workdir, settings, step, seed=50)


@pytest.mark.parametrize("passed", [True, False])
def test_the_card_tells_the_verdict_of_its_own_weights_only(scene, passed, caplog):
    write_report(scene, 4, passed)
    assert card(scene, 4) == ("EMA of step 4, float32", "passed" if passed else "failed")
    assert ("report.json" in caplog.text) is not passed
    for step, folder in ((8, EMA), (None, EMA), (4, SHORT_EMA)):
        caplog.clear()
        verdict = card(scene, step, folder)[1]
        assert verdict.startswith("not validated") and "step 4" in verdict and "passed" not in verdict
        assert "other weights" in caplog.text and "report.json" in caplog.text


def test_the_same_step_with_other_numbers_was_not_validated(scene):
    write_report(scene, 8)
    assert card(scene, 8)[1] == "passed"
    other_weights_at(scene, 8)
    assert card(scene, 8)[1].startswith("not validated")


def test_a_report_without_a_digest_is_matched_by_its_step(scene):
    path = write_report(scene, 8, digest=False)
    assert card(scene, 8)[1] == "passed" and card(scene, 4)[1].startswith("not validated")
    assert card(scene, 8, SHORT_EMA)[1].startswith("not validated")
    report = json.loads(path.read_text())
    for weights in (None, {}, [8], {"digest": 3}):
        path.write_text(json.dumps(report | {"weights": weights}))
        assert card(scene, 8)[1].startswith("not validated")
    path.write_text("[]")
    with pytest.raises(ExportError, match=r"report\.json"):
        card(scene, 8)
    path.unlink()
    assert card(scene, 8)[1] == "not validated"


def test_identity_is_the_digest_and_only_without_one_the_step():
    report = {"weights": {"ema_step": 8, "folder": EMA, "digest": "abc"}}
    assert is_of(report, 8, "abc") and is_of(report, 9, "abc") and not is_of(report, 8, "abd")
    assert is_of(report, 8, None) and not is_of(report, 9, None) and not is_of(report, 8, None, SHORT_EMA)
    assert not is_of({}, 8, "abc")


# ------------------------------------------------------------------------------------------------ the gate


def require(scene, path):
    _, settings, manifest = scene
    return require_report(path, settings.model, manifest)


def test_production_takes_the_report_of_the_weights_that_the_run_has_now(scene):
    workdir, _, _ = scene
    write_report(scene, 8)
    assert require(scene, workdir)["passed"] is True
    other_weights_at(scene, 8)
    with pytest.raises(GateError) as refusal:
        require(scene, workdir)
    for word in ("step 8", str(workdir), f"fluxdit_jax.validate --workdir={workdir}"):
        assert word in str(refusal.value)


@pytest.mark.parametrize("digest", [True, False])
def test_production_refuses_the_report_of_a_run_that_was_trained_on(scene, digest):
    path = write_report(scene, 4, digest=digest)
    with pytest.raises(GateError) as refusal:
        require(scene, path)
    for word in ("step 4", "step 8"):
        assert word in str(refusal.value)


def test_a_report_without_its_run_speaks_for_itself(scene, tmp_path):
    workdir, _, _ = scene
    path = write_report(scene, 4)
    kept = Path(shutil.copy(path, tmp_path / "report-4.json"))
    assert require(scene, kept)["weights"]["ema_step"] == 4
    shutil.rmtree(workdir / EMA)
    assert require(scene, path)["weights"]["ema_step"] == 4


def test_a_relative_path_names_the_same_run(scene, monkeypatch):
    workdir, _, _ = scene
    write_report(scene, 4)
    monkeypatch.chdir(workdir / "validation")
    with pytest.raises(GateError, match="step 8"):
        require(scene, "report.json")
    monkeypatch.chdir(workdir)
    with pytest.raises(GateError, match="step 8"):
        require(scene, ".")


def test_the_digest_beside_weights_is_that_of_their_numbers(scene):
    workdir, settings, _ = scene
    assert ema_digest(workdir, 4) == tree_digest(dit.initialize(settings.model, jax.random.key(4)))
    assert ema_digest(workdir, 5) is None


def test_weights_of_a_checkpoint_have_a_card_and_a_report_of_their_own(scene):
    write_report(scene, 8)
    write_checkpoint(scene, 9, seed=9)
    assert require(scene, scene[0])["weights"]["ema_step"] == 8  # the newest of ema/, as before
    weights, validation = card(scene, None)
    assert weights == "EMA of step 9, float32" and "those of step 8" in validation
    path = write_report(scene, 9)
    assert card(scene, None)[1] == "passed" and require(scene, path)["weights"]["ema_step"] == 9
    write_checkpoint(scene, 10, seed=10)  # training has gone on, and deleted checkpoints/9
    with pytest.raises(GateError) as refusal:
        require(scene, path)
    assert re.search(naming("step 9", "step 10"), str(refusal.value))
    assert card(scene, None)[1].startswith("not validated")
