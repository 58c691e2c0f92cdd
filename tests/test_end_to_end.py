"""The whole road with the real classes: photographs, tiny VAE, T5 and DINOv3, the commands of the README."""

import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fork_server import Commands
from PIL import Image
from wording import lines_naming

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[1]


Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def run(encoder_commands: Commands, xla_cache: Path) -> Run:
    return functools.partial(encoder_commands.run, env={"XDG_CACHE_HOME": str(xla_cache)}, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, draw_photo, tiny_vae_dir, tiny_t5_dir, tiny_dino_dir, run) -> Path:
    """12 photographs of three aspect ratios through `build` with the real classes."""
    root = tmp_path_factory.mktemp("road")
    photos = root / "photos"
    photos.mkdir()
    for number, size in enumerate([(200, 200), (160, 240), (240, 160)] * 4):
        Image.fromarray(draw_photo(*size, number)).save(photos / f"{number:02}.png")
        (photos / f"{number:02}.json").write_text(json.dumps({"caption": f"waves number {number}"}))
    built = run(
        "preprocess", "build", "--input", str(photos), "--output", str(root / "data"), "--resolution", "128",
        "--modulus", "16", "--holdout", "0", "--vae", str(tiny_vae_dir), "--text-encoder", str(tiny_t5_dir),
        "--vision-encoder", str(tiny_dino_dir),
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return root / "data"


@pytest.fixture(scope="module")
def narrow_prod(dataset: Path, run: Run) -> tuple[Path, subprocess.CompletedProcess]:
    """Two steps of configs/prod_1024.py with a reduced width, as the README's production command."""
    workdir = dataset.parent / "run"
    trained = run(
        "fluxdit_jax.train", "--config=configs/prod_1024.py", f"--config.data.path={dataset}",
        f"--config.workdir={workdir}", "--config.train.steps=2", "--config.model.width=64", "--config.model.heads=2",
        "--config.model.depth=2", "--config.optim.global_batch_size=8", "--config.gate.required=False",
        "--config.log.preview_steps=2", "--config.log.preview_count=3", "--config.log.every=1",
    )  # fmt: skip
    return workdir, trained


def test_training_writes_everything_of_the_run_directory(narrow_prod) -> None:
    workdir, trained = narrow_prod
    assert trained.returncode == 0, trained.stderr
    assert lines_naming(trained.stderr, "done", 2)
    for name in ("config.json", "dataset.json", "metrics.jsonl", "checkpoints/2", "ema/2", "tensorboard"):
        assert (workdir / name).exists(), name
    steps = [line["step"] for line in map(json.loads, (workdir / "metrics.jsonl").open()) if "loss" in line]
    assert steps == [1, 2]  # optimizer steps: two micro-batches each
    preview = np.asarray(Image.open(workdir / "samples" / "step_0000002.png"))
    assert preview.std() > 5  # decoded by the Flax VAE, not a blank sheet


def test_sample_draws_with_the_encoders_of_the_data_set(narrow_prod, run: Run) -> None:
    workdir, _ = narrow_prod
    photo = workdir.parent / "photos" / "01.png"
    out = workdir / "drawn.png"
    drawn = run(
        "fluxdit_jax.sample", "--workdir", str(workdir), "--prompt", "waves number 3", "--reference", str(photo),
        "--guidance-text", "2", "--guidance-vision", "1.5", "--steps", "2", "--seed", "5", "--out", str(out),
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    image = Image.open(out)
    assert image.size == (128, 128)
    assert image.text["prompt"] == "waves number 3"
    assert image.text["seed"] == "5"


def test_sample_refuses_another_text_encoder(narrow_prod, run: Run) -> None:
    workdir, _ = narrow_prod
    drawn = run(
        "fluxdit_jax.sample", "--workdir", str(workdir), "--prompt", "x", "--text-encoder", "builtin:hash",
        "--out", str(workdir / "refused.png"),
    )  # fmt: skip
    assert drawn.returncode == 1
    assert drawn.stderr.startswith("error: ") and drawn.stderr.count("\n") == 1
    assert "--text-encoder" in drawn.stderr and "builtin:hash" in drawn.stderr
    assert not (workdir / "refused.png").exists()


def test_production_does_not_start_without_the_gate(dataset: Path, run: Run) -> None:
    refused = run(
        "fluxdit_jax.train", "--config=configs/prod_1024.py", f"--config.data.path={dataset}",
        f"--config.workdir={dataset.parent / 'refused'}",
    )  # fmt: skip
    assert refused.returncode == 1
    assert "gate" in refused.stderr
    assert not (dataset.parent / "refused" / "checkpoints").exists()


def test_export_writes_the_ema_bit_for_bit(narrow_prod, run: Run, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    from fluxdit_jax.run.averages import restore_ema
    from fluxdit_jax.sampling.exported import flatten

    workdir, _ = narrow_prod
    exported = run("fluxdit_jax.export", "--workdir", str(workdir), "--out", str(tmp_path / "out"))
    assert exported.returncode == 0, exported.stderr
    expected = flatten(restore_ema(workdir)[1])
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in found)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["ema_step"] == 2
    assert (tmp_path / "out" / "README.md").read_text().startswith("---")
