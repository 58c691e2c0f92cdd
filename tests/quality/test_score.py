"""`score` on a trained run, and models of which it is known what they draw: each moves the number that is its own."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import options, write_image
from drawing_helpers import config
from training_helpers import tree_equal
from wording import naming

from fluxdit_jax import score
from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.loader.reader import RecordSource, spread
from fluxdit_jax.model.conditions import Condition
from fluxdit_jax.quality import files
from fluxdit_jax.quality.answers import Amounts, Pupil
from fluxdit_jax.quality.exam import Exam
from fluxdit_jax.quality.exam_file import kept_exam
from fluxdit_jax.quality.eye import STAND_IN, Eye
from fluxdit_jax.quality.scores import judge
from fluxdit_jax.run.continuation import set_aside
from fluxdit_jax.run.metrics import LogError
from fluxdit_jax.run.run_directory import RunError
from fluxdit_jax.run.weights import restore_weights
from fluxdit_jax.sampling.pipeline import besides_captions
from fluxdit_jax.sampling.prompts import SampleError, read_reference
from fluxdit_jax.settings import resolve
from fluxdit_jax.train import train
from fluxdit_jax.vae.decoder import load_decoder
from preprocess.build.build import build

pytest_plugins = ("training_fixtures",)
AMOUNTS = Amounts(with_vector=8, captions=3, drawings=3)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, draw_photo, quick_compile) -> Path:
    """photos/, ds/ with a holdout split, and run/ of a few steps."""
    root = tmp_path_factory.mktemp("score")
    words = ("red", "blue", "old", "small", "green", "tall", "new", "dark")
    for seed in range(150):
        caption = f"<b>{words[seed % 8]}</b> {words[seed // 8 % 8]} picture {seed}"
        write_image(root / "photos" / f"p{seed:03}.png", seed, caption, draw_photo)
    build(options(root / "photos", root / "ds", resolution=64, holdout=0.3, shard_size=200))
    assert train(config(root / "ds", root / "run")) == 0
    return root


@pytest.fixture(scope="module")
def examined(scene: Path):
    """(exam, manifest, decoder, eye, training records, held-out records in the order of the questions)."""
    manifest = load_manifest(scene / "ds")
    holdout, train_split = (RecordSource(scene / "ds", manifest, name) for name in ("holdout", "train"))
    decoder, eye = load_decoder(manifest.vae), Eye.open(manifest)
    exam = Exam.of(holdout, train_split, eye, decoder, count=40, references=200)
    held = [holdout[row] for row in spread(len(holdout), 40)]
    assert [one.caption for one in exam.questions] == [record.caption for record in held]
    return exam, manifest, decoder, eye, list(train_split), held


class Drawer:
    """Stands where the network stands: draws a latent that is a function of the question's row."""

    batch_size = 7

    def __init__(self, exam: Exam, kinds, draw):
        self.conditions, self._draw = kinds, draw
        texts = [question.conditions["text"] for question in exam.questions]
        self._rows = {text.astype(np.float32).tobytes(): row for row, text in enumerate(texts)}

    def cast(self, ema):
        return ema

    def noise(self, seeds):
        return np.array(seeds)

    def latents(self, params, wanted, noise, guidance):
        texts = zip(wanted["text"], wanted["text_length"], strict=True)
        rows = [self._rows[text[:length].astype(np.float32).tobytes()] for text, length in texts]
        return [self._draw(row).astype(np.float32) for row in rows]


def scores_of(examined, scene, draw):
    exam, manifest, decoder, eye, *_ = examined
    settings = resolve(config(scene / "ds", scene / "run"), manifest, 0)
    pupil = Pupil(Drawer(exam, settings.model.conditions, draw), None, decoder, eye, None, 1.0)
    counted = []
    answers = pupil.answer(exam, settings.model.patch, AMOUNTS, counted.append)
    assert sum(counted) == AMOUNTS.pictures(len(exam.questions)) == 40 + 8 + 9
    return judge(exam, answers)


def test_a_perfect_model_has_what_true_pictures_have(examined, scene):
    held = examined[-1]
    found = scores_of(examined, scene, lambda row: held[row].latent)
    for name in ("recall@1", "recall@10", "median rank"):
        assert found.numbers[name].value == found.numbers[name].best["true pictures"]
    likeness = found.numbers["likeness"]
    assert likeness.value == likeness.best["holdout pictures through the VAE"] < 0.3 * min(likeness.worst.values())
    assert found.numbers["recall@1"].value > 0.9 and found.numbers["vector"].value > 0.9 and found.modes == []
    assert found.numbers["vector"].value == pytest.approx(found.numbers["vector"].best["true pictures"])
    assert found.numbers["copies"].value < 0.15 and found.numbers["copies"].worst["training pictures"] > 0.95
    assert found.numbers["diversity"].value == pytest.approx(0, abs=1e-3)  # the same picture at every noise


def test_a_memorising_model_copies(examined, scene):
    records = examined[-2]
    found = scores_of(examined, scene, lambda row: records[row % 30].latent)
    assert found.numbers["copies"].value > 0.9 and found.numbers["copies"].low > 0.8
    assert found.numbers["recall@1"].high < 0.3 and found.numbers["likeness"].value < 20
    assert [examined[0].train[k] for k in found.copies.train[:5]] == [0, 1, 2, 3, 4]


def test_a_collapsed_model_is_one_mode_and_follows_nothing(examined, scene):
    held = examined[-1]
    found = scores_of(examined, scene, lambda row: held[0].latent)
    assert [len(mode.rows) for mode in found.modes] == [40]
    chance = found.numbers["recall@1"].worst["chance"]
    assert found.numbers["recall@1"].value == chance == 1 / 40
    assert found.numbers["likeness"].low > max(found.numbers["likeness"].best.values())


def test_noise_and_flat_pictures_are_not_like_the_dataset(examined, scene):
    held = examined[-1]
    flat = scores_of(examined, scene, lambda row: 0 * held[row].latent.astype(np.float32))
    perfect = scores_of(examined, scene, lambda row: held[row].latent)
    assert flat.numbers["likeness"].low > 10 * abs(perfect.numbers["likeness"].value)
    assert all(np.isfinite(one.value) for one in flat.numbers.values())


def test_a_model_that_knows_half_of_its_captions(examined, scene):
    *_, records, held = examined
    found = scores_of(examined, scene, lambda row: (held if row % 2 else records)[row].latent)
    recall = found.numbers["recall@1"]
    assert recall.low <= 0.5 <= recall.high and recall.worst["another caption's"] < recall.low


# --------------------------------------------------------------------------------------------------- the command


def run(scene: Path, *more: str) -> dict:
    few = ["--steps", "2", "--count", "12", "--with-vector", "4", "--captions", "2", "--drawings", "2"]
    return score.score(score.parse_arguments(["--workdir", str(scene / "run"), *few, *more]))


def test_the_command_writes_the_same_numbers_each_time_and_leaves_the_run_alone(scene, capsys):
    before = restore_weights(scene / "run")
    files = {path for path in (scene / "run").rglob("*") if "score" not in path.parts}
    first = run(scene)
    told = capsys.readouterr().out
    again = run(scene)
    assert first["numbers"] == again["numbers"] and first["questions"] == 12
    folder = scene / "run" / "score"
    assert json.loads((folder / "score.json").read_text())["numbers"]["likeness"]["count"] == 12
    for word in ("Likeness", "recall@1", "Vector followed", "Copies", "Diversity", "holdout pictures", "blurred"):
        assert word in told
    assert first["digest"] == before.digest and tree_equal(before.ema, restore_weights(scene / "run").ema)
    more = {path for path in (scene / "run").rglob("*") if "score" not in path.parts} - files
    assert {path.parent.name for path in more} == {"tensorboard"} and all(path.suffix == ".score" for path in more)


def test_two_runs_are_asked_the_same(scene, tmp_path, capsys):
    """Against its own earlier weights, and against itself, where every difference is 0."""
    itself = run(scene, "--against", str(scene / "run"))
    for name, one in itself["differences"].items():
        assert one["difference"] == 0 and one["error"] == 0 and one["ahead"] == "not told apart", name
    other = run(scene, "--against", str(scene / "run"), "--against-step", "4")
    told = capsys.readouterr().out
    loss = other["differences"]["held-out loss"]
    assert loss["difference"] == pytest.approx(loss["second"] - loss["first"]) and loss["error"] > 0
    assert loss["ahead"] == "first"  # 8 steps against 4
    assert set(other["differences"]) >= {"likeness", "recall@1", "recall@10", "vector", "copies"}
    assert other["first"]["cost"]["tflop"] == pytest.approx(2 * other["second"]["cost"]["tflop"]) and "TFLOP" in told
    folder = scene / "run" / "score"
    assert json.loads((folder / "against.json").read_text())["second"]["step"] == 4
    assert (folder / "against.png").is_file()
    alone = run(scene)["numbers"]["held-out loss"]
    assert alone["value"] == pytest.approx(loss["first"], rel=1e-6) and alone["best"] == {}


def test_two_runs_are_asked_with_one_guidance(scene, tmp_path):
    """That of the first: `log.preview_guidance` may differ between runs that are the same otherwise."""
    shutil.copytree(scene / "run", tmp_path / "run")
    other = json.loads((tmp_path / "run" / "config.json").read_text())
    other["log"]["preview_guidance"] = 4.0
    del other["checksum"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(other))
    found = run(scene, "--against", str(tmp_path / "run"))
    assert found["sampling"]["guidance_text"] == 1.0
    assert found["differences"]["likeness"]["difference"] == 0


def test_runs_of_other_datasets_do_not_compare(scene, tmp_path):
    build(options(scene / "photos", tmp_path / "ds", resolution=64, holdout=0.2))
    assert train(config(tmp_path / "ds", tmp_path / "run")) == 0
    with pytest.raises(RunError, match=naming("other data", tmp_path / "run")):
        run(scene, "--against", str(tmp_path / "run"))


def test_two_captions_are_enough_to_run_and_say_little(scene):
    numbers = run(scene, "--count", "2", "--with-vector", "0", "--captions", "0")["numbers"]
    assert set(numbers) == {"held-out loss", "likeness", "recall@1", "median rank", "copies"}
    assert numbers["recall@1"]["high"] - numbers["recall@1"]["low"] > 0.6


def test_the_page_shows_pairs_and_runs_nothing(scene):
    report = run(scene)
    assert report["step"] == 8
    page = (scene / "run" / "score" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 2 * 12 + 2 * 12
    assert "&lt;b&gt;" in page and "<b>red" not in page and "<script" not in page
    assert re.search(r"default-src 'none'", page)
    for title in ("Likeness of all pictures", "Nearest to a training picture", "Captions and what was drawn for them"):
        assert title in page


def test_scores_of_several_steps_are_curves(scene):
    run(scene)
    run(scene, "--step", "4")
    page = (scene / "run" / "score" / "report.html").read_text()
    assert page.count("over the run; dashed") >= 5
    run(scene, "--step", "4", "--steps", "1")  # in another way: no curve with the others
    assert "over the run; dashed" not in (scene / "run" / "score" / "report.html").read_text()


def scored_while_training(scene, workdir):
    c = config(scene / "ds", workdir)
    c.score.every, c.score.count, c.score.references, c.score.steps = 4, 10, 30, 2
    assert train(c) == 0
    return restore_weights(workdir)


def test_a_run_that_is_scored_trains_to_the_same_bits(scene, tmp_path, package_log):
    weights = scored_while_training(scene, tmp_path / "run")
    assert weights.digest == restore_weights(scene / "run").digest
    folder = tmp_path / "run" / "score"
    assert sorted(path.stem for path in (folder / "steps").iterdir()) == ["4", "8"]
    last = json.loads((folder / "score.json").read_text())
    assert last["step"] == 8 and last["questions"] == 10 and set(last["numbers"]) >= {"likeness", "recall@1", "copies"}
    assert sum("score: likeness" in message for message in package_log) == 2
    assert "over the run; dashed" in (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def without_holdout(scene, tmp_path_factory) -> Path:
    """A dataset of 12 pictures to train on and none besides."""
    directory = tmp_path_factory.mktemp("without_holdout") / "ds"
    build(options(scene / "photos", directory, resolution=64, holdout=0.0, limit=12))
    return directory


def test_a_run_without_what_scoring_needs_goes_on(without_holdout, tmp_path, package_log):
    c = config(without_holdout, tmp_path / "run")
    c.score.every = 4
    assert train(c) == 0 and not (tmp_path / "run" / "score").exists()
    assert any("no score while training" in message and "--holdout" in message for message in package_log)


def test_an_encoder_that_cannot_be_had_is_named_before_training(scene, tmp_path):
    c = config(scene / "ds", tmp_path / "run")
    c.score.every, c.score.vision_encoder = 4, "./nowhere"
    with pytest.raises(ConfigError, match=naming("config.score.vision_encoder", "./nowhere")):
        train(c)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("RESOURCE_EXHAUSTED")])
def test_what_goes_wrong_costs_a_score_and_not_the_run(scene, tmp_path, package_log, monkeypatch, error):
    def fail(report, folder):
        raise error

    monkeypatch.setattr(files, "write", fail)
    assert scored_while_training(scene, tmp_path / "run").digest == restore_weights(scene / "run").digest
    said = [message for message in package_log if "no score of this step" in message]
    assert len(said) == 2 and str(error.args[-1]) in said[0]


def test_scores_beyond_a_step_that_a_run_goes_back_to_are_set_aside(scene, tmp_path):
    scored_while_training(scene, tmp_path / "run")
    folder, names = set_aside(tmp_path / "run", 4, {})
    assert {"score/steps/8.json", "score/score.json", "score/report.html"} <= set(names)
    assert (tmp_path / "run" / "score" / "steps" / "4.json").exists()
    assert (folder / "score" / "steps" / "8.json").exists()
    assert not (tmp_path / "run" / "score" / "report.html").exists()


def test_a_run_with_alignment_is_scored(scene, tmp_path):
    build(options(scene / "photos", tmp_path / "ds", resolution=64, holdout=0.3, vision_patches=256, limit=40))
    c = config(tmp_path / "ds", tmp_path / "run")
    c.alignment.block, c.train.steps = 1, 2
    assert train(c) == 0
    few = ["--steps", "1", "--count", "4", "--with-vector", "0", "--captions", "0"]
    numbers = score.score(score.parse_arguments(["--workdir", str(tmp_path / "run"), *few]))["numbers"]
    assert numbers["held-out loss"]["count"] == 4 and np.isfinite(numbers["likeness"]["value"])


def test_a_caption_is_asked_without_whatever_tells_the_picture():
    kinds = (Condition("text", 8, sequence=True), Condition("vision", 6), Condition("pose", 6))
    assert besides_captions(kinds) == ["vision", "pose"]


def test_a_damaged_log_is_named_before_anything_is_drawn(scene, tmp_path):
    shutil.copytree(scene / "run", tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write("{broken}\n{}\n")
    with pytest.raises(LogError, match="metrics.jsonl"):
        score.score(score.parse_arguments(["--workdir", str(tmp_path / "run")]))


def test_without_a_holdout_split_it_says_what_to_do(without_holdout, tmp_path):
    assert train(config(without_holdout, tmp_path / "run")) == 0
    with pytest.raises(RunError, match=naming("0 records", "holdout split", "--holdout")):
        score.score(score.parse_arguments(["--workdir", str(tmp_path / "run")]))


def test_another_vision_encoder_is_refused(scene, tiny_dino_dir):
    with pytest.raises(SampleError, match=naming("builtin:tone", "--vision-encoder", tiny_dino_dir)):
        run(scene, "--vision-encoder", str(tiny_dino_dir))


# ------------------------------------------------------------------------------------------------------- the eye


def test_an_exam_is_made_once(examined, scene, tmp_path, package_log):
    _, manifest, decoder, eye, *_ = examined
    splits = [RecordSource(scene / "ds", manifest, name) for name in ("holdout", "train")]

    def made(counted, count=6):
        amount = {"count": count, "references": 20, "progress": counted.append}
        return kept_exam(tmp_path, *splits, eye, decoder, vae="None", **amount)

    first, again, other = [], [], []
    exam, same = made(first), made(again)
    assert sum(first) == 26 and again == [] and len(list(tmp_path.glob("exam-*.npz"))) == 1
    for name in ("true", "again", "blurred", "noise", "train_again"):
        np.testing.assert_array_equal(getattr(same, name), getattr(exam, name))
    assert [q.caption for q in same.questions] == [q.caption for q in exam.questions] and same.train == exam.train
    np.testing.assert_array_equal(same.reference.vectors, exam.reference.vectors)
    assert same.reference.within == exam.reference.within
    assert len(made(other, count=5).questions) == 5 and other  # other amounts are another exam
    (path,) = [path for path in tmp_path.glob("exam-*.npz") if np.load(path)["rows"].size == 6]
    path.write_bytes(path.read_bytes()[:100])
    assert len(made(again).questions) == 6 and sum(again) == 26
    assert any("made again" in message for message in package_log)


def test_without_the_datasets_encoder_a_stand_in_looks_at_everything(examined, scene):
    _, manifest, decoder, *_ = examined
    gone = dataclasses.replace(manifest.vision, id="/no/such/encoder", sha256="0" * 64)
    eye = Eye.open(dataclasses.replace(manifest, encoders=manifest.encoders | {"vision": gone}))
    assert not eye.own and STAND_IN in eye.note and "--vision-encoder" in eye.note and "/no/such/encoder" in eye.note
    splits = (RecordSource(scene / "ds", manifest, name) for name in ("holdout", "train"))
    exam = Exam.of(*splits, eye, decoder, count=6, references=20)
    np.testing.assert_array_equal(exam.true, exam.again)  # seen through the VAE, all of them
    assert exam.reference.vectors.shape == (20, 1024)


def test_it_sees_what_build_saw(tmp_path, draw_photo, tiny_vae_dir, tiny_dino_dir):
    """A real encoder at the size of the dataset: the vectors of the pictures themselves are the stored ones."""
    for seed in range(4):
        write_image(tmp_path / "photos" / f"p{seed}.png", seed, "a dog", draw_photo)
    real = {"vae": str(tiny_vae_dir), "vision_encoder": str(tiny_dino_dir), "device": "cpu", "holdout": 0.0}
    build(options(tmp_path / "photos", tmp_path / "ds", resolution=128, **real))
    manifest = load_manifest(tmp_path / "ds")
    eye = Eye.open(manifest)
    assert eye.own and eye.note == ""
    for record in RecordSource(tmp_path / "ds", manifest, "train"):
        pixels = read_reference(tmp_path / "photos" / record.key, manifest)[0]
        np.testing.assert_allclose(eye.vectors([pixels])[0], record.vision, atol=1e-5)


def test_it_is_shown_pictures_of_the_size_that_build_showed(examined, draw_photo):
    manifest = examined[1]
    eye = Eye.open(dataclasses.replace(manifest, vision_resolution=manifest.resolution * 2))
    picture = draw_photo(48, 64, 3)
    assert eye._shown(picture).shape == (96, 128, 3)
    vectors = eye.vectors([picture, draw_photo(64, 48, 4), picture])
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
