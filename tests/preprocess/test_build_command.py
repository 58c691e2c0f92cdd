"""`python -m preprocess build` as a process: its exit status, what it prints, and signals."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from build_fixtures import FLAGS, write_photos
from wording import lines_naming, naming

from fluxdit_jax.dataset.manifest import load_manifest
from preprocess.__main__ import main


@pytest.fixture
def photos(tmp_path: Path, draw_photo) -> Path:
    return write_photos(tmp_path / "photos", 24, draw_photo)


def run(*arguments: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "preprocess", *arguments], capture_output=True, text=True, **more)


def test_command_line(photos: Path, tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    done = run("build", "--input", str(photos), "--output", data, "--resolution", "128", "--holdout", "0", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert lines_naming(done.stdout, 24, "train 24", data)
    assert f"python -m fluxdit_jax.train --config=configs/demo.py --config.data.path={data}" in done.stdout
    assert run("verify", data).returncode == 0
    failed = run("build", "--input", "/nowhere", "--output", str(tmp_path / "x"), *FLAGS)
    assert failed.returncode == 1
    assert (
        failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1 and "--input /nowhere" in failed.stderr
    )
    assert run("build", "--input", "x").returncode == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--vae", ""], ["--vae", "empty"]),
        (["--vision-encoder", ""], ["--vision-encoder", "--vision-embeddings"]),
        (["--max-tokens", "100000000"], ["--max-tokens", 4096]),
        (["--draw", "photo.jpg", "--dry-run"], ["--draw", ".png"]),
        (["--worker", "1/1", "--engine", "ray"], ["--worker", "--engine"]),
        (["--ray-workers", "2"], ["--ray-workers", "--engine ray"]),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_read(given, words, photos, tmp_path, capsys) -> None:
    assert main(["build", "--input", str(photos), "--output", str(tmp_path / "data"), *FLAGS, *given]) == 1
    assert re.search(naming(*words), capsys.readouterr().err)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("words", [["build", "--output", ""], ["build", "--resolution", "64,", "--output", "x"],
                                   ["verify", "x", "--workers", "0"], ["inspect", "x", "--cells", "0"]])  # fmt: skip
def test_arguments_that_are_none(words, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "invalid" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["manifest.json", "features.json", ".build/mine", "p000.jpg", "mnist-train.array_record-00000-of-00002"]
)
def test_files_of_others_are_not_replaced(name: str, photos: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"mine": 1}')
    assert main(["build", "--input", str(photos), "--output", str(tmp_path / "data"), *FLAGS]) == 1
    assert re.search(naming(tmp_path / "data", Path(name).parts[0], "new folder"), capsys.readouterr().err)
    assert file.read_text() == '{"mine": 1}'
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == [file]


def test_an_output_may_have_what_is_of_nobody(photos: Path, tmp_path: Path) -> None:
    """A new disk, with the picture of its plan and the log of the shell in it."""
    data = tmp_path / "data"
    (data / "lost+found").mkdir(parents=True)
    (data / "build.log").write_text("")
    of_both = ["build", "--input", str(photos), "--output", str(data), *FLAGS]
    assert main([*of_both, "--dry-run", "--draw", str(data / "plan.png")]) == 0
    assert main(of_both) == 0 and (data / "plan.png").exists() and (data / "lost+found").exists()
    assert main(["verify", str(data)]) == 0


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from preprocess.__main__ import main\n"
        "try: main(['build', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('numpy', 'PIL', 'torch', 'pyarrow', 'tensorflow_datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--text-encoder" in result.stdout and result.stdout.strip().endswith("[]")


def test_a_reader_that_goes_away_stops_nothing(photos: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m preprocess build --input {photos} --output {tmp_path / 'data'} --resolution 128"
    result = subprocess.run(["bash", "-c", f"{command} {' '.join(FLAGS)} | true"], capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    assert load_manifest(tmp_path / "data").records("train") > 0


def test_a_signal_inside_a_garbage_collection_stops_it_too(tmp_path: Path, draw_photo) -> None:
    """What a signal's handler raises there is swallowed."""
    photos = write_photos(tmp_path / "photos", 30, draw_photo)
    code = """
import gc, os, signal, sys
from pathlib import Path
from preprocess.__main__ import main

work, sent = Path(sys.argv.pop(1)), []
def collected(phase, info):
    if not sent and work.exists():
        sent.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

gc.callbacks.append(collected)
sys.exit(main(sys.argv[1:]))
"""
    output = tmp_path / "data"
    arguments = ["build", "--input", str(photos), "--output", str(output), "--resolution", "512", *FLAGS]
    result = subprocess.run(
        [sys.executable, "-c", code, str(output / ".build"), *arguments], capture_output=True, text=True
    )
    assert result.returncode == 143 and "Traceback" not in result.stderr
    assert "stopped" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_it_cleanly(number: signal.Signals, tmp_path: Path, draw_photo) -> None:
    photos = write_photos(tmp_path / "photos", 60, draw_photo)
    for copy in range(15):  # enough work that the signal comes before the end, also on a fast machine
        shutil.copytree(photos, tmp_path / "photos" / f"copy{copy}", ignore=shutil.ignore_patterns("copy*"))
    arguments = ["build", "--input", str(photos), "--output", str(tmp_path / "data"), "--shard-size", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "preprocess", *arguments, "--resolution", "512", *FLAGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run started in the background has SIGINT ignored, under nohup SIGHUP; the build respects that
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "data").glob(".build/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert "stopped" in errors
    assert not list((tmp_path / "data").glob(".build/*.tmp"))
    assert list((tmp_path / "data").glob(".build/*.parquet"))
