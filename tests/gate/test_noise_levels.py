"""From which time on a light must be learned from the vector, and how much of the training lies there."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from fluxdit_jax.dataset.grid import Place
from fluxdit_jax.flow import FlowConfig, draw_time
from fluxdit_jax.gate.noise_levels import ENOUGH, NoiseLevels, of_lights

SHAPE = (4, 6, 8)
MEAN, STD = (1.0, -2.0, 0.0, 0.5), (2.0, 1.0, 0.5, 4.0)


@dataclasses.dataclass
class Picture:
    key: str
    latent: np.ndarray


def scene(distance: float, lights: int = 2, photographs: int = 3):
    """Pictures whose lights are a distance apart once they are normalised; photographs are much further apart."""
    rng = np.random.default_rng(0)
    records, grid = [], {}
    for p in range(photographs):
        base = rng.normal(size=SHAPE)
        for light in range(lights):
            step = np.zeros(SHAPE)
            step[light % 4, light // 4, 0] = distance / np.sqrt(2)
            key = f"{p}.{light}"
            latent = (base + step) * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
            records.append(Picture(key, latent.astype(np.float32)))
            grid[key] = Place(f"photo {p}", "original", f"light {light}")
    return records, grid


@pytest.mark.parametrize("distance", [3.0, 40.0, 190.0])
@pytest.mark.parametrize("flow", [FlowConfig(shift=5.0), FlowConfig(shift=2.0, uniform_share=0.5)])
def test_the_time_and_the_share_above_it(distance, flow):
    """In closed form where the times are logit-normal; and by the times that training draws."""
    found = of_lights(*scene(distance), MEAN, STD, flow)
    time = distance / (distance + 2)
    assert found.time == pytest.approx(time, rel=1e-4)
    drawn = np.asarray(draw_time(flow, 0, jnp.arange(20_000, dtype=jnp.uint32), 100))
    assert found.share == pytest.approx((drawn > time).mean(), abs=2e-3)
    if flow.uniform_share == 0:
        before = time / (flow.shift - (flow.shift - 1) * time)
        assert found.share == pytest.approx(1 - ndtr(np.log(before / (1 - before))), abs=2e-4)
        q = 1 / (1 + np.exp(-ndtri(1 - ENOUGH)))
        assert found.shift == pytest.approx(distance / 2 * (1 - q) / q, rel=1e-2)
    proposed = dataclasses.replace(flow, shift=found.shift)
    assert of_lights(*scene(distance), MEAN, STD, proposed).share == pytest.approx(ENOUGH, abs=2e-3)
    proposed = FlowConfig(shift=found.uniform_shift, uniform_share=1.0)
    assert of_lights(*scene(distance), MEAN, STD, proposed).share == pytest.approx(ENOUGH, abs=2e-3)


def test_the_shift_grows_with_the_distance():
    few, many = (of_lights(*scene(distance), MEAN, STD, FlowConfig(shift=5.0)) for distance in (47.0, 188.0))
    assert many.shift == pytest.approx(4 * few.shift, rel=1e-3)
    assert not few.too_few and many.too_few


def test_a_set_without_pairs_of_lights_says_nothing():
    records, grid = scene(10.0)
    assert of_lights(records, {}, MEAN, STD, FlowConfig()) is None
    assert of_lights(records[::2], grid, MEAN, STD, FlowConfig()) is None
    assert of_lights(*scene(0.0), MEAN, STD, FlowConfig()) is None


def test_pictures_of_one_light_and_of_other_sizes_are_no_pair():
    records, grid = scene(10.0)
    records[0].latent = records[0].latent[:, :, :4]
    assert of_lights(records, grid, MEAN, STD, FlowConfig()).time == pytest.approx(10 / 12, rel=1e-4)
    assert isinstance(of_lights(records, grid, MEAN, STD, FlowConfig()), NoiseLevels)
