"""A quick share of the faults of preprocessing; `preprocess_kills.py` beside this file runs them whole."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from build_fixtures import contents, write_photos
from fork_server import Commands, Process

sys.path.insert(0, str(Path(__file__).parent))

import preprocess_disk  # noqa: E402

CODE = "import sys; sys.path.insert(0, sys.argv[1]); import preprocess_kills as k; t = k.{}; print(t.killed, t.lost)"


def tally(call: str) -> tuple[int, str]:
    """Runs a function of preprocess_kills in a process of its own, which forks and so must have no threads."""
    result = subprocess.run(
        [sys.executable, "-c", CODE.format(call), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    print(result.stderr)
    assert result.returncode == 0
    killed, _, lost = result.stdout.strip().partition(" ")
    return int(killed), lost


@pytest.mark.parametrize("kind", ["fresh", "workers"])
def test_killed_before_some_changes_of_the_file_system(kind: str) -> None:
    """Of a fresh build; below before each one of an update."""
    killed, lost = tally(f"kill_at_every_change({kind!r}, step=9, offset=3, pictures=12)")
    assert lost == "[]" and killed >= 5


@pytest.mark.parametrize("make", [preprocess_disk.alone, preprocess_disk.by_workers])
def test_a_full_disk_is_said_and_survived(make: preprocess_disk.Make) -> None:
    try:
        tried, full, wrong = preprocess_disk.fill(150, make)
    except PermissionError as error:
        pytest.skip(str(error))
    assert wrong == [] and tried == full + 1 and full >= 5


@pytest.mark.slow
def test_killed_before_every_change_of_the_file_system() -> None:
    """Of an update, which has a data set to lose; `run_all.py` does it for a fresh build too."""
    killed, lost = tally("kill_at_every_change('update', step=1, pictures=12)")
    assert lost == "[]" and killed >= 50


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    killed, lost = tally("kill_at_random('update', kills=20, pictures=12)")
    assert lost == "[]" and killed == 20


@pytest.mark.slow
def test_killed_with_real_encoders_it_ends_byte_identical(
    tmp_path: Path, draw_photo, tiny_vae_dir: Path, tiny_t5_dir: Path, tiny_dino_dir: Path,
    encoder_commands: Commands,
) -> None:  # fmt: skip
    photos = write_photos(tmp_path / "photos", 24, draw_photo)
    models = ["--vae", tiny_vae_dir, "--text-encoder", tiny_t5_dir, "--vision-encoder", tiny_dino_dir]
    more = ["--resolution", "128", "--shard-size", "4", "--batch-size", "3", "--device", "cpu"]

    def start(output: Path) -> Process:
        command = ["preprocess", "build", "--input", photos, "--output", output, *models, *more]
        return encoder_commands.start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "a" / "data").wait() == 0
    output = tmp_path / "b" / "data"
    for finished in (1, 3, 5):
        process = start(output)
        while len(list(output.glob(".build/*.parquet"))) < finished and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert not (output / "manifest.json").exists()
    assert start(output).wait() == 0
    assert contents(output) == contents(tmp_path / "a" / "data")
