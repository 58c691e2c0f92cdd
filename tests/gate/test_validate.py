"""The gate as a command, on an untrained run."""

import collections
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from gate_fixtures import failed, gate, scene_config, write_dataset
from gate_scenes import eval_set
from training_helpers import lively, tiny_optimizer
from wording import lines_naming

from fluxdit_jax import validate
from fluxdit_jax.dataset.grid import GRID_FILE, read_grid
from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.gate.requirement import GateError, require_report
from fluxdit_jax.gate.sampler import Request, Sampler
from fluxdit_jax.gate.subject import _under_test
from fluxdit_jax.loader.reader import RecordSource, spread
from fluxdit_jax.model import dit
from fluxdit_jax.optimizer import build_optimizer
from fluxdit_jax.run.averages import restore_ema
from fluxdit_jax.run.checkpoint import Checkpoints
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.run.run_directory import load_config, load_dataset, record_start
from fluxdit_jax.sampling.pipeline import Generator
from fluxdit_jax.sampling.prompts import encode_prompts
from fluxdit_jax.settings import resolve
from fluxdit_jax.state import create_state
from fluxdit_jax.vae.decoder import load_decoder

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")
QUICK = ["--steps=2", "--method=euler"]
SUBJECTS = ("fox", "teapot", "cactus")  # of two the swap has fewer than fifty pairs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("gate") / "scenes"
    write_dataset(eval_set(SUBJECTS), directory)
    return directory


@pytest.fixture(scope="module")
def untrained(dataset, tmp_path_factory) -> Path:
    """A run directory whose EMA is a fresh initialisation."""
    workdir = tmp_path_factory.mktemp("gate") / "untrained"
    workdir.mkdir()
    config, manifest = scene_config(dataset, workdir), load_manifest(dataset)
    record_start(workdir, config, manifest)
    with Checkpoints(workdir, 1) as checkpoints:
        for step in (0, 7):
            checkpoints.save_ema(step, dit.initialize(resolve(config, manifest).model, jax.random.key(step)))
    return workdir


def test_an_untrained_run_fails_and_is_told_so(untrained, capsys):
    status, report = gate(untrained, *QUICK)
    assert status == 1 and report["passed"] is False
    assert failed(report) == {"memorisation", "vision_swap", "text_edit"}
    metrics = report["metrics"].values()
    assert all(metric["judged"] and metric["value"] < 0.1 for metric in metrics)
    assert [metric["numbers"]["questions"] for metric in metrics] == [30, 60, 30]
    digest = tree_digest(restore_ema(untrained, 7)[1])
    assert report["weights"] == {
        "ema_step": 7, "folder": "ema", "digest": digest, "workdir": str(untrained.absolute()),
    }  # fmt: skip
    # 30 each by own noise, other noise, one condition (two times); 60 pairs, 30 with a random vector, 20 at each of 3
    # guidance scales, which take three evaluations; 30 edits, and 30 with the unrelated word.
    evaluations = 2 * (4 * 30 + 60 + 30 + 3 * 3 * 20 + 2 * 30)
    assert report["sampling"] == {"method": "euler", "steps": 2, "seed": 0, "network_evaluations": evaluations}
    shown = capsys.readouterr().out
    assert "FAIL: memorisation, vision swap, text edit" in shown and shown.count(" untrained") == 1
    assert lines_naming(shown, 7, 500)
    assert (report["dataset"]["pictures_tested"], report["dataset"]["drawn_portraits"]) == (30, 0)
    page = (untrained / "validation" / "report.html").read_text()
    assert page.startswith("<!doctype html>") and " untrained" in page
    assert f"EMA of step 7, digest {digest}" in page
    assert list((untrained / "tensorboard").glob("*.validation"))
    with pytest.raises(GateError, match=r"\(memorisation, vision_swap, text_edit\)"):
        manifest = load_dataset(untrained)
        require_report(untrained, resolve(load_config(untrained), manifest).model, manifest)


def test_the_ema_of_a_newer_checkpoint_is_validated_and_named(untrained, tmp_path, capsys):
    workdir = Path(shutil.copytree(untrained, tmp_path / "run"))
    config, of = load_config(untrained), load_dataset(untrained)
    params = dit.initialize(resolve(config, of).model, jax.random.key(1))
    with Checkpoints(workdir, 1) as checkpoints:
        checkpoints.save(20, create_state(params, build_optimizer(tiny_optimizer())), {"samples": 1, "batch_size": 1})
    status, report = gate(workdir, *QUICK, "--limit=4", "--pairs=2", "--edits=2")
    assert status == 1 and report["weights"]["digest"] == tree_digest(jax.tree.map(np.asarray, params))
    assert (report["weights"]["ema_step"], report["weights"]["from"]) == (20, "checkpoints")
    shown = capsys.readouterr().out
    assert lines_naming(shown, f"{workdir}/checkpoints/20", "EMA", "step 20", "ema/", "step 7")
    assert lines_naming(shown, 20, 500)  # the run has not come to its end
    assert "--limit leaves 26 of its pictures out" in report["metrics"]["text_edit"]["reasons"][0]


def test_options_choose_what_is_measured(untrained, capsys):
    status, report = gate(
        untrained, *QUICK, "--step=0", "--limit=24", "--pairs=6", "--edits=4", "--unrelated=portrait=>view", "--seed=3",
    )  # fmt: skip
    metrics = report["metrics"]
    assert status == 1 and report["weights"]["ema_step"] == 0 and report["sampling"]["seed"] == 3
    assert [metric["numbers"]["questions"] for metric in metrics.values()] == [24, 6, 4]
    assert all(metric["judged"] for metric in metrics.values())
    shown = capsys.readouterr().out
    assert "'portrait' becomes 'view'" in shown and lines_naming(shown, 24, 30)
    assert any("at least 50" in reason for reason in metrics["vision_swap"]["reasons"])


def test_of_a_large_set_whole_photographs_are_tested(tmp_path):
    """The questions are between pictures of one photograph, which an even choice of records would tear apart."""
    write_dataset(eval_set((*SUBJECTS, "lighthouse")), tmp_path / "set")
    source = RecordSource(tmp_path / "set", load_manifest(tmp_path / "set"), "train")
    grid = read_grid(tmp_path / "set" / GRID_FILE)
    chosen = [grid[source[number].key].photograph for number in _under_test(source, grid, 39)]
    assert sorted(collections.Counter(chosen).values()) == [10, 10, 10]
    assert _under_test(source, grid, 40) == list(range(40))
    for few, of in ((29, grid), (39, {})):
        assert _under_test(source, of, few) == spread(40, few)


def test_a_set_without_a_grid_is_told_what_it_does_not_allow(untrained, dataset, tmp_path, capsys):
    """And what it does allow fails, which is the verdict."""
    other = Path(shutil.copytree(dataset, tmp_path / "no grid"))
    (other / GRID_FILE).unlink()
    status, report = gate(untrained, *QUICK, "--data", str(other))
    assert status == 1 and report["verdict"] == "FAIL: memorisation; NOT JUDGED: vision swap, text edit"
    assert [metric["judged"] for metric in report["metrics"].values()] == [True, False, False]
    shown = capsys.readouterr().out
    assert lines_naming(shown, "not judged", "Vision swap", "preprocess subset")
    assert lines_naming(shown, "look first", "the set", "vision swap, text edit")
    assert report["sampling"]["network_evaluations"] == 2 * 4 * 30
    page = (untrained / "validation" / "report.html").read_text()
    assert 'class="wall"' in page and 'class="card open"' in page


@pytest.mark.parametrize("content", ["{", "[]", '{"c00_l0.png": ["fox", "left"]}'])
def test_a_damaged_grid_is_named(untrained, dataset, tmp_path, content, capsys):
    other = Path(shutil.copytree(dataset, tmp_path / "damaged"))
    (other / GRID_FILE).write_text(content)
    status, report = gate(untrained, *QUICK, "--data", str(other))
    assert (status, report) == (2, {}) and str(other / GRID_FILE) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--step=5"], ["no step 5", "0, 7"]),
        (["--unrelated=zebra=>cat"], ["--unrelated", "zebra"]),
        (["--unrelated=fox"], ["--unrelated", "OLD=>NEW"]),
        (["--data=/nowhere"], ["/nowhere", "--data"]),
        (["--vae=/nowhere"], ["/nowhere"]),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_status_2(untrained, capsys, options, words):
    status, report = gate(untrained, *QUICK, *options)
    shown = capsys.readouterr().err
    assert status == 2 and report == {}
    assert shown.startswith("error: ") and shown.count("\n") == 1
    for word in words:
        assert word in shown


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--limit=0", "error: --limit"),
        ("--pairs=0", "error: --pairs"),
        ("--edits=0", "error: --edits"),
        ("--edits=looking left=>looking right", "--edits"),
        ("--seed=-1", "--seed"),
        (f"--seed={2**31}", "--seed"),
        ("--method=magic", "rk3"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_read(tmp_path, capsys, option, words):
    with pytest.raises(SystemExit) as exit_:
        validate.command(["--workdir", str(tmp_path), option])
    assert exit_.value.code == 2 and words in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert validate.command(["--workdir", str(tmp_path)]) == 2
    assert str(tmp_path / "config.json") in capsys.readouterr().err


def sampler_of(workdir: Path, ema: dict, manifest) -> Sampler:
    settings = resolve(load_config(workdir), manifest)
    generator = Generator.of(settings, manifest, steps=2, batch_size=3, method="euler")
    return Sampler(generator, ema, load_decoder(manifest.vae))


def test_the_sampler_draws_each_picture_once_and_the_same_in_any_company(untrained):
    scenes, manifest, ema = eval_set(SUBJECTS), load_dataset(untrained), restore_ema(untrained)[1]
    requests: list[Request] = [scenes.request(i, i) for i in range(5)]
    done: list[int] = []
    first = sampler_of(untrained, ema, manifest)
    assert len(first.missing([*requests, *requests])) == 5
    first.draw(requests, done.append)
    assert done == [3, 2] and first.missing(requests) == []
    together = first(requests)
    alone = sampler_of(untrained, ema, manifest)([requests[4]])[0]
    assert np.abs(together[4].astype(int) - alone).max() <= 1
    assert np.abs(together[4].astype(int) - together[3]).max() > 20
    assert together[0].shape == (64, 64, 3) and together[0].dtype == np.uint8


def test_an_edit_beyond_the_longest_caption_of_the_set_is_seen(untrained):
    """Weights without zeros, as an untrained network draws the same of every caption."""
    settings, manifest = resolve(load_config(untrained), load_dataset(untrained)), load_dataset(untrained)
    sampler = sampler_of(untrained, lively(restore_ema(untrained)[1], scale=0.05), manifest)
    scenes = eval_set(SUBJECTS)
    long = scenes.caption(0) + " in a room" * 10
    texts = encode_prompts([f"{long} left", f"{long} right"], manifest, None, settings.text_limit)
    assert all(len(made["text"]) > settings.text_tokens for made in texts)
    left, right, plain = sampler(
        [scenes.request(0, 0, caption=c, made=t) for c, t in zip("lr", texts)] + [scenes.request(0, 0)]
    )
    assert (left != right).any() and (left != plain).any()
