"""Helpers of the tests of whole runs: doing one, interrupting it, and comparing what two of them logged and wrote."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from training_helpers import tiny_config, tree_equal

from fluxdit_jax.loader import reader
from fluxdit_jax.run.averages import restore_ema
from fluxdit_jax.run.checkpoint import EMA, SHORT_EMA
from fluxdit_jax.run.metrics import read_metrics
from fluxdit_jax.train import train

STEPS = 8  # of two micro-batches of four


def rest_slow(first, *others):
    """Parameters of which only the first belongs to the fast tests: each run costs seconds of tracing."""
    return [first, *(pytest.param(*(o if isinstance(o, tuple) else (o,)), marks=pytest.mark.slow) for o in others)]


def run_config(dataset, workdir):
    """`STEPS` steps with two averages, measured and written at every fourth."""
    c = tiny_config(dataset, workdir)
    c.flow.drop = "all 0.1, text 0.2, vision 0.2"
    c.checkpoint.ema_every = 4
    c.log.heldout_every, c.log.heldout_count = 4, 3
    c.ema.short_decay = 0.3
    c.flow.shift = 0.125  # little noise: eight steps learn something
    return c


def scalars(workdir):
    """{step: the logged values that do not depend on the clock} of metrics.jsonl."""
    clock = {"images_per_second", "tokens_per_second", "data_wait", "mfu", "device_memory_gb"}
    found: dict[int, dict] = {}
    for entry in read_metrics(Path(workdir) / "metrics.jsonl"):
        values = {name: value for name, value in entry.items() if name not in clock and not isinstance(value, str)}
        assert not found.get(entry["step"], {}).keys() & (values.keys() - {"step"}), "a step is logged twice"
        found.setdefault(entry["step"], {}).update(values)
    return {step: values for step, values in found.items() if len(values) > 1}


def log_of(workdir):
    return (Path(workdir) / "train.log").read_text()


def run(config, expected=0):
    assert train(config.copy_and_resolve_references()) == expected


def interrupt(monkeypatch, after, number=signal.SIGTERM):
    """Sends this process a signal when the loop asks for its `after`-th micro-batch."""
    original = reader.batches

    def batches(*args, **kwargs):
        for position, batch in enumerate(original(*args, **kwargs), start=1):
            if position == after:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(reader, "batches", batches)


def assert_same_outcome(workdir, reference, steps=STEPS):
    assert scalars(workdir) == scalars(reference)
    for folder in (EMA, SHORT_EMA):
        found, wanted = (restore_ema(Path(run), steps, folder=folder) for run in (workdir, reference))
        assert tree_equal(found, wanted)
