"""The commands with which `build` and `subset` end run as they are printed, one after the other."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from build_fixtures import FLAGS, index, write_photos
from training_helpers import TrainCommand

from fluxdit_jax.dataset.grid import GRID_FILE, read_grid
from fluxdit_jax.dataset.manifest import load_manifest
from preprocess.__main__ import main

pytest_plugins = ("training_fixtures",)

TINY = [
    f"--config.{key}"
    for key in ("train.steps=1", "optim.warmup_steps=1", "model.width=64", "model.depth=1", "model.heads=1",
                "data.micro_batch_size=4", "optim.global_batch_size=4", "log.preview_every=0", "log.heldout_every=0")
]  # fmt: skip


def printed(capsys: pytest.CaptureFixture, *arguments: str) -> list[list[str]]:
    """Runs a command of `preprocess` and returns those that it prints, split as a shell does."""
    capsys.readouterr()
    assert main(list(arguments)) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line[line.index("python -m ") :] for line in lines if "python -m " in line]
    return [shlex.split(part) for line in commands for part in line.split(" && ")]


def train(command: list[str], train_command: TrainCommand, *more: str) -> None:
    assert command[:3] == ["python", "-m", "fluxdit_jax.train"] and command[3].startswith("--config=")
    config = Path(command[3].partition("=")[2])
    done = train_command.run(*command[4:], *more, config=config)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def photos(tmp_path: Path, draw_photo, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # from any folder
    return write_photos(tmp_path / "my photos", 14, draw_photo)


def runs_here(command: list[str]) -> list[str]:
    """The same command with its run directory below this folder: the training process has another."""
    return [word.replace("=runs/", f"={Path.cwd()}/runs/") for word in command]


def test_with_builtin_encoders_the_demo_is_trained(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, train_command: TrainCommand
) -> None:
    data = str(tmp_path / "data set")
    build = ["build", "--input", str(photos), "--output", data, "--resolution", "128"]
    look, command = printed(capsys, *build, *FLAGS)
    assert main(look[3:]) == 0
    assert command[3].endswith("configs/demo.py") and f"--config.data.path={data}" in command
    train(runs_here(command), train_command, *TINY)
    assert (tmp_path / "runs/data set/train.log").is_file()


def test_photographs_lead_through_the_gate_to_production(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, train_command: TrainCommand,
    tiny_vae_dir: Path, tiny_t5_dir: Path, tiny_dino_dir: Path,
) -> None:  # fmt: skip
    encoders = ["--vae", str(tiny_vae_dir), "--text-encoder", str(tiny_t5_dir)]
    encoders += ["--vision-encoder", str(tiny_dino_dir), "--device", "cpu"]
    build = ["build", "--input", str(photos), "--output", "photos", "--resolution", "128", *encoders]
    _, subset, production = printed(capsys, *build, "--holdout", "0.3")
    assert "holdout" in load_manifest("photos").shards
    again, gate, validate = printed(capsys, *subset[3:])
    assert gate[3].endswith("configs/nano.py")
    _, same, check = printed(capsys, *again[3:])
    assert (same, check) == (gate, validate), "the build of the set ends with the commands of the subset"
    gate_set = Path(again[again.index("--output") + 1])
    assert read_grid(gate_set / GRID_FILE).keys() == {row["key"] for row in index(gate_set)}
    assert len(index(gate_set)) == 10 * 5 * 2 and load_manifest(gate_set).encoders == load_manifest("photos").encoders
    train(runs_here(gate), train_command, *TINY)

    report = next(word.partition("=")[2] for word in production if word.startswith("--config.gate.report="))
    run = next(word.partition("=")[2] for word in validate if word.startswith("--workdir="))
    assert report == f"{run}/validation/report.json"
    assert production[3].endswith("configs/prod_1024.py")
    data = [word.replace("=photos", f"={tmp_path}/photos") for word in runs_here(production)]
    train(data, train_command, *TINY, "--config.gate.required=False")
