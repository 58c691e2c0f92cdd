"""What stands behind the playground's page: it draws what `sample` draws, and can draw again what it drew."""

from __future__ import annotations

import dataclasses
import io
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from drawing_helpers import SHORT, config, draw, pixels
from PIL import Image
from wording import naming

from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.export import export
from fluxdit_jax.play import parse_arguments, play
from fluxdit_jax.playground.form import MAX_PICTURES, MAX_PROMPT, Form
from fluxdit_jax.playground.session import Session, Stopped
from fluxdit_jax.run.checkpoint import CheckpointError
from fluxdit_jax.run.run_directory import RunError
from fluxdit_jax.sampling import recipe
from fluxdit_jax.sampling.kept import Kept
from fluxdit_jax.sampling.prompts import SampleError
from fluxdit_jax.train import train

pytest_plugins = ("training_fixtures", "drawing_fixtures")
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def session(scene: Path, tmp_path: Path) -> Session:
    return opened(tmp_path, "--workdir", scene / "run")


def opened(tmp_path: Path, *arguments: object) -> Session:
    return Session(parse_arguments([*map(str, arguments), "--out", str(tmp_path / "play")]), tmp_path)


def a_form(session: Session, **fields: object) -> Form:
    return Form(**{"prompt": SHORT, "size": next(iter(session.sizes())), "steps": 2} | fields)


def drawn(session: Session, **fields: object) -> Path:
    return session.draw(a_form(session, **fields), lambda _count: None).path


def arguments_of(path: Path) -> dict:
    return recipe.read(path).arguments


def test_a_history_is_given_away_and_nothing_else(scene: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = parse_arguments([f"--workdir={scene / 'run'}", f"--out={tmp_path}", f"--port={port}"])
    for name in ("play-000001.png", "play-000002_01.png", ".lock", "private.png"):
        (tmp_path / name).touch()
    with pytest.raises(RunError, match=naming(tmp_path, "private.png", "folder of its own")):
        play(arguments)


def test_a_part_is_loaded_once_and_only_the_last_one_stays() -> None:
    kept, loaded = Kept(), []

    def get(key: str) -> str:
        return kept.get("part", key, lambda: loaded.append(key) or key.upper())

    assert [get(key) for key in ("a", "a", "b", "a")] == ["A", "A", "B", "A"]
    assert loaded == ["a", "b", "a"]


def test_it_draws_what_sample_draws(session: Session, scene: Path) -> None:
    reference = min((scene / "photos").rglob("*.png"))
    given = {"seed": 5, "guidance_text": 3.0, "rescale": 0.5, "method": "rk3", "weights": "ema/4"}
    path = drawn(session, reference=reference, guidance_vision=2.0, **given)
    same = draw(
        scene, "--prompt", SHORT, "--seed", "5", "--steps", "2", "--method", "rk3", "--step", "4", "--rescale", "0.5",
        "--guidance-text", "3", "--guidance-vision", "2", "--reference", str(reference),
    )  # fmt: skip
    assert (pixels(path) == same).all()
    there, here = recipe.read(path), recipe.read(scene / "x.png")
    assert there.arguments == here.arguments and there.digest == here.digest
    assert (there.given["vision"] == here.given["vision"]).all()

    # What is loaded now serves other requests as well, each as if it were the first.
    assert (pixels(drawn(session)) == draw(scene, "--prompt", SHORT, "--steps", "2")).all()
    assert (pixels(drawn(session, prompt="a dog", seed=9)) != same).any()


def test_several_pictures_are_each_drawn_alone(session: Session, scene: Path) -> None:
    forms = a_form(session, count=3, seed=4).pictures()
    paths = [session.draw(form, lambda _count: None).path for form in forms]
    assert [path.name for path in paths] == [f"play-{number:06d}.png" for number in (1, 2, 3)]
    assert session.history() == paths[::-1] and session.history(2) == paths[:0:-1]
    for seed, path in enumerate(paths, 4):
        assert (pixels(path) == draw(scene, "--prompt", SHORT, "--steps", "2", "--seed", str(seed))).all()


def test_a_sheet_over_two_scales(session: Session, scene: Path) -> None:
    counted: list[int] = []
    form = a_form(session, sweep_text="1,3", sweep_vision="1, 2", guidance_text=9.0)
    assert form.pictures() == [form]
    path = session.draw(form, counted.append).path
    draw(scene, "--prompt", SHORT, "--steps", "2", "--sweep-text", "1,3", "--sweep-vision", "1,2")
    assert sum(counted) == 4 and (pixels(path) == pixels(scene / "x.png")).all()


@pytest.mark.parametrize("text", ["--seed=3", "two\nlines", "", 'quote " and \\ and ünï', "\x00"])
def test_a_prompt_is_taken_as_it_is(session: Session, text: str) -> None:
    assert arguments_of(drawn(session, prompt=text, steps=1))["prompt"] == [text]


def test_a_picture_is_restored_with_all_that_made_it(session: Session, scene: Path) -> None:
    vector = session.vector(3)
    made = {"seed": 7, "count": 1, "method": "euler", "weights": "ema/4", "guidance_text": 2.5, "guidance_vision": 1.5,
            "rescale": 0.25, "size": list(session.sizes())[-1]}  # fmt: skip
    path = drawn(session, vector=vector, **made)
    form, notes = session.restore(path)
    assert not notes and form == a_form(session, recipe=path, **made)
    again = session.draw(form, lambda _count: None).path
    assert (pixels(again) == pixels(path)).all() and (recipe.read(again).given["vision"] == np.load(vector)).all()
    # Another vector instead of the restored one, and none.
    other = session.draw(dataclasses.replace(form, vector=session.vector(4)), lambda _count: None).path
    assert (recipe.read(other).given["vision"] == np.load(session.vector(4))).all()
    assert not recipe.read(drawn(session, **made)).given

    sheet = drawn(session, sweep_text="1,3", sweep_vision="2,1.5")
    assert session.restore(sheet)[0] == a_form(session, weights="ema/8", sweep_text="1,3", sweep_vision="2,1.5")


def test_a_restored_sheet_becomes_a_picture_where_its_scales_are_cleared(session: Session) -> None:
    sheet = drawn(session, vector=session.vector(0), sweep_text="1,3")
    form, _ = session.restore(sheet)
    assert form.sweeping and form.recipe == sheet
    one = session.draw(dataclasses.replace(form, sweep_text=""), lambda _count: None).path
    assert arguments_of(one)["sweep_text"] is None and "vision" in recipe.read(one).given


def test_both_averages_of_one_checkpoint(scene: Path, tmp_path: Path) -> None:
    c = config(scene / "ds", tmp_path / "run")
    c.ema.short_decay, c.train.steps, c.checkpoint.ema_every = 0.01, 4, 100
    assert train(c) == 0
    for folder in ("ema", "short_ema"):
        shutil.rmtree(tmp_path / "run" / folder, ignore_errors=True)
    session = opened(tmp_path, "--workdir", tmp_path / "run")
    assert session.averages() == ["ema/4", "short_ema/4"]
    digests = [recipe.read(drawn(session, weights=weights)).digest for weights in ("ema/4", "short_ema/4", "ema/4")]
    assert digests[0] == digests[2] != digests[1]


def test_what_a_picture_cannot_give_is_told(session: Session, scene: Path, tmp_path: Path) -> None:
    draw(scene, "--prompt", SHORT, "--prompt", "a dog", "--steps", "1", "--step", "4")
    shutil.copytree(scene / "run", tmp_path / "run", ignore=shutil.ignore_patterns("4"))
    without = opened(tmp_path, "--workdir", tmp_path / "run")
    form, notes = without.restore(scene / "x.png")
    assert form.weights == "newest" and form.prompt == SHORT and len(notes) == 2 and "ema/4" in notes[0]
    assert without.draw(form, lambda _count: None).path.exists()

    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, why in (("plain.png", "no recipe"), ("text.png", "PNG")):
        with pytest.raises(SampleError, match=naming(name, why)):
            without.restore(tmp_path / name)


def test_requests_that_cannot_be_are_answered_in_words(session: Session, tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=naming(f"{MAX_PROMPT + 1:,}", f"{MAX_PROMPT:,}")):
        a_form(session, prompt="x" * (MAX_PROMPT + 1)).pictures()
    with pytest.raises(SampleError, match=naming(MAX_PICTURES + 1, MAX_PICTURES)):
        a_form(session, count=MAX_PICTURES + 1).pictures()
    (tmp_path / "text.jpg").write_text("no picture")
    for fields, named in (
        ({"size": "8x8"}, "8x8"),
        ({"reference": tmp_path / "text.jpg"}, "text.jpg"),
        ({"sweep_text": "one,two"}, "one,two"),
        ({"guidance": {"style": 2.0}}, "style"),
        ({"weights": "ema/5"}, "step 5"),
        ({"seed": 2**31}, "seed"),
        ({"reference": tmp_path / "text.jpg", "vector": tmp_path}, "text.jpg"),
    ):
        with pytest.raises((SampleError, CheckpointError), match=named):
            drawn(session, **fields)
    assert not session.history()


def test_it_notes_what_sample_notes(session: Session) -> None:
    told = session.draw(a_form(session, prompt="word " * 600, steps=1), lambda _count: None).notes
    assert len(told) == 1 and "601 tokens" in told[0] and told[0].startswith("note: ")


def test_stopping_leaves_no_picture(session: Session) -> None:
    session.stop.set()
    with pytest.raises(Stopped):
        drawn(session)
    session.stop.clear()
    assert not session.history() and drawn(session).name == "play-000001.png"


def test_a_run_that_trains_meanwhile(scene: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scene / "run", run, ignore=shutil.ignore_patterns("8"))
    session = opened(tmp_path, "--workdir", run)
    assert session.averages() == ["ema/4"]
    older = drawn(session)
    shutil.copytree(scene / "run" / "ema" / "8", run / "ema" / "8")
    assert session.averages() == ["ema/8", "ema/4"]
    newer = drawn(session)
    assert (pixels(older) != pixels(newer)).any() and arguments_of(newer)["step"] == 8
    # A run that was begun again has other weights of the same step.
    shutil.rmtree(run / "ema" / "8")
    shutil.copytree(scene / "run" / "ema" / "4", run / "ema" / "8")
    assert recipe.read(drawn(session)).digest == recipe.read(older).digest


def test_pictures_and_vectors_of_the_dataset(session: Session, scene: Path, tmp_path: Path) -> None:
    found = session.records(5)
    assert len({index for index, _, _ in found}) == 5
    for index, key, picture in found:
        original = np.asarray(Image.open(scene / "photos" / key).resize(picture.shape[1::-1]))
        assert np.abs(picture.astype(int) - original).mean() < 25
        vector = np.load(session.vector(index))
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    with pytest.raises(DatasetError, match="nowhere"):
        opened(tmp_path, "--workdir", scene / "run", "--data", tmp_path / "nowhere").records(1)


def test_an_export(session: Session, scene: Path, tmp_path: Path) -> None:
    export(scene / "run", tmp_path / "export")
    of_export = opened(tmp_path, "--model", tmp_path / "export")
    assert of_export.averages() == ["ema/8"] and of_export.sizes() == session.sizes()
    assert (pixels(drawn(of_export)) == pixels(drawn(session))).all()
    with pytest.raises(RunError, match="--data"):
        of_export.records(1)
    assert opened(tmp_path, "--model", tmp_path / "export", "--data", scene / "ds").records(1)


def test_what_is_no_model_is_refused_at_the_start(scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises((RunError, CheckpointError), match="nowhere"):
        opened(tmp_path, "--workdir", tmp_path / "nowhere")
    shutil.copytree(scene / "run", tmp_path / "empty", ignore=shutil.ignore_patterns("ema", "checkpoints"))
    with pytest.raises(CheckpointError, match=naming("empty", "no weights yet")):
        opened(tmp_path, "--workdir", tmp_path / "empty")
    for wrong in ([], ["--workdir", "a", "--model", "b"], ["--workdir", "a", "--port", "0"]):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)
    assert io.StringIO(capsys.readouterr().err).readlines()[-1].count("--port")
