"""The PyTorch network against the JAX one."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from training_helpers import lively, network_inputs, tiny_model

from fluxdit_jax.exporting.torch_names import torch_arguments, torch_weights
from fluxdit_jax.model import dit
from fluxdit_jax.model.conditions import Condition, given
from fluxdit_jax.portable.modeling_fluxdit import FluxDiT
from fluxdit_jax.sampling.exported import flatten

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")
PORTABLE = Path(dit.__file__).parents[1] / "portable"


def networks(seed=0, **changes):
    """(JAX parameters, the same in PyTorch, config) with nothing at zero."""
    config = tiny_model(**changes)
    params = lively(dit.build(config)[1], seed, scale=0.15)
    model = FluxDiT(**torch_arguments(config))
    weights = {
        name: torch.from_numpy(array) for name, array in torch_weights(flatten(params), config.conditions).items()
    }
    model.load_state_dict(weights, strict=True)
    return params, model.eval(), config


def ours(params, config, inputs):
    keep = {c.name: inputs[f"keep_{c.name}"] for c in config.conditions}
    conditions = given(config.conditions, inputs, keep)
    graph = dit.build(config)[0]
    run = jax.jit(lambda *arguments: dit.apply(graph, *arguments))
    return np.asarray(run(params, inputs["x"], inputs["t"], inputs["grid"], conditions))


def theirs(model, inputs, without=(), grid=None):
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items() if name not in without}
    x, t, places = (tensors.pop(name) for name in ("x", "t", "grid"))
    with torch.no_grad():
        return model(x, t, places if grid is None else grid, tensors).numpy()


def assert_equal(a, b, inputs):
    """The exponentials of both libraries differ in the last bit, and 1,000 times that is in the features of time."""
    for row, (h, w) in enumerate(inputs["grid"]):
        real = a[row, : h * w]
        assert np.abs(real).max() > 0.1
        np.testing.assert_allclose(b[row, : h * w], real, atol=2e-5 * np.abs(a).max())


@pytest.mark.parametrize("changes", [{}, {"positions": "scaled"}, {"patch": 1}, {"width": 48, "heads": 3, "depth": 3}])
def test_mixed_grids_lengths_and_nulls(changes):
    params, model, config = networks(**changes)
    inputs = network_inputs(config, grids=((2, 2), (1, 3), (3, 1), (1, 1)))
    inputs["keep_text"], inputs["keep_vision"] = np.array([[1, 0, 1, 0], [1, 1, 0, 0]], bool)
    assert_equal(ours(params, config, inputs), theirs(model, inputs), inputs)


def test_a_condition_that_is_left_out_is_null():
    params, model, config = networks()
    inputs = network_inputs(config)
    inputs["keep_text"][:] = inputs["keep_vision"][:] = False
    left_out = {"text", "text_length", "keep_text", "vision", "keep_vision"}
    assert_equal(ours(params, config, inputs), theirs(model, inputs, left_out), inputs)


def test_one_size_for_all_needs_no_masks():
    params, model, config = networks()
    inputs = network_inputs(config, grids=((2, 2),) * 3)
    inputs["text_length"][:] = 5
    inputs["text"] = np.random.default_rng(1).normal(size=inputs["text"].shape).astype(np.float32)
    without = {"text_length", "keep_text", "keep_vision"}
    assert_equal(ours(params, config, inputs), theirs(model, inputs, without, (2, 2)), inputs)


def test_a_condition_may_have_the_name_of_a_modules_attribute():
    params, model, config = networks(conditions=(*tiny_model().conditions, Condition("type", 6)))
    inputs = network_inputs(config) | {"type": np.eye(3, 6, dtype=np.float32), "keep_type": np.ones(3, bool)}
    assert_equal(ours(params, config, inputs), theirs(model, inputs), inputs)


def test_further_conditions_and_two_sequences():
    more = (Condition("tags", 12, sequence=True), Condition("pose", 6))
    params, model, config = networks(conditions=(*tiny_model().conditions, *more))
    inputs = network_inputs(config)
    rng, B = np.random.default_rng(3), 3
    inputs |= {
        "tags": rng.normal(size=(B, 4, 12)).astype(np.float32),
        "tags_length": np.array([4, 1, 2], np.int32),
        "keep_tags": np.array([True, True, False]),
        "pose": np.eye(3, 6, dtype=np.float32),
        "keep_pose": np.array([True, False, True]),
    }
    assert_equal(ours(params, config, inputs), theirs(model, inputs), inputs)


def test_padding_changes_nothing():
    _, model, config = networks()
    inputs = network_inputs(config)
    other = {name: array.copy() for name, array in inputs.items()}
    for row, (h, w) in enumerate(inputs["grid"]):
        other["x"][row, h * w :] = 7
        other["text"][row, inputs["text_length"][row] :] = 7
    assert_equal(theirs(model, inputs), theirs(model, other), inputs)


def test_it_is_saved_and_loaded_by_diffusers(tmp_path):
    _, model, config = networks()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    again = FluxDiT.from_pretrained(tmp_path)
    inputs = network_inputs(config)
    np.testing.assert_array_equal(theirs(again.eval(), inputs), theirs(model, inputs))
    half = FluxDiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    made = theirs(half.eval(), inputs)
    assert made.dtype == np.float32
    error = np.sqrt(np.square(made - theirs(model, inputs)).mean()) / theirs(model, inputs).std()
    assert 1e-4 < error < 0.1


def test_a_tensor_without_a_place_is_named():
    params, _, config = networks()
    with pytest.raises(KeyError, match="projector"):
        torch_weights(flatten(params) | {"projector.enter.bias": np.zeros(3, np.float32)}, config.conditions)


def test_it_has_as_many_parameters():
    config = tiny_model()
    model = FluxDiT(**torch_arguments(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == dit.count_parameters(config)


def test_portable_files_need_nothing_of_this_project():
    """They are copied to where it is not; and without a compiler's help they do not load JAX."""
    for path in PORTABLE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("fluxdit_jax", "preprocess", "jax", "flax")], (
                path
            )
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(PORTABLE / "modeling_fluxdit.py")], check=True)
