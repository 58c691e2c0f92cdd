"""Alignment with stored patches: the right patch for every token, the gradient's place, and its end."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from build_fixtures import options, read, write_photos
from PIL import Image
from safetensors.numpy import load_file
from training_helpers import (
    REPOSITORY,
    arguments,
    lively,
    make_batch,
    network_inputs,
    tiny_config,
    tiny_model,
    tiny_optimizer,
    tree_equal,
)
from wording import naming

from fluxdit_jax import alignment, flow
from fluxdit_jax.alignment import AlignmentConfig
from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset import cells
from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.export import export
from fluxdit_jax.gate.requirement import family
from fluxdit_jax.loader import reader
from fluxdit_jax.model import dit
from fluxdit_jax.model.routing import Routed, Routing
from fluxdit_jax.optimizer import build_optimizer
from fluxdit_jax.prepared import Prepared, of_one_image_set
from fluxdit_jax.run.checkpoint import restore_ema
from fluxdit_jax.run.metrics import read_metrics
from fluxdit_jax.sample import sample
from fluxdit_jax.sampling.arguments import parse_arguments
from fluxdit_jax.settings import resolve
from fluxdit_jax.stages import add_stage, stages_of
from fluxdit_jax.state import create_state
from fluxdit_jax.train import train
from fluxdit_jax.train_step import make_train_step, patch_statistics, valid_tokens
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


# ------------------------------------------------------------------------------------------------ the right patch


def test_each_token_has_the_cell_that_covers_its_middle():
    rng = np.random.default_rng(0)
    grids = np.array([(4, 6), (16, 16), (5, 3), (1, 7), (20, 12), (32, 8)], np.int32)
    for _ in range(20):
        wanted = rng.integers(1, 33, (len(grids), 2)).astype(np.int32)
        index = np.stack([rng.permutation(256) % grid.prod() for grid in grids]).astype(np.int32)
        found = np.asarray(alignment.cell_of_token(jnp.asarray(index), jnp.asarray(grids), jnp.asarray(wanted)))
        for row, ((rows, columns), (m, n)) in enumerate(zip(grids, wanted, strict=True)):
            y, x = np.divmod(index[row], columns)
            expected = np.floor((y + 0.5) * m / rows + 1e-9) * n + np.floor((x + 0.5) * n / columns + 1e-9)
            np.testing.assert_array_equal(found[row], expected)


def test_a_target_is_the_patch_less_the_pictures_mean_whatever_stands_in_the_padding():
    rng = np.random.default_rng(1)
    grids, counts = np.array([(4, 4), (2, 6)], np.int32), np.array([(2, 2), (1, 3)], np.int32)
    plain = [rng.normal(size=(n.prod(), 8)).astype(np.float32) * 3 for n in counts]
    rows = np.full((2, 5, 10), 77, np.int8)
    for row, values in enumerate(plain):
        rows[row, : len(values)] = cells.packed(values)
    index = np.stack([rng.permutation(16), np.arange(16)]).astype(np.int32)
    found = alignment.targets(jnp.asarray(rows), jnp.asarray(counts), jnp.asarray(grids), jnp.asarray(index))
    for row, values in enumerate(plain):
        centred = cells.unpacked(rows[row, : len(values)]) - cells.unpacked(rows[row, : len(values)]).mean(axis=0)
        own = grids[row].prod()
        one = (each[row : row + 1] for each in (index, grids, counts))
        place = np.asarray(alignment.cell_of_token(*one))[0]
        real = index[row] < own
        np.testing.assert_allclose(np.asarray(found[row])[real], centred[place[real]], atol=1e-5)
        np.testing.assert_allclose(cells.unpacked(rows[row, : len(values)]), values, atol=0.05)


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


def test_the_loss_in_closed_form():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 2, 5, 7)).astype(np.float32)
    cosines = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    expected = [np.mean(1 - cosines[0, :3]), np.mean(1 - cosines[1])]
    np.testing.assert_allclose(alignment.loss(a, b, np.array([3, 5])), expected, rtol=1e-5)
    gradient = jax.grad(lambda a: alignment.loss(a, jnp.zeros((1, 2, 3)), np.array([2])).sum())(jnp.zeros((1, 2, 3)))
    assert np.isfinite(gradient).all()


# ------------------------------------------------------------------------------------------------ the step


def step_of(depth: int, aligned: AlignmentConfig | None, routing: Routing | None = None, tap: int = 2, **changes):
    """(state, step) of a tiny network; without alignment it has no projector."""
    config = tiny_model(depth=depth, tap=tap if aligned else 0, target_width=6 if aligned else 0, **changes)
    graph, shapes = dit.build(config)
    optimizer = build_optimizer(tiny_optimizer())
    step = make_train_step(
        graph, config, optimizer, flow.FlowConfig(), patch_statistics((0.5,) * 4, (2.0,) * 4, 2), seed=0,
        global_batch_size=4, ema_target=0.99, routing=routing, aligned=aligned,
    )  # fmt: skip
    return create_state(lively(shapes, scale=0.2), optimizer), step


def batch_with_patches() -> dict[str, np.ndarray]:
    rng, batch = np.random.default_rng(3), make_batch()
    batch["cells"] = batch["grid"].copy()
    batch["patches"] = np.zeros((4, 4, 8), np.int8)
    for row, count in enumerate(batch["grid"].prod(axis=1)):
        batch["patches"][row, :count] = cells.packed(rng.normal(size=(count, 6)).astype(np.float32))
    return batch


@pytest.mark.parametrize(("tap", "routing"), [(2, None), (1, Routing(0.5, 1, 1)), (3, Routing(0.5, 1, 1))])
def test_the_gradient_is_only_below_the_tap(quick_compile, routing, tap):
    batch = batch_with_patches()
    state, heavy = step_of(4, AlignmentConfig(weight=3.0), routing, tap)
    grads = jax.jit(heavy.accumulate)(state, batch)[0].opt_state.acc_grads
    without = jax.jit(heavy.plain)(state, batch)[0].opt_state.acc_grads
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(without), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        name = "/".join(str(key.key) for key in path)
        if name.startswith("blocks/"):
            np.testing.assert_allclose(a[tap:], b[tap:], rtol=1e-4, atol=1e-6, err_msg=name)
            assert not np.allclose(a[:tap], b[:tap], rtol=1e-3, atol=1e-6), name
        elif name.startswith("out/"):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)
        elif name.startswith("projector/"):
            assert a.any() and not b.any(), name


AFTER_THE_END = """
from test_alignment import *
state, step = step_of(2, AlignmentConfig(), tap=1)
bare, without = step_of(2, None)
keep = lambda tree: {name: part for name, part in tree.items() if name != "projector"}
bare = bare._replace(params=keep(state.params), ema=keep(state.ema))
batch = batch_with_patches()
for _ in range(3):
    state = jax.jit(step.update)(jax.jit(step.plain)(state, batch)[0])[0]
    bare = jax.jit(without.update)(jax.jit(without.accumulate)(bare, batch)[0])[0]
assert tree_equal(keep(state.params), bare.params) and tree_equal(keep(state.ema), bare.ema)
"""


def test_after_its_end_the_bits_are_those_of_a_run_without():
    """Compiled as for users: with the tests' few optimisations the averages differ in their last bit."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")}
    environment["PYTHONPATH"] = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    if "XLA_FLAGS" in os.environ:  # of conftest.py; in how many parts a program is compiled changes no bit of it
        environment["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
    done = subprocess.run(
        [sys.executable, "-c", AFTER_THE_END], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_logged_cosine_is_that_of_both_gradients_of_the_features(quick_compile):
    """Against the gradients taken apart, with the projector's loss and the flow's alone."""
    rng = np.random.default_rng(5)
    config = tiny_model(depth=3, tap=2, target_width=6)
    graph, shapes = dit.build(config)
    params, inputs = lively(shapes, scale=0.2), network_inputs(config)
    target = rng.normal(size=(3, 4, 16)).astype(np.float32)
    patches = rng.normal(size=(3, 4, 6)).astype(np.float32)
    zeros = jnp.zeros(dit.tap_shape(config, 3, 4))

    def losses(probes):
        velocity, projected = dit.apply(graph, params, *arguments(inputs), probes=probes)
        return jnp.mean((velocity - target) ** 2), jnp.mean(alignment.loss(projected, patches, jnp.full(3, 4)))

    of_flow, own = jax.grad(lambda p: losses(p)[0] + 0.5 * losses(p)[1])((zeros, zeros))
    flow_alone = jax.grad(lambda z: losses((z, zeros))[0])(zeros)
    own_alone = 0.5 * jax.grad(lambda z: losses((zeros, z))[1])(zeros)
    np.testing.assert_allclose(own, own_alone, rtol=1e-4, atol=1e-7)
    expected = np.vdot(flow_alone, own_alone) / np.linalg.norm(flow_alone) / np.linalg.norm(own_alone)
    np.testing.assert_allclose(of_flow, flow_alone, rtol=1e-4, atol=1e-7)
    assert alignment.agreement(of_flow, own) == pytest.approx(expected, rel=1e-3)


def test_features_of_kept_tokens_alone_are_aligned(quick_compile):
    """Inside of the skipped blocks the projector sees the kept tokens, in their order."""
    config = tiny_model(depth=4, tap=2, target_width=6)
    graph, shapes = dit.build(config)
    params, inputs = lively(shapes, scale=0.2), network_inputs(config, grids=((4, 6), (5, 3)), tokens=24)
    routing, grid = Routing(0.5, 1, 1), jnp.asarray(((4, 6), (5, 3)))
    valid = valid_tokens(grid, 24)
    routed = Routed(flow.draw_order(0, jnp.arange(2, dtype=jnp.uint32), valid), routing.kept(grid.prod(1)), routing)
    zeros = jnp.zeros(dit.tap_shape(config, 2, 24, routing))
    assert zeros.shape == (2, 16, 32)
    _, projected = dit.apply(graph, params, *arguments(inputs), routed=routed, probes=(zeros, zeros))
    assert projected.shape == (2, 16, 6)


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


def test_a_micro_batch_in_bfloat16(quick_compile):
    state, step = step_of(4, AlignmentConfig(), Routing(0.5, 1, 1), dtype="bfloat16")
    state, metrics = jax.jit(step.accumulate)(state, batch_with_patches())
    assert not metrics["skipped"] and -1 <= metrics["alignment"]["cosine"] <= 1 and metrics["alignment"]["loss"] > 0


def test_patches_that_are_stored_change_nothing_without_alignment(quick_compile, data: Path, tmp_path, draw_photo):
    photos = write_photos(tmp_path / "photos", 12, draw_photo)
    sides = {"resolution": 256, "resolutions": (128, 256), "modulus": 32, "max_tokens": 8}
    build(options(photos, tmp_path / "plain", **sides))
    for name, directory in (("with", data), ("without", tmp_path / "plain")):
        run(aligned(directory / "128", tmp_path / name, alignment__block=0, train__steps=3))
    assert tree_equal(restore_ema(tmp_path / "with")[1], restore_ema(tmp_path / "without")[1])


# ------------------------------------------------------------------------------------------------ storing


def test_packed_cells_are_close_to_what_was_packed():
    rng = np.random.default_rng(4)
    values = (rng.standard_t(6, size=(300, 1024)) * rng.uniform(0.01, 50, (300, 1))).astype(np.float32)
    rows = cells.packed(values)
    assert rows.dtype == np.int8 and rows.shape == (300, 1026)
    back = cells.unpacked(rows)
    cosine = np.sum(back * values, 1) / np.linalg.norm(back, axis=1) / np.linalg.norm(values, axis=1)
    assert cosine.min() > 0.999
    np.testing.assert_array_equal(back, alignment.unpacked(jnp.asarray(rows)[None])[0])
    assert np.isnan(cells.factors_of(cells.packed(np.full((1, 4), np.nan, np.float32)))).all()
    assert not cells.unpacked(cells.packed(np.zeros((1, 4), np.float32))).any()


def test_a_cell_is_the_mean_over_its_area():
    rng = np.random.default_rng(6)
    patches = rng.normal(size=(6, 9, 5)).astype(np.float32)
    np.testing.assert_allclose(
        cells.pooled(patches, (3, 3)), patches.reshape(3, 2, 3, 3, 5).mean(axis=(1, 3)), atol=1e-6
    )
    np.testing.assert_allclose(cells.pooled(patches, (6, 9)), patches, atol=1e-6)
    np.testing.assert_allclose(cells.pooled(np.ones((7, 5, 2)), (4, 3)), 1, atol=1e-6)
    uneven = cells.pooled(np.arange(3.0).reshape(3, 1, 1), (2, 1))[:, 0, 0]
    np.testing.assert_allclose(uneven, [(0 + 0.5 * 1) / 1.5, (2 + 0.5 * 1) / 1.5], atol=1e-6)


def test_pictures_of_one_shape_have_the_same_cells_at_every_resolution():
    for height, width in ((1024, 1024), (1280, 768), (512, 2048), (896, 1152)):
        grids = {cells.grid_of((height // k, width // k), 1024 // k, 256) for k in (1, 2, 4)}
        assert len(grids) == 1
        ((rows, columns),) = grids
        assert rows == round(height / 64) and columns == round(width / 64)
    assert math.prod(cells.grid_of((1024, 1024), 1024, 1024)) == 1024
