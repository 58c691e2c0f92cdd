"""What a run says of itself: its length before the first step, and where it is at least every minute."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from training_helpers import tiny_config, tree_equal
from wording import lines_naming, naming

from fluxdit_jax import overview, plan
from fluxdit_jax.prepared import Prepared
from fluxdit_jax.run import progress, timer
from fluxdit_jax.run.averages import ema_steps, restore_ema
from fluxdit_jax.run.metrics import read_metrics
from fluxdit_jax.run.progress import Length, Progress
from fluxdit_jax.run.validation_loss import ValidationLoss
from fluxdit_jax.shared.cli import duration
from fluxdit_jax.stages import stages_of
from fluxdit_jax.train import train

pytest_plugins = ("training_fixtures",)
pytestmark = pytest.mark.usefixtures("quick_compile")
LENGTH = Length(steps=1000, micro_batches=4, global_batch=8, images=24)


def test_epochs_are_of_the_pictures_that_were_drawn() -> None:
    """98 steps of 16, then of 64: position 104 has seen 98 * 16 + 6 * 64 pictures."""
    now = Length(steps=104, micro_batches=4, global_batch=64, images=98, besides=98 * 16 - 98 * 64)
    assert now.epochs(98) == 16.0 and now.epochs(104) == (98 * 16 + 6 * 64) / 98


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7140, "119 min"), (7199, "2 h 0 min")]
    + [(19_230, "5 h 20 min"), (172_799, "2 d 0 h"), (10_454_400, "121 d 0 h")],
)
def test_a_duration_in_words(seconds, words):
    assert duration(seconds) == words


def test_the_line_tells_step_epochs_loss_rate_and_the_time_to_the_end(package_log, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    shown = Progress(LENGTH, step=500, bar=False)
    shown.micro_batch(501, 0, 8)
    time.sleep(0.1)
    shown.pause(0.05)
    shown.finished(501, 0.25, 1.5, "healthy")
    shown.close()
    line = package_log[-1]
    assert "step 501/1000 (epoch 167 of 333)" in line and "loss 0.2500" in line and line.endswith("healthy")
    rate, seconds = float(re.search(r"([\d.]+) images/s", line)[1]), re.search(r"ETA (\d+) s", line)
    assert 40 < rate < 8 / 0.05 and 40 <= int(seconds[1]) <= 119


def test_lines_are_not_written_at_every_step(package_log):
    shown = Progress(LENGTH, step=0, bar=False)
    for step in range(1, 6):
        shown.finished(step, 1.0, 1.0, "healthy")
    shown.close()
    assert package_log == []


def test_a_log_that_would_be_silent_names_what_the_run_is_doing(package_log, monkeypatch):
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.2)
    shown = Progress(LENGTH, step=7, bar=False)
    shown.micro_batch(7, 3, 2)
    with shown.doing("drawing pictures"):
        time.sleep(0.7)
    shown.close()
    said = [line for line in package_log if "step 7/1000, micro-batch 3 of 4: drawing pictures" in line]
    assert 2 <= len(said) <= 4
    count = len(package_log)
    time.sleep(0.4)
    assert len(package_log) == count  # closed is silent


def test_something_is_due_after_a_tenth_and_then_after_all_of_its_minutes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timer.time, "monotonic", lambda: now[0])
    interval, never = timer.IntervalTimer(minutes=30.0), timer.IntervalTimer(minutes=0.0)
    now[0] += 179
    assert not interval.due()
    now[0] += 2
    assert interval.due()
    interval.done()
    now[0] += 30 * 60 - 1
    assert not interval.due()
    now[0] += 2
    assert interval.due() and not never.due()


def described(config, package_log):
    package_log.clear()
    overview.describe([Prepared.of(stage) for stage in stages_of(config)])
    return package_log


def test_a_run_logs_its_length_and_warns_of_thousands_of_epochs(tiny_dataset, tmp_path, package_log, monkeypatch):
    config = tiny_config(tiny_dataset, tmp_path / "run")
    config.train.steps, config.log.peak_tflops = 6000, 1e-6
    lines = described(config, package_log)
    assert any(re.search(naming(6000, "4 x 2", 48000, "2e+03"), line) for line in lines)
    assert not [line for line in lines if line.startswith("WARNING")]  # a set as small is there to be memorised
    monkeypatch.setattr(plan, "SMALL_SET", 20)
    warned = [line for line in described(config, package_log) if line.startswith("WARNING")]
    assert len(warned) == 1 and re.search(naming("train.steps", 6000, "--config.train.steps=300"), warned[0])
    config.train.steps = 2900
    assert not [line for line in described(config, package_log) if line.startswith("WARNING")]


@pytest.fixture
def config(tiny_dataset, tmp_path):
    c = tiny_config(tiny_dataset, tmp_path / "run")
    c.log.heldout_every, c.log.heldout_count, c.log.every, c.train.steps = 1000, 3, 1000, 3
    return c


def test_held_out_losses_and_checkpoints_come_by_time_too_and_change_nothing(config, tmp_path):
    assert train(config.copy_and_resolve_references()) == 0
    config.log.minutes, config.checkpoint.minutes = 1e-9, 1e-9
    plain, config.workdir = config.workdir, str(tmp_path / "by-time")
    assert train(config.copy_and_resolve_references()) == 0
    looks = [
        [entry["step"] for entry in read_metrics(path / "metrics.jsonl") if "heldout_loss" in entry]
        for path in (tmp_path / "run", tmp_path / "by-time")
    ]
    assert looks == [[3], [1, 2, 3]]
    log = (tmp_path / "by-time" / "train.log").read_text()
    assert len(re.findall(r"step \d: held-out .*\d\.\d{4}", log)) == 3  # in the log, which the console shows too
    assert tree_equal(restore_ema(tmp_path / "by-time"), restore_ema(tmp_path / "run"))
    assert ema_steps(tmp_path / "by-time") == [3] and plain == str(tmp_path / "run")


def test_a_signal_during_a_held_out_loss_is_obeyed_and_the_log_is_not_silent(config, monkeypatch):
    """The state is saved first when the loop comes back; meanwhile the log says what the run is doing."""
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.2)
    config.log.heldout_every = 2
    measure = ValidationLoss.__call__

    def slow(self, ema):
        os.kill(os.getpid(), signal.SIGHUP)  # the terminal closes
        time.sleep(0.6)
        return measure(self, ema)

    monkeypatch.setattr(ValidationLoss, "__call__", slow)
    assert train(config.copy_and_resolve_references()) == 128 + signal.SIGHUP
    log = (Path(config.workdir) / "train.log").read_text()
    assert "SIGHUP" in log and lines_naming(log, "step 2/3", "held-out")
    assert lines_naming(log, "stopped", "step 2", "saved") and "not saved" not in log
