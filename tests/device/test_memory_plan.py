"""The memory that a run will need: planned before it starts, and held against what there is."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import optax
import pytest
from run_helpers import run_config

from fluxdit_jax.device import devices
from fluxdit_jax.device.memory_plan import MemoryPlan, OutOfMemory, plan, require_fit
from fluxdit_jax.prepared import Prepared
from fluxdit_jax.stages import stages_of
from fluxdit_jax.state import create_state
from fluxdit_jax.train import train

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def config(tiny_dataset, tmp_path):
    return run_config(tiny_dataset, tmp_path / "run")


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_refused_before_it_runs(config):
    config.device_memory_gb, config.model.remat, config.data.micro_batch_size = 0.0005, "block", 2
    with pytest.raises(OutOfMemory) as refusal:
        train(config)
    for words in ("config.device_memory_gb", "0.0005", "f32 weights", "moments", "EMA", "activations"):
        assert words in str(refusal.value)
    assert "no smaller micro-batch" in str(refusal.value), "which it has looked for"
    assert not (Path(config.workdir) / "config.json").exists()


@pytest.mark.parametrize(("batch", "tried"), [(18, [9, 3, 1]), (8, [4, 2, 1]), (5, [1])])
def test_a_smaller_micro_batch_divides_the_global_batch(config, batch, tried):
    config.data.micro_batch_size = config.optim.global_batch_size = batch
    present = Prepared.of(stages_of(config)[0])
    ways = [what for what, _ in present.program.smaller()]
    assert ways[0] == f"--config.data.micro_batch_size={batch} --config.model.remat=block"
    assert ways[1:] == [f"--config.data.micro_batch_size={each} --config.model.remat=block" for each in tried]


def test_a_plan_is_held_against_what_jax_may_take_too():
    found = MemoryPlan({"f32 weights": 10 * 10**9}, 0, 10 * 10**9)
    require_fit(found, 24.0, None, [])
    require_fit(found, 24.0, 23.4, [])
    smaller = ("config.x", lambda: MemoryPlan({}, 0, 18 * 10**9))
    with pytest.raises(OutOfMemory, match=r"20.00 GB .*19.05 GB \(XLA_PYTHON_CL.*config.x.*\b18"):
        require_fit(found, 24.0, 19.05, [smaller])
    with pytest.raises(OutOfMemory, match=r"config.device_memory_gb\D+16"):
        require_fit(found, 16.0, 19.05, [])


def test_a_device_whose_compiler_tells_no_plan_has_one_of_the_state_alone(monkeypatch, caplog):
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)  # as its documentation allows
    optimizer = optax.MultiSteps(optax.sgd(0.1), 2)
    state = create_state({"w": jax.numpy.zeros(256)}, optimizer)
    compiled = jax.jit(lambda state, batch: (state, batch)).lower(state, state.params).compile()
    found = plan([compiled], state, state.params)
    assert (found.parts["f32 weights"], found.batch, found.temporary) == (1024, 1024, 0)
    assert "activations" in caplog.text


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0), ("NVIDIA RTX 6000 Ada Generation", 364.2), ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("cpu", None),
    ],
)  # fmt: skip
def test_a_rate_is_that_of_the_very_chip(kind, peak):
    assert devices.peak_tflops_of(kind) == peak


def test_jax_may_take_most_of_the_memory_unless_told_otherwise(monkeypatch):
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
    for told in (None, *names):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        if told:
            monkeypatch.setenv(told, "0.5")
        devices.use_most_memory()
        assert [os.environ.get(name) for name in names] == {
            None: ["0.92", None], names[0]: ["0.5", None], names[1]: [None, "0.5"],
        }[told]  # fmt: skip
