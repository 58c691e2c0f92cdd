"""The painter: what it draws once, in which batches, and for whom."""

from __future__ import annotations

import numpy as np
from training_helpers import TEXT_WIDTH, VISION_WIDTH, lively, tiny_model

from fluxdit_jax.dataset.fields import BF16
from fluxdit_jax.gate.painter import Painter, Wanted
from fluxdit_jax.model import dit
from fluxdit_jax.sampling.pipeline import Generator
from fluxdit_jax.train_step import patch_statistics


class Grey:
    """A decoder that shows the first channel."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        grey = np.clip(128 + 40 * latents[:, :1], 0, 255).astype(np.uint8)
        return np.repeat(np.transpose(grey, (0, 2, 3, 1)), 3, axis=3)


def wanted(number: int, seed: int, grid: tuple[int, int] = (2, 2)) -> Wanted:
    rng = np.random.default_rng(number)
    vision = rng.normal(size=VISION_WIDTH).astype(np.float32)
    text = rng.normal(size=(3, TEXT_WIDTH)).astype(BF16)
    conditions = {"text": text, "vision": vision / np.linalg.norm(vision)}
    return Wanted(f"caption {number}", conditions, grid, seed)


def test_each_picture_is_drawn_once_in_full_batches_and_is_the_same_alone() -> None:
    config = tiny_model(depth=1, width=16)
    statistics = patch_statistics((0.0,) * config.channels, (1.0,) * config.channels, config.patch)
    generator = Generator(
        config, tokens=4, lengths={"text": 4}, shift=1.0, statistics=statistics, steps=1, method="euler", batch_size=2
    )
    params, done = generator.cast(lively(dit.build(config)[1])), list[int]()
    asked = [wanted(0, 0), wanted(1, 1), wanted(0, 0), wanted(0, 2), wanted(2, 0, (1, 3)), wanted(2, 0)]
    painter = Painter(generator, params, Grey(), batch_size=2)
    assert [one.key for one in painter.missing(asked)] == [asked[k].key for k in (0, 1, 3, 4, 5)]
    painter.paint(asked, done.append)
    assert done == [2, 2, 1] and painter.missing(asked) == []
    painter.paint([*asked, wanted(0, 3)])
    together = painter(asked)
    assert done == [2, 2, 1]
    assert (together[0] == together[2]).all() and together[0].dtype == np.uint8
    assert [image.shape[:2] for image in together] == [(4, 4)] * 4 + [(2, 6), (4, 4)]
    different = [together[k] for k in (0, 1, 3, 5)]
    assert all((a != b).any() for k, a in enumerate(different) for b in different[:k])
    alone = Painter(generator, params, Grey(), batch_size=2)
    for k in (3, 4):
        assert np.abs(alone([asked[k]])[0].astype(int) - together[k]).max() <= 1
