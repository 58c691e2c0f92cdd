"""config.log.tracker: an object of the user's beside TensorBoard."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from training_helpers import tiny_config
from wording import naming

from fluxdit_jax.config import ConfigError
from fluxdit_jax.run.metrics import MetricsWriter, read_metrics
from fluxdit_jax.run.tracker import Tracker
from fluxdit_jax.train import train

pytest_plugins = ("training_fixtures",)

SOURCE = """
made = []

class Keeping:
    def __init__(self, workdir, config, step):
        self.workdir, self.config, self.step, self.seen, self.closed = workdir, config, step, [], False
        made.append(self)

    def scalars(self, step, values):
        self.seen.append((step, values))

    def image(self, step, name, image):
        self.seen.append((step, name, image))

    def close(self):
        self.closed = True

class Broken(Keeping):
    def scalars(self, step, values):
        raise OSError("no network")

def refuse(**given):
    raise ValueError("log in first")
"""


@pytest.fixture
def trackers(tmp_path, monkeypatch):
    (tmp_path / "my_trackers.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_trackers", None)
    import my_trackers

    yield my_trackers
    del sys.modules["my_trackers"]


def test_it_gets_what_tensorboard_gets(trackers, tmp_path):
    tracker = Tracker("my_trackers:Keeping")
    tracker.begin(tmp_path, {"seed": 0}, 3)
    writer = MetricsWriter(tmp_path, 3, tracker=tracker)
    writer.scalars(4, {"loss": 0.5})
    writer.image(4, "samples", np.zeros((2, 3, 3), np.uint8))
    writer.close()
    (kept,) = trackers.made
    assert (kept.workdir, kept.config, kept.step, kept.closed) == (tmp_path, {"seed": 0}, 3, True)
    assert kept.seen[0] == (4, {"loss": 0.5})
    assert kept.seen[1][:2] == (4, "samples") and kept.seen[1][2].shape == (2, 3, 3)


def test_a_run_reports_to_it_and_one_that_fails_is_told_of_once(trackers, tiny_dataset, tmp_path):
    c = tiny_config(tiny_dataset, tmp_path / "run")
    c.train.steps, c.log.every, c.log.tracker = 4, 1, "my_trackers:Broken"
    assert train(c) == 0
    told = (tmp_path / "run" / "train.log").read_text()
    assert told.count("no network") == 1 and "my_trackers:Broken" in told
    (kept,) = trackers.made
    assert kept.closed and kept.config["train.steps"] == 4
    logged = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("my_trackers", ["MODULE:OBJECT"]),
        ("my_trackers:absent", ["absent"]),
        ("no_such_module_here:x", ["no_such_module_here"]),
        ("my_trackers:refuse", ["log in first"]),
    ],
)
def test_one_that_cannot_be_made_ends_the_start(trackers, tmp_path, spec, words):
    with pytest.raises(ConfigError, match=naming("config.log.tracker", spec, *words)):
        Tracker(spec).begin(tmp_path, {}, 0)
