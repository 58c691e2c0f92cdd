"""What the benchmarks' conclusions rest on: the baseline is run as the model is, and its FLOPs are counted alike."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
from flops import product_flops
from training_helpers import arguments, network_inputs, tiny_model

from benchmarks import environment, plain_dit
from fluxdit_jax.model import dit


def test_plain_dit_has_the_models_interface_flops_and_gradients():
    config = tiny_model(width=48, depth=2, heads=3, remat="block")
    inputs = network_inputs(config, grids=((6, 8), (4, 8)), tokens=48, text_tokens=24)
    inputs["keep_text"], inputs["keep_vision"] = np.array([True, False]), np.array([False, True])
    graph = plain_dit.build(config)
    params = jax.jit(lambda key: plain_dit.initialize(config, key))(jax.random.key(0))

    def run(params):
        return dit.apply(graph, params, *arguments(inputs))

    by_hand = 2 * plain_dit.flops_per_sample(config, 48, {"text": 24})
    assert by_hand == product_flops(jax.make_jaxpr(run)(params).jaxpr)

    @jax.jit
    def answer_and_gradient(params):
        moved = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
        return run(params), jax.grad(lambda params: jnp.mean(jnp.square(run(params) - 1.0)))(moved)

    answer, gradient = answer_and_gradient(params)
    assert answer.shape == inputs["x"].shape and not np.any(answer)  # adaLN-Zero starts from nothing
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    assert [jax.tree_util.keystr(path) for path, leaf in leaves if not np.any(leaf)] == []


def test_a_result_says_what_it_was_made_with(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    path = environment.write("speed", [{"seconds": 1.0}])
    result = json.loads(path.read_text())
    assert result["rows"] == [{"seconds": 1.0}]
    assert {"command", "made", "commit", "packages", "cpu", "cores"} <= result["environment"].keys()
    assert result["environment"]["packages"]["jax"] == jax.__version__
    assert [file.name for file in tmp_path.iterdir()] == ["speed.json"]
