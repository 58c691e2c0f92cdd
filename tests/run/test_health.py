"""The monitor on made-up runs: each trouble is named, once, in time; a healthy run is left in peace."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from wording import naming

from fluxdit_jax.run.health import BASELINE, DEAD_STEPS, LOUD_RMS_RATIO, WINDOW, Monitor, Observation

GROUPS = ("blocks/mlp", "null_text", "out")


def healthy(steps, seed=0, start=0, noise=0.05):
    """A run as it should be: the norm is hairy and falls slowly, the loss falls, the prediction grows."""
    rng = np.random.default_rng(seed)
    for i in range(start, start + steps):
        norm = (0.15 + 2 * math.exp(-i / 400)) * rng.lognormal(0, 0.4)
        yield Observation(
            step=i + 1,
            loss=(0.85 + 1.1 * math.exp(-i / 150)) * rng.lognormal(0, noise),
            gradient_norm=norm,
            gradient_groups={name: norm * rng.uniform(0.2, 0.6) for name in GROUPS},
            rms_ratio=0.95 * (1 - math.exp(-(i + 1) / 60)),
            skipped=0,
            data_wait=rng.uniform(0, 0.1),
        )


def changed(observation, **changes):
    return Observation(**(vars(observation) | changes))


def watch(observations, monitor=None):
    """[(step, diagnosis)] of everything the monitor says."""
    monitor = monitor or Monitor(1e-3, 100)
    return [(seen.step, diagnosis) for seen in observations for diagnosis in monitor.observe(seen)]


def kinds(said):
    return [diagnosis.kind for _, diagnosis in said]


# ------------------------------------------------------------------------------------------------ health


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_left_in_peace(seed):
    monitor = Monitor(1e-3, 100)
    assert watch(healthy(4000, seed), monitor) == []
    assert monitor.summary() == "healthy"


@pytest.mark.parametrize("noise", [0.05, 0.15, 0.25])
@pytest.mark.parametrize("seed", range(5))
def test_a_resumed_run_on_its_plateau_is_left_in_peace(seed, noise):
    """A global batch of 16 has losses that vary by 11 % from step to step."""
    assert watch(healthy(3000, seed, start=5000, noise=noise)) == []


def test_early_on_nothing_is_claimed():
    monitor = Monitor(1e-3, 100)
    watch(healthy(WINDOW - 1), monitor)
    assert "early" in monitor.summary()


@pytest.mark.parametrize("length", [1, 5, WINDOW // 2])
def test_a_short_spike_is_not_named(length):
    run = [
        changed(seen, gradient_norm=seen.gradient_norm * 100) if 1000 <= seen.step < 1000 + length else seen
        for seen in healthy(2000)
    ]
    assert watch(run) == []


# ------------------------------------------------------------------------------------------------ spike and stay


def spiked(factor, until=10**9, steps=3000):
    return [
        changed(seen, gradient_norm=seen.gradient_norm * factor) if 1000 <= seen.step < until else seen
        for seen in healthy(steps)
    ]


def test_a_spike_that_stays_is_named_once_and_never_called_over():
    monitor = Monitor(3e-3, 100)
    said = watch(spiked(30), monitor)
    assert kinds(said) == ["spiked"]
    step, diagnosis = said[0]
    assert 1000 < step <= 1000 + 2 * WINDOW and diagnosis.serious
    for word in (f"step {step}", "0.003", "optim.lr", "optim.warmup_steps"):
        assert word in diagnosis.message
    assert monitor.summary() == "trouble: spiked"


def test_a_spike_that_comes_down_later_is_called_over():
    said = watch(spiked(30, until=1500))
    assert kinds(said) == ["spiked", "spiked"]
    assert said[0][1].serious and not said[1][1].serious
    assert 1500 <= said[1][0] <= 1500 + 2 * WINDOW and "gradient norm" in said[1][1].message


def test_a_second_spike_is_named_again():
    run = [
        changed(seen, gradient_norm=seen.gradient_norm * 50) if 1000 <= seen.step < 1200 or seen.step >= 2500 else seen
        for seen in healthy(3000)
    ]
    assert kinds(watch(run)) == ["spiked", "spiked", "spiked"]


def test_a_loss_that_goes_back_is_named():
    run = [changed(seen, loss=seen.loss + 1.2) if seen.step >= 1000 else seen for seen in healthy(1500)]
    said = watch(run)
    assert kinds(said) == ["diverged"] and said[0][1].serious
    assert 1000 <= said[0][0] <= 1000 + WINDOW
    assert "lost" in said[0][1].message and "optim.lr" in said[0][1].message


def test_a_diverged_run_is_named_after_a_restart_as_well():
    """The process that goes on has seen nothing better than the plateau of the diverged run."""
    before, after = Monitor(1e-4, 0), Monitor(1e-4, 0)
    assert before.levels() is None
    watch([changed(seen, loss=0.3) for seen in healthy(200)], before)
    plateau = [changed(seen, loss=2.0) for seen in healthy(200, start=200)]
    assert kinds(watch(plateau, Monitor(1e-4, 0))) == []
    after.recall(json.loads(json.dumps(before.levels())))
    assert kinds(watch(plateau, after)) == ["diverged"]


def test_weights_that_diverge_in_the_first_steps_are_named():
    """Afterwards the loss is that of predicting nothing: seen on a run at a hundred times its learning rate."""
    run = [changed(seen, loss=2.0, rms_ratio=3.0 if 4 <= seen.step <= 6 else 0.1) for seen in healthy(100)]
    said = watch(run)
    assert kinds(said)[0] == "diverged" and said[0][0] == WINDOW and said[0][1].serious
    assert re.search(naming(3, WINDOW, LOUD_RMS_RATIO, "learning rate", 0.001, "optim.lr"), said[0][1].message)


def test_one_outburst_is_forgiven():
    assert watch([changed(seen, rms_ratio=3.0) if seen.step == 50 else seen for seen in healthy(200)]) == []


# ------------------------------------------------------------------------------------------------ sinking


def test_a_gradient_that_sinks_is_named():
    """Collapse: the norm dies away and the prediction with it."""
    run = [
        changed(
            seen,
            gradient_norm=seen.gradient_norm * math.exp(-max(0, seen.step - 500) / 50),
            rms_ratio=seen.rms_ratio * math.exp(-max(0, seen.step - 500) / 100),
        )
        for seen in healthy(1500)
    ]
    said = watch(run)
    assert kinds(said) == ["collapsed"] and said[0][1].serious
    assert 600 < said[0][0] < 900
    for word in ("grey", "latent statistics", "zero"):
        assert word in said[0][1].message


def test_a_prediction_that_stays_weak_is_named_after_the_warmup():
    run = [changed(seen, rms_ratio=0.05) for seen in healthy(1500)]
    said = watch(run, Monitor(1e-3, 300))
    assert kinds(said) == ["collapsed"] and said[0][0] > 300 + BASELINE
    run = [changed(seen, rms_ratio=0.05 + 0.9 * (seen.step > 250)) for seen in healthy(1500)]
    monitor = Monitor(1e-3, 300)
    assert watch(run[:200], monitor) == [] and "weak" in monitor.summary() and "0.05" in monitor.summary()
    assert watch(run[200:], monitor) == [] and monitor.summary() == "healthy"  # slow, but it came


def test_a_loss_of_nothing_is_named_once_and_stops_no_run():
    """Targets without information, or a set that is memorised: the prediction is right and nothing is left to learn."""
    run = [
        changed(
            seen,
            gradient_norm=seen.gradient_norm * math.exp(-seen.step / 100),
            loss=0.008 + 0.003 * math.sin(seen.step) + seen.loss * math.exp(-seen.step / 100),
        )
        for seen in healthy(1500)
    ]
    said = watch(run)
    assert kinds(said) == ["nothing left to learn"] and not said[0][1].serious
    assert "memorised" in said[0][1].message and "grey" not in said[0][1].message


def test_a_memorised_set_is_not_sinking():
    """The norm may fall by a factor of a hundred where the prediction is good and the loss is not nothing."""
    run = [
        changed(
            seen,
            gradient_norm=seen.gradient_norm * math.exp(-seen.step / 300),
            loss=0.05 + seen.loss * math.exp(-seen.step / 300),
        )
        for seen in healthy(1500)
    ]
    assert watch(run) == []


# ------------------------------------------------------------------------------------------------ disconnected


def silence(seen, *names):
    return changed(seen, gradient_groups=seen.gradient_groups | dict.fromkeys(names, 0.0))


def test_a_part_without_gradient_is_named():
    said = watch([silence(seen, "null_text", "out") for seen in healthy(500)])
    assert kinds(said) == ["dead_parameters"] and said[0][0] == DEAD_STEPS and said[0][1].serious
    assert "null_text, out" in said[0][1].message and "blocks/mlp" not in said[0][1].message


def test_a_part_that_has_lost_its_gradient_is_put_down_to_the_learning_rate():
    said = watch([silence(seen, "out") if seen.step > 50 else seen for seen in healthy(500)])
    assert kinds(said) == ["dead_parameters"] and said[0][0] == 50 + DEAD_STEPS
    assert re.search(naming("out", DEAD_STEPS, "learning rate", 0.001, "optim.lr"), said[0][1].message)


def test_a_part_that_rightly_has_no_gradient_is_not_named():
    run = [silence(seen, "null_text") for seen in healthy(500)]
    assert watch(run, Monitor(1e-3, 100, frozenset({"null_text"}))) == []


def test_a_part_that_is_rarely_used_is_not_named():
    run = [silence(seen, "null_text") if seen.step % (DEAD_STEPS - 1) else seen for seen in healthy(1000)]
    assert watch(run) == []


def test_a_part_that_wakes_up_is_told():
    run = [silence(seen, "out") if seen.step < 200 else seen for seen in healthy(400)]
    said = watch(run)
    assert kinds(said) == ["dead_parameters"] * 2
    assert said[1][0] == 200 and not said[1][1].serious


# ------------------------------------------------------------------------------------------------ non-finite


def bad(seen):
    """A skipped micro-batch as the reporter passes it on: loss and ratio of it are NaN."""
    return changed(seen, loss=math.nan, rms_ratio=math.nan, skipped=1)


def test_one_bad_micro_batch_is_told_and_forgiven():
    said = watch([bad(seen) if seen.step == 700 else seen for seen in healthy(1000)])
    assert kinds(said) == ["non-finite"] * 2
    assert said[0][0] == 700 and not said[0][1].serious
    assert "skipped" in said[0][1].message and "python -m preprocess verify" in said[0][1].message
    assert said[1][0] == 700 + WINDOW


@pytest.mark.parametrize("every", [1, 2])
def test_bad_micro_batches_without_end_are_serious(every):
    monitor = Monitor(1e-3, 100)
    said = watch(
        [bad(seen) if seen.step >= 700 and seen.step % every == 0 else seen for seen in healthy(1000)],
        monitor,
    )
    serious = [(step, diagnosis) for step, diagnosis in said if diagnosis.serious]
    assert len(serious) == 1 and 700 < serious[0][0] <= 700 + 2 * WINDOW
    assert "learning rate" in serious[0][1].message
    assert "non-finite" in monitor.summary()


def test_a_run_that_is_broken_from_its_first_step_is_serious():
    said = watch([bad(changed(seen, gradient_norm=0.0)) for seen in healthy(100)])
    assert any(diagnosis.serious and "non-finite" in diagnosis.kind for _, diagnosis in said)


def test_nan_among_good_steps_hides_no_other_trouble():
    run = [bad(seen) if seen.step % 25 == 0 else seen for seen in spiked(30, steps=1500)]
    assert set(kinds(watch(run))) == {"spiked", "non-finite"}
    run = [bad(seen) if seen.step % 7 == 0 else seen for seen in healthy(2000)]
    assert set(kinds(watch(run))) == {"non-finite"}


@pytest.mark.parametrize("field", ["rms_ratio", "loss", "gradient_norm"])
def test_a_measure_that_is_nan_half_of_the_time_is_no_trouble_of_its_own(field):
    rng = np.random.default_rng(0)
    run = [changed(seen, **{field: math.nan}) if rng.random() < 0.5 else seen for seen in healthy(2000)]
    assert watch(run) == []


# ------------------------------------------------------------------------------------------------ data


def test_starvation_is_told_but_is_not_serious():
    run = [changed(seen, data_wait=0.6) if 400 <= seen.step < 600 else seen for seen in healthy(1000)]
    said = watch(run)
    assert kinds(said) == ["input_bound"] * 2
    assert 400 <= said[0][0] <= 400 + WINDOW and not any(diagnosis.serious for _, diagnosis in said)
    for word in ("data.threads", "data.prefetch", "%"):
        assert word in said[0][1].message


def test_a_share_that_wavers_about_the_limit_is_told_once():
    wavering = {True: 0.4, False: 0.12}  # about the limit of a quarter, in turns longer than the window
    run = [changed(seen, data_wait=wavering[seen.step // 15 % 2 == 0]) for seen in healthy(1000)]
    assert kinds(watch(run)) == ["input_bound"]


def test_the_first_steps_may_wait():
    assert watch([changed(seen, data_wait=1.0) if seen.step < 4 else seen for seen in healthy(100)]) == []


def test_a_short_wait_is_not_starvation():
    run = [changed(seen, data_wait=1.0) if seen.step % 20 == 0 else seen for seen in healthy(1000)]
    assert watch(run) == []
