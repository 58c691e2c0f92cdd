"""Models that are broken in one way each: an `Oracle` that answers wrong where it is broken, and right elsewhere."""

from __future__ import annotations

import numpy as np
from gate_scenes import Oracle, named
from scipy.ndimage import gaussian_filter

from fluxdit_jax.gate.sampler import Request

OTHER = {"left": "right", "right": "left"}


def noise_of(one: Request) -> np.random.Generator:
    return np.random.default_rng(one.seed)


def roughened(image: np.ndarray, one: Request, strength: float) -> np.ndarray:
    return np.clip(image + noise_of(one).normal(0, strength, image.shape), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------ good enough


class Imperfect(Oracle):
    """Grain, a little blur and a tenth less contrast: about 25 dB."""

    def see(self, one: Request) -> np.ndarray:
        image = gaussian_filter(super().see(one).astype(float), (0.7, 0.7, 0))
        return roughened(image.mean() + 0.9 * (image - image.mean()), one, 8)


# ------------------------------------------------------------------------------------------ no picture of the set


class Untrained(Oracle):
    """Noise."""

    def see(self, one: Request) -> np.ndarray:
        return noise_of(one).integers(0, 256, super().see(one).shape).astype(np.uint8)


class Grey(Oracle):
    """Collapsed to the mean."""

    def see(self, one: Request) -> np.ndarray:
        return np.full_like(super().see(one), 117)


class MeanOfAll(Oracle):
    """Collapsed to the mean of all pictures of one size, which has a little structure."""

    def see(self, one: Request) -> np.ndarray:
        size = super().see(one).shape
        mean = np.mean([truth for truth in self.set.truths if truth.shape == size], axis=0)
        return np.rint(mean).astype(np.uint8)


# ------------------------------------------------------------------------------------------ conditions not obeyed


class Permuted(Oracle):
    """Draws another photograph of the set, of the other side and the next light, always the same one."""

    def see(self, one: Request) -> np.ndarray:
        rows, lights = self.set.rows, self.set.lights
        row = rows[(rows.index(self._rows[self.words(one)]) + 3) % len(rows)]
        return self.set.truths[self.set.at(row, lights[(lights.index(self.light(one)) + 1) % len(lights)])]


class TextSilenced(Oracle):
    """Shows the record whose vector it is given, whatever the caption says."""

    def words(self, one: Request) -> tuple[str, str]:
        return self.shown(one)


class VisionSilenced(Oracle):
    """Always the same light."""

    def light(self, one: Request) -> str:
        return self.set.lights[1]


class VisionDominating(Oracle):
    """The vector decides what is shown; of the caption only the side is read."""

    def words(self, one: Request) -> tuple[str, str]:
        return self.shown(one)[0], super().words(one)[1]


class CaptionLost(Oracle):
    """Always the same photograph, in the vector's light."""

    def words(self, one: Request) -> tuple[str, str]:
        return named(self.set.caption(0))


class NoiseDecides(Oracle):
    """A picture of the set, chosen by the noise: its own noise gives each record its own."""

    def see(self, one: Request) -> np.ndarray:
        return self.set.truths[one.seed % len(self.set)]


class LightMistaken(Oracle):
    """Two pictures in forty come in another light than theirs."""

    def light(self, one: Request) -> str:
        light, lights = super().light(one), self.set.lights
        wrong = {(named(self.set.caption(0)), lights[1]), (named(self.set.caption(len(self.set) - 1)), lights[3])}
        return lights[0] if (self.words(one), light) in wrong else light


class SidesIgnored(Oracle):
    """Does not read the side where the vector's photograph is the caption's: it stands as the vector's record does."""

    def words(self, one: Request) -> tuple[str, str]:
        subject, side = super().words(one)
        shown, before = self.shown(one)
        return subject, before if shown == subject else side


class CaptionAsWhole(Oracle):
    """A caption that no record has shows the photograph from the other side."""

    def words(self, one: Request) -> tuple[str, str]:
        subject, side = super().words(one)
        known = one.caption in {record.caption for record in self.set.records}
        return subject, side if known else OTHER[side]


class OwnLightOnly(Oracle):
    """The light is the vector's only where its photograph is the caption's; else the last one."""

    def light(self, one: Request) -> str:
        return super().light(one) if self.shown(one)[0] == self.words(one)[0] else self.set.lights[-1]


class GuidanceNeeded(OwnLightOnly):
    """The same, but from a guidance of 3 on it obeys."""

    def light(self, one: Request) -> str:
        return Oracle.light(self, one) if one.guidance >= 3 else super().light(one)


# ------------------------------------------------------------------------------------------ unstable


class UnstableUnderEdits(Oracle):
    """A caption that it has not seen with this vector gives another photograph."""

    def see(self, one: Request) -> np.ndarray:
        subject, side = self.words(one)
        if (shown := self.shown(one))[0] == subject and shown[1] != side:
            names = list(dict.fromkeys(named(record.caption)[0] for record in self.set.records))
            subject = names[(names.index(subject) + 1) % len(names)]
        return self.picture((subject, side), self.light(one))


class UnstableOverNoise(Oracle):
    """The side is what the caption says only with the record's own noise."""

    def words(self, one: Request) -> tuple[str, str]:
        subject, side = super().words(one)
        own = one.caption == self.set.caption(one.seed) or one.caption not in {r.caption for r in self.set.records}
        return subject, side if own or self.shown(one) != (subject, side) else OTHER[side]
