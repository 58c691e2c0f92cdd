"""The monitor on real runs that are made to fail: each must be named in words, and the healthy one must not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_helpers import conditions, dropping, jitted

from fluxdit_jax import flow
from fluxdit_jax.model import dit
from fluxdit_jax.objective import Objective
from fluxdit_jax.optimizer import OptimizerConfig, build_optimizer
from fluxdit_jax.run.health import Monitor, Observation
from fluxdit_jax.state import create_state
from fluxdit_jax.train_step import make_train_step

pytestmark = pytest.mark.slow  # each compiles a training step of its own

TEXT_WIDTH, VISION_WIDTH = 16, 8
SHAPE = dit.ModelConfig(
    width=32, depth=2, heads=2, patch=1, channels=4, conditions=conditions(TEXT_WIDTH, VISION_WIDTH),
    dtype="float32", remat="none", attention="xla",
)  # fmt: skip
TIMES = flow.FlowConfig(
    mean=0.0, std=1.0, uniform_share=1.0, shift=1.0, stratified=True,
    drop=dropping(0.1, 0.1, 0.1),
)  # fmt: skip
RULE = OptimizerConfig(
    name="adamw", lr=3e-3, adam_lr=3e-3, schedule="constant", warmup_steps=20, total_steps=400,
    final_fraction=0.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, grad_clip_norm=1.0, grad_accum_steps=1,
)  # fmt: skip
BATCH, TOKENS = 16, 4


def pictures(count: int) -> dict[str, np.ndarray]:
    """A few fixed samples that the conditions tell apart."""
    rng = np.random.default_rng(0)
    vision = rng.normal(size=(count, VISION_WIDTH)).astype(np.float32)
    return {
        "latent": rng.normal(size=(count, TOKENS, SHAPE.token_width)).astype(np.float32),
        "grid": np.full((count, 2), 2, np.int32),
        "text": rng.normal(size=(count, 3, TEXT_WIDTH)).astype(np.float32),
        "text_length": np.full((count,), 3, np.int32),
        "vision": vision / np.linalg.norm(vision, axis=1, keepdims=True),
        "replaced": np.zeros((count,), bool),
    }


def diagnoses(rule: OptimizerConfig, *, steps: int, doctor=lambda params: params, constant=False) -> list:
    """Trains a tiny network and returns what the monitor said, in order."""
    graph, _ = dit.build(SHAPE)
    optimizer = build_optimizer(rule)
    state = create_state(doctor(dit.initialize(SHAPE, jax.random.key(0))), optimizer)
    statistics = (np.zeros(SHAPE.token_width, np.float32), np.ones(SHAPE.token_width, np.float32))
    step = make_train_step(
        Objective(graph, SHAPE, TIMES, statistics, seed=0, global_batch_size=BATCH), optimizer, ema_target=0.999
    )
    if constant:  # the target velocity is zero: nothing is left to learn but silence
        zeros = dict(pictures(1), latent=np.zeros((1, TOKENS, SHAPE.token_width), np.float32))
        data, noise = zeros, jnp.zeros((BATCH, TOKENS, SHAPE.token_width))
    else:
        data, noise = pictures(8), None
    run = jitted(step)
    monitor, said = Monitor(rule.lr, rule.warmup_steps), []
    count = len(data["grid"])
    with pytest.MonkeyPatch.context() as patch:
        if noise is not None:
            patch.setattr(flow, "draw_noise", lambda *_: noise)
        for number in range(steps):
            index = np.arange(number * BATCH, (number + 1) * BATCH, dtype=np.uint32)
            batch = {name: array[index % count] for name, array in data.items()} | {"index": index}
            state, m = run(state, batch)
            seen = Observation(
                step=int(m["step"]),
                loss=float(m["loss"]),
                gradient_norm=float(m["grad_norm"]),
                gradient_groups={name: float(norm) for name, norm in m["grad_norm_groups"].items()},
                rms_ratio=float(m["prediction_rms"] / max(float(m["target_rms"]), 1e-6)),
                skipped=int(m["skipped"]),
                data_wait=0.0,
            )
            said += monitor.observe(seen)
    return said


def test_a_healthy_run_hears_nothing():
    assert diagnoses(RULE, steps=250) == []


def test_a_learning_rate_a_thousand_times_too_high_is_called_that():
    """A thousand: at a hundred this tiny network is only trained badly, and how badly depends on the last bit."""
    said = diagnoses(dataclasses.replace(RULE, lr=1000 * RULE.lr), steps=120)
    blamed = [d for d in said if d.kind in ("spiked", "diverged") and d.serious]
    assert blamed
    assert "learning rate (3)" in blamed[0].message and "optim.lr" in blamed[0].message


def test_two_zero_layers_in_series_are_named():
    def doctor(params):
        out = params["blocks"]["attention"]["out"]
        out["kernel"] = jnp.zeros_like(out["kernel"])  # behind a gate that starts at zero as well
        return params

    said = diagnoses(RULE, steps=130, doctor=doctor)
    assert [d.kind for d in said] == ["dead_parameters"]
    assert "blocks/attention" in said[0].message
    assert "zero" in said[0].message


def test_constant_targets_leave_nothing_to_learn():
    said = diagnoses(RULE, steps=300, constant=True)
    assert "nothing left to learn" in [d.kind for d in said]
