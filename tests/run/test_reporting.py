"""What the numbers of micro-batches become: scalars, and what the monitor receives."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from fluxdit_jax.flow import TIME_BINS
from fluxdit_jax.run.health import DIVERGED, Diagnosis, Monitor, Observation
from fluxdit_jax.run.metrics import MetricsWriter, pack, read_metrics
from fluxdit_jax.run.progress import Length
from fluxdit_jax.run.reporting import Reporter
from fluxdit_jax.run.soundness import Watchdog


class Listening(Monitor):
    """A monitor that keeps what it receives."""

    def __init__(self) -> None:
        super().__init__(1e-3, 0)
        self.heard: list[Observation] = []

    def observe(self, seen: Observation) -> list:
        self.heard.append(seen)
        return super().observe(seen)


def micro_batch(**changes: object) -> dict:
    bins = np.zeros((2, TIME_BINS), np.float32)
    bins[:, 3] = 6.0, 3.0
    values = {
        "loss": 1.0, "prediction_rms": 2.0, "target_rms": 1.0, "tokens": 30.0, "replaced": 0.0, "bin_loss": bins[0],
        "bin_count": bins[1], "skipped": 0.0,
    }  # fmt: skip
    return jax.tree.map(np.float32, values | changes)


def update(step: int) -> dict:
    values = {
        "step": step, "grad_norm": 0.5, "grad_norm_groups": {"mlp": 0.25}, "update_norm": 0.125, "param_norm": 7.0,
        "ema_distance": 3.0, "micro_batches": 2,
    }  # fmt: skip
    return jax.tree.map(np.float32, values)


SHAPES = {"accumulate": jax.eval_shape(micro_batch), "update": jax.eval_shape(lambda: update(1))}


def steps(reporter: Reporter, *micro_batches: dict) -> None:
    """Reports steps of two micro-batches each."""
    for number, changes in enumerate(micro_batches, start=1):
        reporter.take("accumulate", np.asarray(pack(micro_batch(**changes))))
        if number % 2 == 0:
            reporter.take("update", np.asarray(pack(update(number // 2))))
    reporter.read()


def reporter_of(writer: MetricsWriter, monitor: Monitor, **more: object) -> Reporter:
    return Reporter(
        writer=writer, monitor=monitor, watchdog=Watchdog(100, 10, 1e-3), batch_size=4,
        schedule=optax.linear_schedule(1.0, 0.0, 10), metric_shapes=SHAPES,
        flops_per_token=50.0, peak_flops=1e6, step=0, length=Length(4, 2, 8, 16), every=2, **more,
    )  # fmt: skip


@pytest.fixture
def reporter(tmp_path: Path):
    monitor = Listening()
    writer = MetricsWriter(tmp_path, 0)
    with reporter_of(writer, monitor) as made:
        yield made, monitor, tmp_path / "metrics.jsonl"
    writer.close()


def test_scalars_are_means_sums_and_ratios_of_the_right_way_round(reporter) -> None:
    made, monitor, path = reporter
    made.waited(0.5)
    steps(made, {"loss": 1.0}, {"loss": 3.0}, {"replaced": 2.0}, {"loss": 5.0})
    (line,) = (line for line in read_metrics(path) if "loss" in line)
    assert line["step"] == 2 and line["loss"] == pytest.approx((2 + 3) / 2)
    expected = {
        "gradient_norm": 0.5, "learning_rate": 0.9, "velocity_rms_ratio": 2.0, "update_norm": 0.125,
        "parameter_norm": 7.0, "ema_distance": 3.0, "skipped": 0, "replaced_samples": 2, "loss_by_time/0.375": 2.0,
        "gradient_norm_by_group/mlp": 0.25,
    }  # fmt: skip
    assert {name: line[name] for name in expected} == pytest.approx(expected)
    assert line["tokens_per_second"] / line["images_per_second"] == pytest.approx(120 / 16)
    assert line["mfu"] == pytest.approx(line["tokens_per_second"] * 50 / 1e6)
    assert line["data_wait"] == pytest.approx(0.5 * line["images_per_second"] / 16)
    assert [(seen.step, seen.loss, seen.rms_ratio) for seen in monitor.heard] == [(1, 2.0, 2.0), (2, 3.0, 2.0)]
    assert monitor.heard[0].gradient_norm == 0.5 and monitor.heard[0].gradient_groups == {"mlp": 0.25}


def test_a_skipped_micro_batch_is_counted_and_gives_no_number(reporter) -> None:
    made, monitor, path = reporter
    nan = {"loss": np.nan, "prediction_rms": np.nan, "skipped": 1.0}
    steps(made, {}, nan, {}, {"loss": 4.0})
    (line,) = (line for line in read_metrics(path) if "loss" in line)
    assert line["skipped"] == 1 and line["loss"] == pytest.approx((1 + 2.5) / 2) and line["loss_by_time/0.375"] == 2.0
    assert [seen.skipped for seen in monitor.heard] == [1, 0] and monitor.heard[0].rms_ratio == 2.0


def test_a_step_without_a_finite_micro_batch_gives_no_number(reporter) -> None:
    made, monitor, path = reporter
    nan = {"loss": np.nan, "skipped": 1.0}
    steps(made, nan, nan, {}, {"loss": 4.0})
    (line,) = (line for line in read_metrics(path) if "loss" in line)
    assert line["skipped"] == 2 and line["loss"] == 2.5 and made.suspect is False
    assert [seen.skipped for seen in monitor.heard] == [2, 0]
    steps(made, {}, {}, nan, nan)
    line = [line for line in read_metrics(path) if "loss" in line][-1]
    assert line["gradient_norm"] is line["update_norm"] is None and line["parameter_norm"] == 7.0
    assert not [name for name in line if name.startswith("gradient_norm_by_group")]
    first = monitor.heard[0]
    assert np.isnan([first.loss, first.gradient_norm, first.rms_ratio]).all() and first.gradient_groups == {}


def test_a_step_that_is_left_counts_when_it_is_drawn_again(reporter) -> None:
    made, _, _ = reporter
    nan = {"loss": np.nan, "skipped": 1.0, "replaced": 3.0}
    steps(made, nan, {}, nan)
    assert made.of_part("skipped") == 1 and made.of_part("replaced") == 3
    assert (made.unfinished()["skipped"], made.unfinished()["replaced"]) == (1, 3), "of the whole step alone"
    steps(made, {})
    assert made.of_part("skipped") == 1


@pytest.mark.parametrize("comparable", ["a", "b"])
def test_levels_are_recalled_where_losses_compare(tmp_path: Path, comparable: str) -> None:
    """Another stage, noise or data set has other losses, none of which is a divergence."""
    levels, monitor = {"first": 1.4, "best": 0.3, "spread": 0.1}, Monitor(1e-3, 0)
    unfinished = {"losses": [], "bins": [[0.0] * TIME_BINS] * 2, "skipped": 0, "levels": levels, "comparable": "a"}
    with reporter_of(MetricsWriter(tmp_path, 0), monitor, unfinished=unfinished, comparable=comparable) as made:
        assert made.unfinished()["comparable"] == comparable
        assert monitor.levels() == (levels if comparable == "a" else None)


def test_nothing_hides_that_the_weights_have_diverged(reporter) -> None:
    made, monitor, _ = reporter
    said = iter([DIVERGED, "spiked", DIVERGED])
    monitor.observe = lambda seen: [Diagnosis(next(said), "it is so", True)]
    steps(made, *[{}] * 4)
    assert made.trouble.kind == DIVERGED and made.diverged == 1
