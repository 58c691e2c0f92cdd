"""Which weights are drawn from: the newest of `ema/` and of the checkpoints, also while training replaces those."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_helpers import cut
from drawing_helpers import SHORT, draw, pixels
from PIL import Image
from training_helpers import meta_of, small_state, tree_equal
from wording import lines_naming, naming

from fluxdit_jax.export import export
from fluxdit_jax.run.averages import restore_ema
from fluxdit_jax.run.checkpoint import SHORT_EMA, CheckpointError, Checkpoints
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.run.weights import restore_weights
from fluxdit_jax.sampling.exported import ExportError
from fluxdit_jax.sampling.prompts import SampleError

pytest_plugins = ("training_fixtures", "drawing_fixtures")
pytestmark = pytest.mark.usefixtures("quick_compile")
QUICK = ("--prompt", SHORT, "--steps", "1")


@pytest.fixture
def early(scene: Path) -> Path:
    """The folder with `early/`: the run before its first ema/, with checkpoints/8 only."""
    shutil.copytree(scene / "run", scene / "early")
    shutil.rmtree(scene / "early" / "ema")
    yield scene
    shutil.rmtree(scene / "early")


def with_ema(scene: Path, step: int) -> None:
    shutil.copytree(scene / "run" / "ema" / str(step), scene / "early" / "ema" / str(step))


def test_the_newest_checkpoint_is_drawn_from_and_named(early: Path, capsys: pytest.CaptureFixture) -> None:
    expected = draw(early, *QUICK)
    assert f"weights: {early / 'run' / 'ema' / '8'} (EMA, step 8)" in capsys.readouterr().out
    for step, told in ((None, ["ema/"]), (4, ["ema/", "step 4"])):
        if step:
            with_ema(early, step)
        assert (draw(early, *QUICK, run="early") == expected).all()
        shown = capsys.readouterr().out
        assert lines_naming(shown, f"{early / 'early' / 'checkpoints' / '8'} (EMA, step 8", *told)
    assert (draw(early, *QUICK, "--step", "4", run="early") != expected).any()
    with pytest.raises(CheckpointError, match=naming(early / "early", 5, "4, 8")):
        draw(early, *QUICK, "--step", "5", run="early")
    with pytest.raises(CheckpointError, match="short_ema.*config.ema.short_decay"):
        draw(early, *QUICK, "--weights", "short_ema", run="early")


def test_a_recipe_lives_as_long_as_its_weights_do(early: Path, tmp_path: Path) -> None:
    one = draw(early, *QUICK, run="early")
    path = Path(shutil.move(early / "x.png", tmp_path / "one.png"))
    digest = tree_digest(restore_ema(early / "run", 8)[1])
    texts = Image.open(path).text
    assert texts["weights"] == f"{early / 'early'}/checkpoints/8" and texts["weights_digest"] == digest
    again = ("--recipe", str(path))
    assert (draw(early, *again, run="") == one).all()
    export(early / "early", tmp_path / "kept")
    shutil.rmtree(early / "early" / "checkpoints" / "8")
    with_ema(early, 4)
    with pytest.raises(SampleError, match=naming(path, "step 8", f"digest {digest[:12]}", 4, "--model", "--step")):
        draw(early, *again, run="")
    assert (draw(early, *again, "--model", str(tmp_path / "kept"), run="") == one).all()
    with_ema(early, 8)  # the same weights, kept for ever
    assert (draw(early, *again, run="") == one).all()


def test_an_export_holds_or_names_all_that_sampling_needs(early: Path, tmp_path: Path, capsys) -> None:
    one = draw(early, *QUICK, "--guidance-text", "2", run="early")
    before = os.umask(0o027)
    try:
        export(early / "early", tmp_path / "out")
    finally:
        os.umask(before)
    assert f"{early / 'early'}/checkpoints/8 (EMA, step 8" in capsys.readouterr().out
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == dict.fromkeys(
        ("README.md", "config.json", "model.safetensors"), 0o640
    )
    digest = restore_weights(early / "early").digest
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| EMA of step 8, float32 |" in card and digest in card and "| not validated |" in card
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    model = ("--model", str(moved))
    assert (draw(early, *QUICK, *model, "--guidance-text", "2", run="") == one).all()
    again = draw(early, "--recipe", str(early / "x.png"), run="")
    assert (again == one).all() and (pixels(early / "x.png") == one).all()
    with pytest.raises(SampleError, match=naming("--step 7", moved, 8)):
        draw(early, *QUICK, *model, "--step", "7", run="")
    with pytest.raises(SampleError, match=naming(f"--workdir {moved}", "--model")):
        draw(early, *QUICK, "--workdir", str(moved), run="")
    with pytest.raises(ExportError, match="config.json .*'sizes'.*--workdir"):
        draw(early, *QUICK, "--model", str(early / "run"), run="")
    with pytest.raises(ExportError, match=f"{tmp_path / 'config.json'}.*exist"):
        draw(early, *QUICK, "--model", str(tmp_path), run="")


def test_a_damaged_export_is_refused_by_name(early: Path, tmp_path: Path) -> None:
    export(early / "early", tmp_path / "out")
    weights, description = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "config.json"
    whole, text = weights.read_bytes(), description.read_text()
    flipped = bytearray(whole)
    flipped[len(whole) - 99] ^= 4
    for content, words in ((bytes(flipped), "config.json"), (whole[:-50], "cannot")):
        weights.write_bytes(content)
        with pytest.raises(ExportError, match=f"model.safetensors .*{words}"):
            draw(early, *QUICK, "--model", str(tmp_path / "out"), run="")
    weights.write_bytes(whole)
    raw = json.loads(text)
    for changed in (
        {"sizes": []}, {"tokens": 3}, {"latent_std": [1.0]}, {"weights": {"average": "x", "digest": 1}}, {"flow": 3},
        {"model": raw["model"] | {"width": -32}}, {"encoders": raw["encoders"] | {"vae": {}}},
    ):  # fmt: skip
        description.write_text(json.dumps(raw | changed))
        with pytest.raises(ExportError, match=r"config\.json"):
            draw(early, *QUICK, "--model", str(tmp_path / "out"), run="")
    description.write_text(json.dumps(raw | {"model": raw["model"] | {"width": 64}}))
    with pytest.raises(ExportError, match="model.safetensors.*config.json"):
        draw(early, *QUICK, "--model", str(tmp_path / "out"), run="")


# ------------------------------------------------------------------------------------ of checkpoints, directly


def saved(workdir: Path, steps: tuple[int, ...], keep: int = 2) -> None:
    with Checkpoints(workdir, keep=keep) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, small_state(step), meta_of(step))


def test_one_average_of_a_checkpoint_is_read_and_checked_without_the_rest(tmp_path: Path) -> None:
    state = small_state(3)
    state = state._replace(short_ema=jax.tree.map(lambda x: x / 5, state.params))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, state, meta_of(3))
    for folder, average in (("ema", state.ema), (SHORT_EMA, state.short_ema)):
        weights = restore_weights(tmp_path, folder=folder)
        assert (weights.step, weights.path.name) == (3, "3") and weights.digest == tree_digest(average)
        assert tree_equal(weights.ema, jax.tree.map(np.asarray, average))


def test_damaged_weights_of_a_checkpoint_are_refused_and_older_ones_used(tmp_path: Path) -> None:
    saved(tmp_path, (1, 2))
    path = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"ema_digest": "0" * 64}))
    with pytest.raises(CheckpointError, match="checkpoints/2 .*written"):
        restore_weights(tmp_path)
    assert restore_weights(tmp_path, 1).step == 1
    path.write_text(json.dumps({name: value for name, value in good.items() if name != "ema_digest"}))
    assert "older version" in str(restore_weights(tmp_path))
    for damage in (
        lambda: path.write_text("{"),
        lambda: cut(max(tmp_path.rglob("2/state/d/*"), key=os.path.getsize)),
    ):
        path.write_text(json.dumps(good))
        damage()
        with pytest.raises(CheckpointError, match="checkpoints/2 .*read"):
            restore_weights(tmp_path)


def test_broken_weights_of_a_checkpoint_are_never_drawn(tmp_path: Path, monkeypatch) -> None:
    broken = small_state(1)._replace(ema={"mlp": np.float32([np.nan])})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr("fluxdit_jax.run.checkpoint.state_fault", lambda state: None)  # an older version's
        checkpoints.save(1, broken, meta_of(1))
    with pytest.raises(CheckpointError, match="checkpoints/1 .*broken"):
        restore_weights(tmp_path)


def test_checkpoints_that_are_replaced_while_they_are_read_never_fail(tmp_path: Path) -> None:
    """A reader beside a run that keeps one checkpoint and writes the next at once."""
    saved(tmp_path, (1,), keep=1)
    states = {step: small_state(step) for step in range(1, 13)}
    expected = {step: tree_digest(state.ema) for step, state in states.items()}
    done = threading.Event()

    def train() -> None:
        try:
            with Checkpoints(tmp_path, keep=1) as checkpoints:
                for step in range(2, 13):
                    checkpoints.save(step, states[step], meta_of(step))
        finally:
            done.set()

    thread = threading.Thread(target=train)
    thread.start()
    seen = []
    try:
        while not done.is_set():
            weights = restore_weights(tmp_path)
            assert weights.digest == expected[weights.step]
            seen.append(weights.step)
    finally:
        thread.join()
    assert seen == sorted(seen) and len(set(seen)) > 1 and restore_weights(tmp_path).step == 12
