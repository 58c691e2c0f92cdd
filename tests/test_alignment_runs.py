"""Runs with alignment: the cells of every picture, the end, stages, export, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from build_fixtures import options, read, write_photos
from PIL import Image
from safetensors.numpy import load_file
from training_helpers import tiny_config, tree_equal
from wording import naming

from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset import cells
from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.export import export
from fluxdit_jax.gate.requirement import family
from fluxdit_jax.loader import reader
from fluxdit_jax.prepared import Prepared, of_one_image_set
from fluxdit_jax.run.averages import restore_ema
from fluxdit_jax.run.metrics import read_metrics
from fluxdit_jax.sample import sample
from fluxdit_jax.sampling.arguments import parse_arguments
from fluxdit_jax.settings import resolve
from fluxdit_jax.stages import add_stage, stages_of
from fluxdit_jax.train import train
from preprocess.build.build import build

pytest_plugins = ("training_fixtures",)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, draw_photo) -> Path:
    """Photographs of several shapes at 128 and 256 px, with 256 cells."""
    folder = tmp_path_factory.mktemp("alignment")
    photos = write_photos(folder / "photos", 12, draw_photo)
    sides = {"resolution": 256, "resolutions": (128, 256), "modulus": 32, "max_tokens": 8}
    build(options(photos, folder / "data", vision_patches=256, **sides))
    return folder / "data"


def aligned(data: Path, workdir: Path, **changes):
    c = tiny_config(data, workdir)
    c.model.depth, c.train.steps, c.checkpoint.ema_every = 3, 8, 100
    c.alignment.block, c.alignment.until, c.flow.drop = 2, 5, "all 0.1, text 0.2, vision 0.2"
    for key, value in changes.items():
        group, _, last = key.partition("__")
        c[group][last] = value
    return c


def test_every_resolution_and_bucket_has_the_cells_of_its_picture(data: Path):
    """What training takes for the token at a place is what the encoder says of that place."""
    small, large = (read(data / side) for side in ("128", "256"))
    for key, record in large.items():
        assert np.array_equal(record.conditions["patches"], small[key].conditions["patches"])
    shapes = set()
    for side, records in (("128", small), ("256", large)):
        manifest = load_manifest(data / side)
        settings = resolve(aligned(data / side, data), manifest)
        batch = reader.collate(records.values(), list(range(len(records))), settings.batch)
        for row, record in enumerate(records.values()):
            m, n = batch["cells"][row]
            shapes.add((int(m), int(n)))
            assert (m, n) == cells.grid_of(record.encoded_size, manifest.resolution, 256)
            assert batch["patches_length"][row] == m * n
            assert np.array_equal(batch["patches"][row, : m * n], record.conditions["patches"])
            assert not batch["patches"][row, m * n :].any()
            assert tuple(batch["grid"][row] * (2 if side == "128" else 1)) == (m, n)
    assert len(shapes) > 1


# ------------------------------------------------------------------------------------------------ runs


def run(config, expected: int = 0) -> None:
    assert train(config.copy_and_resolve_references()) == expected


def test_a_run_is_the_same_interrupted_before_and_after_the_end(quick_compile, data: Path, tmp_path, monkeypatch):
    """Each logged step has the alignment's loss until its last, and the weights of a run that was stopped twice."""
    whole = aligned(data / "128", tmp_path / "whole")
    run(whole)
    original, count = reader.batches, [0]

    def batches(*given, **more):
        for batch in original(*given, **more):
            count[0] += 1
            if count[0] in (5, 14):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    stopped = aligned(data / "128", tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(reader, "batches", batches)
        run(stopped, 128 + signal.SIGTERM)
        run(stopped, 128 + signal.SIGTERM)
    run(stopped)
    logged = []
    for name in ("whole", "stopped"):
        entries = read_metrics(tmp_path / name / "metrics.jsonl")
        logged.append([{k: v for k, v in e.items() if "alignment" in k or k in ("loss", "step")} for e in entries])
    assert logged[0] == logged[1]
    for entry in (entry for entry in logged[0] if "loss" in entry):
        assert ("alignment_loss" in entry) == (entry["step"] <= 5) == ("alignment_cosine" in entry)
    assert tree_equal(restore_ema(tmp_path / "whole")[1], restore_ema(tmp_path / "stopped")[1])


def test_the_projector_is_not_exported_and_pictures_are_the_same(quick_compile, data: Path, tmp_path):
    c = aligned(data / "128", tmp_path / "run", train__steps=2)
    run(c)
    assert "projector" in restore_ema(tmp_path / "run")[1]
    path = export(tmp_path / "run", tmp_path / "out")
    assert not [name for name in load_file(path) if "projector" in name]
    description = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "patches" not in description["encoders"] and "patches" not in description["longest"]
    run_, out = ["--workdir", str(tmp_path / "run")], ["--model", str(tmp_path / "out")]
    drawn = [tmp_path / f"{number}.png" for number in range(4)]
    for source, path in ((run_, drawn[0]), (out, drawn[1])):
        sample(parse_arguments([*source, "--prompt", "a dog", "--steps", "2", "--out", str(path)]))
    for source, recipe, path in ((out, drawn[0], drawn[2]), (run_, drawn[1], drawn[3])):
        sample(parse_arguments([*source, "--recipe", str(recipe), "--out", str(path)]))
    for path in drawn[1:]:
        np.testing.assert_array_equal(Image.open(path), Image.open(drawn[0]))


def test_a_dataset_without_patches_is_refused_by_name(tiny_dataset, tmp_path):
    with pytest.raises(ConfigError, match=naming("alignment.block", "--vision-patches")):
        run(aligned(tiny_dataset, tmp_path / "run"))


def test_a_run_is_healthy_after_the_end(quick_compile, data: Path, tmp_path):
    """The projector gets no gradient then, which is no diagnosis."""
    c = aligned(data / "128", tmp_path / "run", train__steps=130, health__action="stop")
    c.log.heldout_every = 0
    run(c)
    assert "dead_parameters" not in (tmp_path / "run" / "train.log").read_text()


def test_weights_go_to_a_run_with_and_without_alignment(quick_compile, data: Path, tmp_path):
    run(aligned(data / "128", tmp_path / "plain", alignment__block=0, train__steps=1))
    for name, block, other in (("with", 2, "plain"), ("again", 0, "with")):
        c = aligned(data / "128", tmp_path / name, alignment__block=block, train__steps=1)
        c.resume.from_run = str(tmp_path / other)
        run(c)
    assert "projector" in restore_ema(tmp_path / "with")[1] and "projector" not in restore_ema(tmp_path / "again")[1]


def test_the_gate_of_a_run_without_alignment_speaks_for_one_with(data: Path, tmp_path):
    manifest = load_manifest(data / "128")
    plain, tapped = (resolve(aligned(data, tmp_path, alignment__block=k), manifest).model for k in (0, 2))
    assert tapped.tap == 2 and family(plain) == family(tapped)


def test_alignment_ends_in_a_stage_and_later_ones_read_no_patches(quick_compile, data: Path, tmp_path):
    c = aligned(data, tmp_path / "run", alignment__until=2, optim__warmup_steps=0)
    for name, side in (("small", 128), ("large", 256)):
        add_stage(c, name, {"data.resolution": side, "train.steps": 3, "routing.share": 0.5})
    c.routing.first, c.routing.last = 1, 1
    small, large = map(Prepared.of, stages_of(c))
    assert small.settings.alignment is not None and "patches" in small.settings.batch.widths
    assert large.settings.alignment is None and "patches" not in large.settings.batch.widths
    run(c)
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {e["step"] for e in entries if "alignment_loss" in e} == {1, 2}


def test_stages_of_which_one_has_patches(data: Path, tmp_path, draw_photo):
    photos = write_photos(tmp_path / "photos", 12, draw_photo)
    build(options(photos, tmp_path / "data", resolution=256, resolutions=(128, 256), modulus=32, max_tokens=8))
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "128").symlink_to(data / "128")
    (tmp_path / "both" / "256").symlink_to(tmp_path / "data" / "256")
    c = aligned(tmp_path / "both", tmp_path / "run", alignment__block=0, optim__warmup_steps=0)
    for name, side in (("small", 128), ("large", 256)):
        add_stage(c, name, {"data.resolution": side, "train.steps": 1})
    assert of_one_image_set([Prepared.of(stage) for stage in stages_of(c)]) == ""
    c.alignment.block = 2
    with pytest.raises(ConfigError, match=naming("alignment.block", "256", "--vision-patches")):
        run(c)


def test_patches_that_are_stored_change_nothing_without_alignment(quick_compile, data: Path, tmp_path, draw_photo):
    photos = write_photos(tmp_path / "photos", 12, draw_photo)
    sides = {"resolution": 256, "resolutions": (128, 256), "modulus": 32, "max_tokens": 8}
    build(options(photos, tmp_path / "plain", **sides))
    for name, directory in (("with", data), ("without", tmp_path / "plain")):
        run(aligned(directory / "128", tmp_path / name, alignment__block=0, train__steps=3))
    assert tree_equal(restore_ema(tmp_path / "with")[1], restore_ema(tmp_path / "without")[1])
