"""`build --worker I/N`: several processes make one build's shards, with the bytes that one process makes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import FLAGS, SMALL, contents, made, small, write_image, write_photos
from fork_server import Commands, Process
from wording import naming

from preprocess import PreprocessError
from preprocess.__main__ import main
from preprocess.build import loading
from preprocess.build.build import build
from preprocess.build.lock import locked
from preprocess.build.stored_plan import StoredPlan, versions_here
from preprocess.build.units import WORK
from preprocess.build.workers import worker_locked
from preprocess.cluster import worker
from preprocess.cluster.worker import work

Draw = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, draw_photo: Draw) -> Path:
    return write_photos(tmp_path_factory.mktemp("workers") / "photos", 30, draw_photo)


@pytest.fixture(scope="module")
def alone(photos: Path) -> dict[str, bytes]:
    """What one process makes of the photographs."""
    output = photos.parent / "data"
    build(small(photos, output))
    return contents(output)


def assert_like(output: Path, alone: dict[str, bytes]) -> None:
    assert contents(output) == alone and not (output / WORK).exists()


def test_one_after_the_other_and_then_the_build_that_publishes(photos: Path, alone, tmp_path: Path) -> None:
    output = tmp_path / "data"
    for number in (1, 2, 3):
        assert work(small(photos, output), number, 3) == 0
    result = build(small(photos, output))
    assert_like(output, alone)
    assert made(result.counts) == (0, 0, 0)


def test_what_a_worker_left_is_made_by_the_build(photos: Path, alone, tmp_path: Path) -> None:
    output = tmp_path / "data"
    work(small(photos, output), 1, 3)
    result = build(small(photos, output))
    assert_like(output, alone)
    assert 0 < made(result.counts)[0] < 30


def test_workers_started_at_once_and_killed_at_random(photos: Path, alone, tmp_path: Path, commands: Commands) -> None:
    """Those that were killed are started again, until all have ended; the last may plan anew, never otherwise."""
    output, draw = tmp_path / "data", random.Random(0)

    def start(number: int) -> Process:
        command = ["build", "--input", photos, "--output", output, *SMALL, *FLAGS, "--worker", f"{number}/4"]
        return commands.start("preprocess", *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    running, killed, done = {number: start(number) for number in range(1, 5)}, 0, set()
    while running:
        time.sleep(draw.uniform(0.02, 0.3))
        number = draw.choice(sorted(running))
        if killed < 8 and running[number].poll() is None:
            running[number].kill()
            running[number].wait()
            killed += 1
            running[number] = start(number)
        for each in [each for each, process in running.items() if process.poll() is not None]:
            assert running.pop(each).wait() == 0
            done.add(each)
    assert killed == 8 and done == {1, 2, 3, 4}
    build(small(photos, output))
    assert_like(output, alone)


def test_a_worker_reads_the_pictures_of_its_own_tasks_alone(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    output = tmp_path / "data"
    wanted = small(tmp_path / "photos", output)
    work(wanted, 1, 2)
    plan = StoredPlan.load(output)
    for number in range(0, len(plan.images), 2):
        for item in plan.task(number)[0].items:
            Path(item.image.path).unlink()
    assert work(wanted, 2, 2) == 0
    for number in range(1, len(plan.images), 2):
        assert all((t.folder / f"{t.uid}.parquet").exists() for t in plan.task(number)[0].targets)


def test_an_update_at_two_resolutions_takes_over_what_exists(photos: Path, tmp_path: Path, draw_photo: Draw) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    wanted = {"resolution": 128, "resolutions": (64, 128), "modulus": 32}
    for name in ("alone", "shared"):
        build(small(tmp_path / "photos", tmp_path / name, **wanted))
    for seed in range(30, 36):
        write_image(tmp_path / "photos" / f"new{seed}.png", seed, f"new photo {seed}", draw_photo)
    own = build(small(tmp_path / "photos", tmp_path / "alone", **wanted)).counts
    shared = small(tmp_path / "photos", tmp_path / "shared", **wanted)
    for number in (1, 2):
        work(shared, number, 2)
    build(shared)
    for side in ("64", "128"):
        assert contents(tmp_path / "shared" / side) == contents(tmp_path / "alone" / side)
    log = [json.loads(line) for line in (tmp_path / "shared" / "build_log.jsonl").read_text().splitlines()]
    assert own.reused and not [event for event in log if event["event"] == "damaged"]


def test_conditions_and_vectors_from_files(photos: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for image in photos.rglob("*.png"):
        for name, width in (("pose", 5), ("vectors", 1024)):
            path = tmp_path / name / f"{image.relative_to(photos)}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, rng.normal(size=width).astype(np.float32))
    more = {"condition": (f"pose={tmp_path / 'pose'}",), "vision_embeddings": str(tmp_path / "vectors")}
    build(small(photos, tmp_path / "alone" / "data", **more))
    shared = small(photos, tmp_path / "shared" / "data", **more)
    for number in (1, 2):
        work(shared, number, 2)
    build(shared)
    assert_like(tmp_path / "shared" / "data", contents(tmp_path / "alone" / "data"))


def test_real_encoders(
    photos: Path, tmp_path: Path, tiny_vae_dir: Path, tiny_t5_dir: Path, tiny_dino_dir: Path, tiny_dino2_dir: Path
) -> None:
    models = {"vae": str(tiny_vae_dir), "text_encoder": str(tiny_t5_dir), "vision_encoder": str(tiny_dino_dir)}
    models |= {"device": "cpu", "limit": 8}
    build(small(photos, tmp_path / "alone" / "data", **models))
    shared = small(photos, tmp_path / "shared" / "data", **models)
    work(shared, 2, 2) if StoredPlan.load(Path(shared.output)) else work(shared, 1, 2)
    other = small(photos, tmp_path / "shared" / "data", **models | {"vision_encoder": str(tiny_dino2_dir)})
    with pytest.raises(PreprocessError, match=naming("vision encoder", "planned", "here", tiny_dino2_dir)):
        work(other, 2, 2)
    half = small(photos, tmp_path / "shared" / "data", **models | {"dtype": "bfloat16"})
    with pytest.raises(PreprocessError, match=naming("float32", "bfloat16", "--dtype")):
        work(half, 2, 2)
    with pytest.raises(PreprocessError, match=naming("float32", "bfloat16", "--dtype")):
        build(half)
    work(shared, 2, 2)
    build(shared)
    assert_like(tmp_path / "shared" / "data", contents(tmp_path / "alone" / "data"))


def test_other_versions_and_options_are_refused_before_the_first_shard(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    work(small(photos, output), 1, 2)
    shards = sorted((output / WORK).glob("*.parquet"))
    with pytest.raises(PreprocessError, match=naming("--shard-size 5", "planned with 3")):
        work(small(photos, output, shard_size=5), 2, 2)
    path = output / WORK / "tasks" / "plan.json"
    raw = json.loads(path.read_text())
    assert raw["versions"] == versions_here(small(photos, output)) and "torch" not in raw["versions"]
    raw["versions"]["pillow"] = "1.2.3"
    path.write_text(json.dumps(raw))
    with pytest.raises(PreprocessError, match=naming("pillow", "1.2.3 planned")):
        work(small(photos, output), 2, 2)
    assert sorted((output / WORK).glob("*.parquet")) == shards
    task = output / WORK / "tasks" / "000001.json"
    for damage in ("{", "[]", task.read_text().replace('"content": "', '"content": "0')):
        task.write_text(damage)
        with pytest.raises(PreprocessError, match=naming(task, "plan again")):
            StoredPlan.load(output).task(1)


def test_a_build_waits_for_the_workers_and_they_for_it(photos: Path, alone, tmp_path: Path) -> None:
    output = tmp_path / "data"
    work(small(photos, output), 1, 2)
    with worker_locked(output / WORK, "2-of-2"):
        with pytest.raises(PreprocessError, match="worker 2-of-2 of this build is at work"):
            build(small(photos, output))
        with pytest.raises(PreprocessError, match="number is taken by pid"):
            work(small(photos, output), 2, 2)
    with locked(output / WORK / "lock"), pytest.raises(PreprocessError, match="planned or published by pid"):
        work(small(photos, output), 2, 2)
    work(small(photos, output), 2, 2)
    build(small(photos, output))
    assert_like(output, alone)


def test_paths_may_be_relative_to_where_a_worker_starts(
    photos: Path, alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    output = tmp_path / "data"
    work(small(Path("photos"), output), 1, 2)
    monkeypatch.chdir(tmp_path)
    work(small(photos, Path("data")), 2, 2)
    with worker_locked(output / WORK, "1-of-3"), pytest.raises(PreprocessError, match="same number N"):
        work(small(photos, Path("data")), 2, 2)
    build(small(photos, output))
    assert_like(output, alone)


def test_without_a_plan_a_worker_does_not_wait_for_ever(photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(worker, "_PATIENCE", 0.2)
    with pytest.raises(PreprocessError, match=naming("no plan", "start worker 1/2")):
        work(small(photos, tmp_path / "data"), 2, 2)


def test_a_worker_ends_if_a_build_without_workers_publishes_instead(photos: Path, tmp_path: Path, capsys) -> None:
    output, statuses = tmp_path / "data", []
    waiting = threading.Thread(target=lambda: statuses.append(work(small(photos, output), 2, 2)), daemon=True)
    waiting.start()
    while "waiting for the plan" not in capsys.readouterr().out:
        time.sleep(0.01)
    build(small(photos, output))
    waiting.join(60)
    assert statuses == [0]


def test_the_name_of_a_gpu_is_asked_of_torch(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(loading, "torch_device", lambda _options: torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert loading.device_name(small(photos, tmp_path / "data", vae="owner/vae")) == "cuda: card 1"


def test_different_devices_are_told(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "data"
    work(small(photos, output), 1, 1)
    (output / WORK / "workers" / "7.json").write_text(json.dumps({"host": "b", "device": "cuda: Some Card"}))
    capsys.readouterr()
    build(small(photos, output))
    assert "round differently: cpu" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "a/b", "-1/2"])
def test_a_number_that_cannot_be_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["build", "--output", str(tmp_path), f"--worker={text}"])
    assert f"{text}' is not I/N" in capsys.readouterr().err
