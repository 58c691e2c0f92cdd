"""Checkpoints of a small state. Asked for with `pytest_plugins = ("training_fixtures", "checkpoint_fixtures")`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training_helpers import meta_of, small_state

from fluxdit_jax.run.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def states(quick_compile):
    return {step: small_state(step) for step in (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def two_saved(states, tmp_path_factory):
    """A run directory with checkpoints 1 and 2 and EMA 1 and 2; to be copied, not changed."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (1, 2):
            assert checkpoints.save(step, states[step], meta_of(step))
            assert checkpoints.save_ema(step, states[step].ema)
    assert checkpoints.failures == 0
    return workdir


@pytest.fixture
def workdir(two_saved, tmp_path):
    return Path(shutil.copytree(two_saved, tmp_path / "run"))
