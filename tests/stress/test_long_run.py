"""That the long run would see what it looks for; `long_run.py` itself takes from minutes to an hour."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import long_run  # noqa: E402

from fluxdit_jax.run.metrics import MetricsWriter  # noqa: E402


def samples(leak: float) -> list[dict[str, float]]:
    """A process of 10,000 steps whose memory wavers, and grows by `leak` MB; it has one spike."""
    rng = np.random.default_rng(0)
    steps = range(0, 10_000, 50)
    memory = [500 + leak * step / 1e4 + rng.normal() + 300 * (step == 7_000) for step in steps]
    rest = dict.fromkeys(long_run.GROWTH, 9.0)
    return [rest | {"memory, MB": m, "step": step} for step, m in zip(steps, memory)]


@pytest.mark.parametrize("leak", [0.0, 5.0, 40.0])
def test_growth_is_measured_in_spite_of_noise_and_spikes(leak: float) -> None:
    found = long_run.growth(samples(leak), 10_000)
    assert found["memory, MB"][2] == pytest.approx(leak, abs=1.0)
    assert found["file descriptors"] == (9.0, 9.0, 0.0)


def write(run: Path, steps: list[int]) -> None:
    writer = MetricsWriter(run, 0)
    for step in steps:
        writer.scalars(step, {"loss": 1 / step, "grows": float("nan") if step == 3 else step})
    writer.close()


def test_a_whole_log_is_whole_and_agrees(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 3, 4])
    assert long_run.incomplete(tmp_path, 4, 1) == [] == long_run.board_differences(tmp_path)


def test_missing_and_doubled_steps_and_other_values_are_seen(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 3, 4])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[1], lines[3]]) + "\n")
    (told,) = long_run.incomplete(tmp_path, 4, 1)
    assert "missing [3]" in told and "twice [2]" in told
    assert len(long_run.board_differences(tmp_path)) == 2  # loss and grows
    changed = json.loads(lines[3]) | {"loss": 0.123}
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:3], json.dumps(changed)]) + "\n")
    assert long_run.board_differences(tmp_path) == ["loss: other values in TensorBoard"]


def test_what_is_left_behind_is_seen(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("12:00:00 I step 1\n12:00:01 E could not write\n")
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / "5.orbax-checkpoint-tmp").mkdir()
    assert len(long_run.leftovers(tmp_path)) == 2
