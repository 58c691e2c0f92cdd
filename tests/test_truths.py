"""What must hold across modules, on one small run: the same weights, statistics, shift, guidance, sizes, pictures."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from build_fixtures import index, killed_before
from drawing_helpers import pixels
from PIL import Image
from training_helpers import lively, tree_equal, write_dataset
from truth_scene import PREVIEW, SEED, SHIFT, STEPS, Scene, make_run
from wording import naming

from fluxdit_jax import flow, validate
from fluxdit_jax.dataset.grid import GRID_FILE, Place, write_grid
from fluxdit_jax.device.sharding import make_mesh
from fluxdit_jax.export import export
from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.sampler import Sampler
from fluxdit_jax.loader import reader
from fluxdit_jax.model import cost, dit
from fluxdit_jax.model.conditions import Given
from fluxdit_jax.model.patches import patchify
from fluxdit_jax.objective import patch_statistics
from fluxdit_jax.run import weights
from fluxdit_jax.run.averages import restore_ema
from fluxdit_jax.run.checkpoint import EMA, SHORT_EMA
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.run.run_directory import load_config, load_dataset, record_start
from fluxdit_jax.run.validation_loss import ValidationLoss
from fluxdit_jax.sampling import solvers
from fluxdit_jax.sampling.exported import ExportError, read_description
from fluxdit_jax.sampling.pipeline import Generator, conditions, record_conditions
from fluxdit_jax.sampling.preview import make_preview
from fluxdit_jax.sampling.prompts import read_reference
from fluxdit_jax.sampling.sizes import pictures_by_size
from fluxdit_jax.settings import resolve
from fluxdit_jax.shared import image_grid
from fluxdit_jax.vae.decoder import load_decoder
from preprocess.encoders import load_vae

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def scene(tmp_path_factory, draw_photo, quick_compile) -> Scene:
    root = tmp_path_factory.mktemp("truths")
    asked = make_run(root, draw_photo)
    manifest = load_dataset(root / "run")
    return Scene(root, resolve(load_config(root / "run"), manifest), manifest, asked)


def assert_alike(one: np.ndarray, other: np.ndarray) -> None:
    """Equal but for rounding, which a batch of another size may change."""
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 2


# -------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("folder", [EMA, SHORT_EMA])
def test_what_is_kept_is_the_average_of_the_state_and_not_its_weights(scene: Scene, folder: str) -> None:
    average, params = scene.trained(folder), scene.trained("params")
    kept = restore_ema(scene.run, STEPS, folder)[1]
    assert tree_equal(kept, average)
    assert not tree_equal(kept, params)
    assert not tree_equal(scene.trained(EMA), scene.trained(SHORT_EMA))


def test_the_held_out_loss_is_that_of_the_averages_at_any_batch_size(scene: Scene) -> None:
    """8 times of every picture; the larger batch is filled up."""
    losses, filled = {}, 8 * scene.manifest.records("holdout") + 3
    for batch_size in (4, filled):
        measure = ValidationLoss(
            scene.settings.model, scene.settings.flow,
            reader.RecordSource(scene.root / "ds", scene.manifest, "holdout"),
            mesh=make_mesh(1, 1, batch_size), layout=scene.settings.batch,
            statistics=patch_statistics(scene.manifest.latent_mean, scene.manifest.latent_std, 2),
            batch_size=batch_size, pictures=128,
        )  # fmt: skip
        assert measure.pictures == scene.manifest.records("holdout")
        losses[batch_size] = {of: measure(scene.trained(of))["heldout_loss"] for of in (EMA, SHORT_EMA, "params")}
    assert losses[filled] == pytest.approx(losses[4], rel=1e-5)
    logged = {EMA: scene.logged()["heldout_loss"], SHORT_EMA: scene.logged()["short_ema/heldout_loss"]}
    assert logged == pytest.approx({of: losses[4][of] for of in logged}, rel=1e-6)
    assert len({round(loss, 5) for loss in losses[4].values()}) == 3, "they can be told apart"


def test_the_held_out_loss_by_hand(scene: Scene) -> None:
    """Mean square of the velocity's error over a picture's own tokens, both conditions given, at 8 fixed times."""
    s, of = scene.settings, scene.manifest
    records = [record for record in scene.records("holdout") for _ in range(8)]
    wanted = record_conditions(s.model.conditions, records, 2, None)
    mean, std = (np.float32(values)[:, None, None] for values in (of.latent_mean, of.latent_std))
    images = np.zeros((len(records), s.tokens, 64), np.float32)
    for row, record in enumerate(records):
        tokens = patchify((record.latent.astype(np.float32) - mean) / std, 2)
        images[row, : len(tokens)] = tokens
    own = np.arange(s.tokens) < wanted["grid"].prod(1)[:, None]
    quantiles = (np.arange(8, dtype=np.float32) + 0.5) / 8
    t = np.tile(flow.time_at_quantile(s.flow, quantiles), len(records) // 8)
    noise = flow.draw_noise(0, np.arange(2**31, 2**31 + len(records), dtype=np.uint32), images.shape[1:])
    noise = np.where(own[..., None], noise, 0)
    noisy = (1 - t)[:, None, None] * images + t[:, None, None] * noise
    described = {
        "text": Given(wanted["text"], wanted["keep_text"], wanted["text_length"]),
        "vision": Given(wanted["vision"], wanted["keep_vision"]),
    }
    network = jax.jit(partial(dit.apply, dit.build(s.model)[0]))
    predicted = network(scene.trained(EMA), noisy, t, wanted["grid"], described)
    error = np.square(predicted - (noise - images)).mean(2)
    losses = (error * own).sum(1) / own.sum(1)
    assert scene.logged()["heldout_loss"] == pytest.approx(losses.mean(), rel=1e-4)


# ------------------------------------------------------------------------------------------------- pictures


def test_the_preview_is_what_the_command_draws_of_the_holdout(scene: Scene) -> None:
    """The data set's picture, the picture from its caption and photograph, and that of the caption alone."""
    records = scene.records("holdout")
    spread = [records[i] for i in np.linspace(0, len(records) - 1, PREVIEW["count"]).round().astype(int)]
    how = ("--steps", str(PREVIEW["steps"]), "--guidance-text", str(PREVIEW["guidance"]))
    vae, rows = load_vae("builtin:dct"), []
    for seed, record in enumerate(spread):
        photo, _ = read_reference(scene.photo(record), scene.manifest)
        rows.append([vae.decode(vae.encode(photo[None]))[0]])
        rows[-1] += [scene.drawn_as(record, seed, *how, reference=light) for light in (True, False)]
    sheet = image_grid.grid(
        rows,
        column_titles=("data set", "EMA", "EMA, caption alone"),
        row_titles=[record.caption for record in spread],
    )
    assert_alike(pixels(scene.run / "samples" / f"step_{STEPS:07}.png"), np.asarray(sheet))


def test_the_command_the_gate_and_the_export_draw_one_picture(scene: Scene) -> None:
    """Of a picture that is not square, at a time shift that is not 1."""
    record = next(r for r in scene.records("train") if r.encoded_size[0] != r.encoded_size[1])
    generator = Generator.of(scene.settings, scene.manifest, steps=2, batch_size=20, method="rk3")
    sampler = Sampler(generator, restore_ema(scene.run)[1], load_decoder(scene.manifest.vae))
    request = EvalSet((record,), (), 2, seed=9).request(0, 0)
    how = ("--steps", "2", "--method", "rk3")
    drawn = scene.drawn_as(record, 9, *how)
    assert drawn.shape == (*record.encoded_size, 3)
    assert_alike(sampler([request])[0], drawn)
    told = dict(Image.open(scene.root / "x.png").text)

    export(scene.run, scene.root / "exported")
    height, width = record.encoded_size
    again = scene.draw(
        "--prompt", record.caption, "--size", f"{width}x{height}", "--seed", "9", *how,
        "--reference", str(scene.photo(record)), of="--model=exported",
    )  # fmt: skip
    assert_alike(again, drawn)
    assert Image.open(scene.root / "x.png").text["weights_digest"] == told["weights_digest"]


def test_each_prompt_has_its_pictures_and_each_scale_its_place(scene: Scene) -> None:
    """The pictures of a command in order: prompts, their seeds; rows of vision scales, columns of text scales."""
    photo = ("--reference", str(scene.photo(scene.records("train")[0])), "--steps", "1", "--method", "euler")
    first, second = (record.caption for record in scene.records("train")[:2])
    strong = ("--guidance-text", "9", *photo)
    several = scene.draw_all("--prompt", first, "--prompt", second, "--count", "2", "--seed", "3", *strong)
    wanted, wrong = (scene.draw("--prompt", prompt, "--seed", "5", *strong) for prompt in (second, first))
    assert_alike(several[2], wanted)
    assert np.abs(wanted.astype(int) - wrong.astype(int)).max() > 8, "they can be told apart"
    assert len({image.tobytes() for image in several}) == 4
    guided = ("--prompt", first, "--guidance-text", "4", "--guidance-vision", "2", *photo)
    single = scene.draw(*guided)
    assert (scene.draw(*guided, "--rescale", "0.7") != single).any()
    swept = scene.draw_all("--prompt", first, "--sweep-text", "1,4", "--sweep-vision", "1,2,3", *photo)
    assert len({image.tobytes() for image in swept}) == 6
    assert_alike(swept[3], single)
    expected = image_grid.grid(
        [swept[0:2], swept[2:4], swept[4:6]], cell=256, column_titles=["text 1", "text 4"],
        row_titles=[f"vision {scale}, seed 0: {first}" for scale in (1, 2, 3)],
    )  # fmt: skip
    np.testing.assert_array_equal(pixels(scene.root / "x.png"), np.asarray(expected))


def test_an_export_describes_the_run(scene: Scene) -> None:
    export(scene.run, scene.root / "described")
    found, of = json.loads((scene.root / "described" / "config.json").read_text()), scene.manifest
    assert (found["latent_mean"], found["latent_std"]) == (list(of.latent_mean), list(of.latent_std))
    assert found["latent_mean"] != found["latent_std"]
    assert found["flow"] == {
        "shift": SHIFT, "prediction": "velocity", "time": "1 is noise, 0 is the image",
        "drop": "all 0.1, text 0.1, vision 0.2",
    }  # fmt: skip
    assert (found["fit"], found["modulus"], found["resolution"]) == (of.fit, of.modulus, of.resolution)
    assert (found["tokens"], found["text_tokens"]) == (scene.settings.tokens, scene.settings.text_tokens)
    held: dict[tuple[int, int], int] = dict.fromkeys(of.buckets, 0)
    for record in scene.records("train"):
        held[record.encoded_size] += 1
    assert {(size["height"], size["width"]): size["pictures"] for size in found["sizes"]} == held
    settings, again, _ = read_description(scene.root / "described")
    for name in ("fit", "modulus", "resolution", "latent_mean", "latent_std", "vae", "text", "vision", "text_tokens"):
        assert getattr(again, name) == getattr(of, name), name
    for name in ("model", "tokens", "text_tokens", "text_limit"):
        assert getattr(settings, name) == getattr(scene.settings, name), name
    assert list(pictures_by_size(again).items()) == list(pictures_by_size(of).items())


def test_an_export_of_an_earlier_version_is_the_same(scene: Scene) -> None:
    export(scene.run, scene.root / "earlier")
    path = scene.root / "earlier" / "config.json"
    now = json.loads(path.read_text())
    before = now | {
        "model": now["model"] | {"channels": 16, "text_width": 1024, "vision_width": 1024},
        "flow": now["flow"] | {"drop_text": 0.1, "drop_vision": 0.2, "drop_both": 0.1},
        "longest_caption": scene.manifest.text_tokens,
    }
    del before["flow"]["drop"], before["longest"], before["model"]["positions"], before["vision_resolution"]
    expected = read_description(scene.root / "earlier")
    path.write_text(json.dumps(before))
    assert read_description(scene.root / "earlier") == expected


def test_the_gate_measures_the_weights_that_are_exported(scene: Scene) -> None:
    quick = ["--limit=4", "--pairs=2", "--edits=2", "--steps=1", "--method=euler"]
    assert validate.command(["--workdir", str(scene.run), *quick]) == 1
    report = json.loads((scene.run / "validation" / "report.json").read_text())
    export(scene.run, scene.root / "gated")
    described = json.loads((scene.root / "gated" / "config.json").read_text())
    assert report["weights"]["digest"] == described["weights"]["digest"] == weights.restore_weights(scene.run).digest
    assert (report["weights"]["ema_step"], report["weights"]["folder"]) == (described["ema_step"], EMA)
    assert report["dataset"]["shards_sha256"] == [shard.sha256 for shard in scene.manifest.shards["train"]]


def test_the_short_average_is_drawn_and_exported_if_asked_for(scene: Scene) -> None:
    record = scene.records("train")[0]
    how = ("--steps", "1", "--method", "euler")
    usual = scene.drawn_as(record, 0, *how)
    short = scene.drawn_as(record, 0, *how, "--weights", SHORT_EMA)
    assert (usual != short).any()
    digest = tree_digest(scene.trained(SHORT_EMA))
    assert Image.open(scene.root / "x.png").text["weights_digest"] == digest
    export(scene.run, scene.root / "short", folder=SHORT_EMA)
    about = read_description(scene.root / "short")[2]
    assert about == {"step": STEPS, "folder": SHORT_EMA, "digest": digest}


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "config.json"])
def test_an_export_that_is_killed_is_none(scene: Scene, name: str) -> None:
    """New weights are never beside the description of others."""
    out = scene.root / f"killed {name}"
    export(scene.run, out, step=4)
    with killed_before(out / name):
        export(scene.run, out, step=STEPS)
    with pytest.raises(ExportError, match=f"{out / 'config.json'}.*exist"):
        read_description(out)


def test_the_gate_wants_the_data_set_of_the_run(scene: Scene, tmp_path: Path, capsys) -> None:
    write_dataset(tmp_path / "other")
    assert validate.command(["--workdir", str(scene.run), "--data", str(tmp_path / "other")]) == 2
    assert re.search(naming(tmp_path / "other", scene.run, "--data"), capsys.readouterr().err)


def test_a_run_that_cuts_its_captions_shows_and_measures_them_cut(scene: Scene, tmp_path: Path, monkeypatch) -> None:
    c = load_config(scene.run)
    c.data.text_tokens = 4
    settings = resolve(c, scene.manifest)
    assert settings.text_limit == 4
    preview = make_preview(scene.root / "ds", scene.manifest, settings, count=2, steps=1, guidance=1.0, vae=None)
    assert all((column["text_length"] == 4).all() for column in preview._columns.values())

    record_start(tmp_path, c, scene.manifest)
    shutil.copytree(scene.run / "ema", tmp_path / "ema")
    shutil.copytree(scene.root / "ds", tmp_path / "ds")
    records = scene.records("train")  # two and two are called the views of a photograph, so that edits are asked for
    write_grid(
        tmp_path / "ds" / GRID_FILE, {r.key: Place(str(k // 2), "ab"[k % 2], "l") for k, r in enumerate(records)}
    )
    lengths, captions, draw = set(), set(), validate.draw

    def listen(sampler, requests) -> int:
        lengths.update(len(one.conditions["text"]) for one in requests if "text" in one.conditions)
        captions.update(one.caption for one in requests)
        return draw(sampler, requests)

    monkeypatch.setattr(validate, "draw", listen)
    quick = ["--edits=4", "--unrelated=dog=>cat", "--steps=1", "--method=euler"]
    assert validate.command(["--workdir", str(tmp_path), "--data", str(tmp_path / "ds"), *quick]) == 1
    assert lengths == {4} and any("cat" in caption for caption in captions)


# ----------------------------------------------------------------------------------------------- conditions


def test_a_condition_that_is_not_given_is_the_learned_null(scene: Scene) -> None:
    ema = lively(restore_ema(scene.run)[1], scale=0.1)
    other = {name: jax.tree.map(lambda leaf: leaf + 1, ema[name]) for name in ("null_text", "null_vision")}
    records = [r for r in scene.records("train") if r.encoded_size[0] < r.encoded_size[1]][:2]
    kinds = scene.settings.model.conditions
    both = record_conditions(kinds, records, 2, None)
    grids = [tuple(grid) for grid in both["grid"]]
    caption = conditions(kinds, [{"text": r.text, "vision": None} for r in records], grids)
    nothing = conditions(kinds, [{"text": r.text[:0]} for r in records], grids)
    generator = scene.generator()
    noise = generator.noise([1, 2])

    def draw(wanted, text=1.0, vision=1.0, **changed) -> np.ndarray:
        scales = solvers.Guidance({"text": text, "vision": vision})
        latents = generator.latents(generator.cast(ema | changed), wanted, noise, guidance=scales)
        return np.concatenate([latent.ravel() for latent in latents])

    of_both, of_caption, of_nothing = map(draw, (both, caption, nothing))
    for wanted, plain, nulls in (
        (both, of_both, ()), (caption, of_caption, ("null_vision",)), (nothing, of_nothing, tuple(other)),
    ):  # fmt: skip
        for name, null in other.items():
            assert np.array_equal(draw(wanted, **{name: null}), plain) == (name not in nulls)
    # guidance: none + text (caption - none) + vision (both - caption)
    for scales, expected in (((0, 0), of_nothing), ((1, 0), of_caption), ((1, 1.0000001), of_both)):
        np.testing.assert_allclose(draw(both, *scales), expected, atol=1e-4)


def test_padding_and_neighbours_change_no_picture(scene: Scene) -> None:
    """A text padded further, and a picture in another batch, with other sizes and longer texts beside it."""
    ema = lively(restore_ema(scene.run)[1], scale=0.1)
    records = sorted(scene.records("train"), key=lambda r: len(r.text))
    chosen = [records[0], records[-1], next(r for r in records if r.encoded_size != records[0].encoded_size)]
    assert len({len(r.text) for r in chosen}) > 1
    generator, longer = scene.generator(), scene.generator(lengths={"text": 4 * scene.settings.text_tokens})
    described = partial(record_conditions, scene.settings.model.conditions, patch=2, text_limit=None)
    noise = generator.noise([0, 1, 2])
    together = generator.latents(generator.cast(ema), described(chosen), noise)
    padded = longer.latents(longer.cast(ema), described(chosen), noise)
    for row, record in enumerate(chosen):
        (alone,) = generator.latents(generator.cast(ema), described([record]), generator.noise([row]))
        assert alone.shape == record.latent.shape
        np.testing.assert_allclose(together[row], alone, atol=1e-4)
        np.testing.assert_allclose(padded[row], alone, atol=1e-4)


# ------------------------------------------------------------------------------------------ order and splits


def test_a_run_reads_the_train_split_in_the_order_of_its_seed(scene: Scene) -> None:
    def order(seed: int) -> list[bytes]:
        source = reader.RecordSource(scene.root / "ds", scene.manifest, "train")
        s = scene.settings
        read = reader.batches(
            source, seed=seed, start=0, batch_size=4, layout=s.batch, threads=1, prefetch=1,
        )  # fmt: skip
        return [batch["vision"].tobytes() for batch in itertools.islice(read, len(scene.batches))]

    asked = [batch["vision"].tobytes() for batch in scene.batches]
    assert asked == order(SEED) and asked != order(0)
    assert np.concatenate([b["index"] for b in scene.batches]).tolist() == list(range(4 * len(asked)))
    trained = {row.tobytes() for batch in scene.batches for row in batch["vision"]}
    assert trained == {r.vision.tobytes() for r in scene.records("train")}
    assert not trained & {r.vision.tobytes() for r in scene.records("holdout")}


def test_copies_of_a_picture_are_in_one_split(scene: Scene) -> None:
    rows = index(scene.root / "ds")
    splits = {row["key"]: row["split"] for row in rows}
    copies = [key for key in splits if "_copy" in key]
    assert len(rows) == 25 and len(copies) == 5
    assert all(splits[key] == splits[key.replace("_copy", "")] for key in copies)
    hashes = {split: {r.content_hash for r in scene.records(split)} for split in ("train", "holdout")}
    assert not hashes["train"] & hashes["holdout"] and hashes["holdout"]


# ------------------------------------------------------------------------------------------------- numbers


def test_the_rates_agree_with_each_other(scene: Scene) -> None:
    logged, s = scene.logged(), scene.settings
    assert s.text_tokens == 16 > scene.manifest.text_tokens > 8
    flops = 3 * cost.flops_per_sample(s.model, s.tokens, {"text": s.text_tokens})  # forward once, backward twice
    peak = 2e12 * len(jax.devices())
    assert logged["mfu"] == pytest.approx(logged["tokens_per_second"] * flops / s.tokens / peak)
    grids = [r.encoded_size[0] * r.encoded_size[1] // 256 for r in scene.records("train")]
    share = logged["tokens_per_second"] / logged["images_per_second"]
    assert min(grids) <= share <= max(grids)
