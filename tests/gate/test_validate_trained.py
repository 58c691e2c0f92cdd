"""The gate on a run that was trained, and on the same run with its weights doctored."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from fork_server import JAX, Commands
from gate_fixtures import failed, gate, scene_config, write_dataset
from gate_scenes import eval_set
from training_helpers import TrainCommand, write_config

from fluxdit_jax.dataset.grid import GRID_FILE
from fluxdit_jax.gate.requirement import require_report
from fluxdit_jax.run.averages import restore_ema
from fluxdit_jax.run.checkpoint import Checkpoints
from fluxdit_jax.run.run_directory import load_config, load_dataset
from fluxdit_jax.settings import resolve

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.slow  # a training of 500 steps: about a minute of CPU


@pytest.fixture(scope="module")
def trained(tmp_path_factory, xla_cache) -> Path:
    """A run that has learnt 30 scenes: 500 steps, compiled as for a user (conftest.py turns most of it off)."""
    folder = tmp_path_factory.mktemp("gate")
    write_dataset(eval_set(("fox", "teapot", "cactus")), folder / "scenes")
    config = write_config(folder / "config.py", scene_config(folder / "scenes", folder / "run"))
    optimised = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    with Commands(JAX, optimised) as commands:
        done = TrainCommand(commands, xla_cache).run(config=config)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_trained_run_passes_and_opens_the_gate(trained, capsys):
    status, report = gate(trained)
    assert status == 0 and report["passed"] is True, report["metrics"]
    assert "PASS" in capsys.readouterr().out
    numbers = {name: metric["numbers"] for name, metric in report["metrics"].items()}
    assert numbers["memorisation"]["psnr_worst_db"] > 20 and numbers["memorisation"]["by_caption_alone_right_row"] > 0.9
    assert min(numbers["vision_swap"]["by_light"].values()) > 0.5 and numbers["text_edit"]["stayed"] < 0.1
    assert numbers["vision_swap"]["guidance"]["1.0"] > 0.8
    manifest = load_dataset(trained)
    assert require_report(trained, resolve(load_config(trained), manifest).model, manifest) == report


def test_without_the_grid_the_same_run_is_not_judged(trained, tmp_path, capsys):
    """Nothing failed, and yet nothing says that it works: status 2."""
    dataset = Path(shutil.copytree(trained.parent / "scenes", tmp_path / "scenes"))
    (dataset / GRID_FILE).unlink()
    status, report = gate(trained, "--data", str(dataset), "--steps=3")
    assert status == 2 and report["verdict"] == "NOT JUDGED: vision swap, text edit" and report["passed"] is False
    assert report["metrics"]["memorisation"]["passed"] is True
    assert "NOT JUDGED" in capsys.readouterr().out
    assert ">NOT JUDGED</p>" in (trained / "validation" / "report.html").read_text()


def silence_text(ema: dict) -> None:
    """Zeroes the gate of every cross-attention."""
    width = ema["modulation"]["kernel"].shape[0]
    ema["modulation"]["kernel"].reshape(width, -1, width)[:, 3] = 0
    ema["modulation"]["bias"].reshape(-1, width)[3] = 0
    ema["blocks"]["table"][:, 3] = 0


def silence_vision(ema: dict) -> None:
    """Every vision vector becomes the learned null."""
    ema["vision_embed"]["kernel"][:] = 0
    ema["vision_embed"]["bias"][:] = ema["null_vision"]


def shuffle_features(ema: dict) -> None:
    """The patches' channels in another order: noise, whatever the conditions say."""
    ema["out"]["kernel"][:] = np.random.default_rng(0).permutation(ema["out"]["kernel"].T).T


@pytest.mark.parametrize(
    ("doctor", "expected", "advice"),
    [
        (silence_text, {"memorisation", "vision_swap", "text_edit"}, "text path"),
        (silence_vision, {"memorisation", "vision_swap", "text_edit"}, "vision path"),
        (shuffle_features, {"memorisation", "vision_swap", "text_edit"}, "untrained"),
    ],
)
def test_doctored_weights_fail_where_they_are_broken(trained, tmp_path, doctor: Callable, expected, advice):
    for name in ("config.json", "dataset.json", "metrics.jsonl"):
        shutil.copy(trained / name, tmp_path / name)
    step, ema = restore_ema(trained)
    ema = jax.tree.map(np.array, ema)
    doctor(ema)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save_ema(step, ema)
    status, report = gate(tmp_path, "--steps=3")
    assert status == 1 and failed(report) == expected
    for name in expected:
        assert advice in " ".join(report["metrics"][name]["advice"])
    swap, edit = (report["metrics"][name]["numbers"] for name in ("vision_swap", "text_edit"))
    if doctor is silence_text:
        assert swap["right_light"] > 0.6 and swap["right_row"] < 0.5 and edit["right_row"] < 0.6
    if doctor is silence_vision:
        assert swap["right_row"] > 0.6 and swap["right_light"] < 0.5 and edit["right_light"] < 0.5
