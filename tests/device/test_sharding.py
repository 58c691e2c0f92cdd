"""Meshes: where arrays lie, and that the same run comes out on 1, 2 and 4 devices and on 2 processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from training_helpers import (
    REPOSITORY,
    make_batch,
    tiny_config,
    tiny_model,
    tiny_optimizer,
    write_config,
    write_dataset,
)
from wording import lines_naming

from fluxdit_jax.device.sharding import MeshError, batch_sharding, make_mesh, put_batch, replicated, tree_sharding
from fluxdit_jax.model import dit
from fluxdit_jax.optimizer import build_optimizer
from fluxdit_jax.run.averages import restore_ema
from fluxdit_jax.run.metrics import read_metrics
from fluxdit_jax.state import create_state

pytest_plugins = ("training_fixtures",)


def mesh_of(data, fsdp):
    """A mesh without devices, enough to decide where arrays would lie."""
    return jax.sharding.AbstractMesh((data, fsdp), ("data", "fsdp"))


# ------------------------------------------------------------------------------------------------ decisions


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((256, 512), PartitionSpec(None, "fsdp")),
        ((512, 256), PartitionSpec("fsdp", None)),
        ((4, 128, 64), PartitionSpec(None, "fsdp", None)),
        ((512, 511), PartitionSpec("fsdp", None)),  # the largest axis that divides
        ((129, 255), PartitionSpec()),  # none divides
        ((4, 8), PartitionSpec()),  # too small to be worth it
        ((2**20,), PartitionSpec()),  # a vector
        ((), PartitionSpec()),
    ],
)
def test_large_matrices_are_split_and_the_rest_is_copied(shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    assert tree_sharding(mesh_of(2, 4), {"a": leaf})["a"].spec == spec
    assert tree_sharding(mesh_of(8, 1), {"a": leaf})["a"].spec == PartitionSpec()


def test_masters_moments_and_ema_of_a_parameter_lie_alike():
    optimizer = build_optimizer(tiny_optimizer())
    shapes = dit.build(tiny_model(width=64))[1]
    state = jax.eval_shape(lambda params: create_state(params, optimizer), shapes)
    placed = tree_sharding(mesh_of(1, 2), state)
    trees = [placed.params, placed.ema, placed.opt_state.acc_grads, placed.opt_state.inner_opt_state[2][0].mu]
    for alike in zip(*(jax.tree.leaves(tree) for tree in trees), strict=True):
        assert len(set(alike)) == 1
    split = [s for s in jax.tree.leaves(placed.params) if s.spec != PartitionSpec()]
    assert len(split) >= 4


def test_the_batch_is_split_over_all_devices():
    assert batch_sharding(mesh_of(2, 4)).spec == PartitionSpec(("data", "fsdp"))
    assert replicated(mesh_of(2, 4)).spec == PartitionSpec()


def test_a_batch_arrives_as_it_is():
    mesh, batch = make_mesh(-1, 1, 4), make_batch()
    for name, array in put_batch(mesh, batch).items():
        assert array.dtype == batch[name].dtype
        np.testing.assert_array_equal(np.asarray(array), batch[name])


def test_one_device_is_a_mesh_of_one():
    mesh = make_mesh(-1, 1, 3)
    assert isinstance(mesh, Mesh) and dict(mesh.shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1, 2, 4), ["data=1 x fsdp=2", "there are 1"]),
        ((4, 1, 4), ["data=4 x fsdp=1", "there are 1"]),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_told(arguments, words):
    with pytest.raises(MeshError) as refusal:
        make_mesh(*arguments)
    for word in words:
        assert word in str(refusal.value)


# ------------------------------------------------------------------------------------------------ four fake devices

LAYOUTS = ((1, 1), (1, 2), (2, 2))

SCRIPT = """
import dataclasses
import sys
import jax, numpy as np
from jax.sharding import Mesh
from pathlib import Path
from training_helpers import *
from fluxdit_jax.run.checkpoint import Checkpoints
from fluxdit_jax.settings import resolve
from fluxdit_jax.alignment import AlignmentConfig
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.program import Program
from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.device.sharding import make_mesh, put_batch, gather
from fluxdit_jax.objective import patch_statistics

dataset, scratch = Path(sys.argv[1]), Path(sys.argv[2])
layouts = [tuple(map(int, name.split("x"))) for name in sys.argv[3:]]
assert len(jax.devices()) == 4
config = tiny_config(dataset, scratch)
config.model.width, config.flow.drop = 64, 'all 0.1, text 0.2, vision 0.3'
config.routing.share, config.routing.first, config.routing.last = 0.5, 0, 1
config.data.micro_batch_size, config.optim.global_batch_size = 8, 16
manifest = load_manifest(dataset)
settings = resolve(config, manifest)
layout = settings.batch
settings = dataclasses.replace(
    settings,
    model=dataclasses.replace(settings.model, tap=1, target_width=6),
    alignment=AlignmentConfig(),
    batch=dataclasses.replace(
        layout, widths=layout.widths | {"patches": 8}, lengths=layout.lengths | {"patches": 4}, cell=8.0
    ),
)
statistics = patch_statistics(manifest.latent_mean, manifest.latent_std, 2)

def mesh_of(data, fsdp):
    if data * fsdp == 4:
        return make_mesh(data, fsdp, 8)
    return Mesh(np.asarray(jax.devices()[: data * fsdp]).reshape(data, fsdp), ("data", "fsdp"))

results, programs, states = {}, {}, {}
for layout in layouts:
    mesh = mesh_of(*layout)
    program = programs[layout] = Program(settings, mesh, statistics)
    (accumulate, update, _), state = program.compile(), program.create()
    losses, norms = [], []
    for number in range(6):
        batch = make_batch(size=8, first_index=8 * number)
        batch["cells"] = batch["grid"].copy()
        batch["patches"] = np.random.default_rng(number).integers(-9, 9, (8, 4, 8)).astype(np.int8)
        batch["patches"][..., 6:] = np.full((8, 4, 1), 0.1, np.float16).view(np.int8)
        batch["patches_length"] = batch["grid"].prod(axis=1).astype(np.int32)
        batch["text"] = np.pad(batch["text"], ((0, 0), (0, 3), (0, 0)))
        state, values = accumulate(state, put_batch(mesh, batch))
        losses.append(np.asarray(values))
        if number % 2:
            state, values = update(state)
            norms.append(np.asarray(values))
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract)):
        assert leaf.sharding == wanted.sharding
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    assert (split > 10) == (layout[1] > 1), (layout, split)
    results[layout], states[layout] = (np.concatenate([*losses, *norms]), jax.device_get(gather(state.ema))), state

one = results[layouts[0]]
for layout, (losses, ema) in results.items():
    np.testing.assert_allclose(losses, one[0], rtol=2e-4, atol=2e-5, err_msg=str(layout))
    for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(one[1])):
        np.testing.assert_allclose(a, b, atol=2e-3, err_msg=str(layout))

# a checkpoint of any layout restores on any other, to the bit
for written in layouts:
    workdir = scratch / "x".join(map(str, written))
    with Checkpoints(workdir, 1) as checkpoints:
        checkpoints.save(3, states[written], {"samples": 48})
        checkpoints.save_ema(3, states[written].ema)
        checkpoints.poll(wait=True)
        assert checkpoints.failures == 0
        for read in layouts:
            state, meta = checkpoints.restore(programs[read].abstract)
            assert meta == {"samples": 48}
            assert tree_digest(state) == tree_digest(states[written])
            assert tree_equal(jax.device_get(gather(state.params)), jax.device_get(gather(states[written].params)))
            for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(programs[read].abstract)):
                assert leaf.sharding == wanted.sharding
print("same on", *results)
"""


def on_four_devices(tmp_path, layouts):
    write_dataset(tmp_path / "data")
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
    }
    names = ["x".join(map(str, layout)) for layout in layouts]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "data"), str(tmp_path / "runs"), *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("same on")


@pytest.mark.slow
def test_the_same_loss_on_1_2_and_4_devices_and_checkpoints_move_between_them(tmp_path):
    on_four_devices(tmp_path, LAYOUTS)


# ------------------------------------------------------------------------------------------------ two processes


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start_two(train_command, config_file):
    coordinator = f"localhost:{free_port()}"
    return [
        train_command.start(
            f"--config.mesh.coordinator={coordinator}",
            "--config.mesh.num_processes=2",
            f"--config.mesh.process_id={process}",
            config=config_file,
        )
        for process in range(2)
    ]


def losses_of(workdir, name="loss"):
    return {entry["step"]: entry[name] for entry in read_metrics(Path(workdir) / "metrics.jsonl") if name in entry}


@pytest.mark.slow
def test_two_processes_are_one_run(train_command, tiny_dataset, tmp_path):
    """The same losses as one process; a signal to one stops both; one process can go on where two stopped."""
    config = tiny_config(tiny_dataset, tmp_path / "one")
    config.train.steps, config.log.heldout_every = 24, 4
    done = train_command.run(config=write_config(tmp_path / "one.py", config))
    assert done.returncode == 0, done.stderr

    config.workdir = str(tmp_path / "two")
    config.checkpoint.minutes = 0.02
    file = write_config(tmp_path / "two.py", config)
    both = start_two(train_command, file)
    metrics = tmp_path / "two" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 10):
        assert all(process.poll() is None for process in both), both[0].communicate()
        time.sleep(0.02)
    both[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in both]
    for process, (_, err) in zip(both, outputs, strict=True):
        assert process.returncode == 128 + signal.SIGTERM, err
    assert lines_naming(outputs[0][1], "another process", "saved")

    done = train_command.run(config=file)
    assert done.returncode == 0, done.stderr
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert one.keys() == two.keys() == set(range(1, 25))
    for step in range(1, 10):
        assert two[step] == pytest.approx(one[step], rel=2e-4), step
    assert np.mean(list(two.values())) == pytest.approx(np.mean(list(one.values())), rel=0.02)
    assert restore_ema(tmp_path / "two")[0] == 24
    heldout = [losses_of(tmp_path / name, "heldout_loss")[4] for name in ("one", "two")]
    assert heldout[1] == pytest.approx(heldout[0], rel=1e-3)
