"""Test 1, memorisation: is every picture drawn again from its own caption and vector?"""

from __future__ import annotations

import dataclasses

import numpy as np

from fluxdit_jax.gate import image_metrics
from fluxdit_jax.gate.album import Album
from fluxdit_jax.gate.painter import Draw, Wanted
from fluxdit_jax.gate.pairing import derangements
from fluxdit_jax.gate.verdict import Case, Chart, Control, Verdict, failed_controls, percent

RETRIEVED = 0.99  # share of the pictures that must be nearest to their own truth
MIN_PICTURES = 20  # pictures below which retrieval says little
# Grey levels between thumbnails below which two originals are one picture, which nobody can tell apart.
DUPLICATE_GREY_LEVELS = 2.0


@dataclasses.dataclass(frozen=True, eq=False)
class Memorisation:
    """The plan: `own[i]` is record i from its own noise, `shuffled[i]` has another's caption and vector."""

    album: Album
    partner: np.ndarray
    own: list[Wanted]
    shuffled: list[Wanted]

    @classmethod
    def plan(cls, album: Album) -> Memorisation:
        indices = range(len(album))
        partner = next(derangements(album))
        own = [album.wanted(i, i, i) for i in indices]
        shuffled = [album.wanted(int(partner[i]), int(partner[i]), i) for i in indices]
        return cls(album, partner, own, shuffled)

    def wanted(self) -> list[Wanted]:
        return [*self.own, *self.shuffled]

    def measure(self, draw: Draw) -> Verdict:
        album, count = self.album, len(self.album)
        own = draw(self.own)
        drawn = image_metrics.thumbnails(own)
        distance = image_metrics.distances(drawn, album.thumbnails)
        nearest = distance.argmin(1)
        twins = image_metrics.distances(album.thumbnails, album.thumbnails) < DUPLICATE_GREY_LEVELS
        hit = twins[np.arange(count), nearest] | (nearest == np.arange(count))
        psnr = np.array([image_metrics.psnr(t, image) for t, image in zip(album.truths, own)])
        ssim = np.array([image_metrics.ssim(t, image) for t, image in zip(album.truths, own)])
        alike = image_metrics.structures(own) @ album.structures.T
        captions = np.array([record.caption for record in album.records])
        shuffled = album.nearest(draw(self.shuffled))

        retrieved = float(hit.mean())
        chance = 1 / count
        controls = (
            Control(
                "captions and vectors shuffled, the noise kept",
                f"the picture must follow its conditions and not its noise: chance is {percent(chance)}",
                float((shuffled == np.arange(count)).mean()),
                chance + 3 * float(np.sqrt(chance * (1 - chance) / count)),
                at_most=True,
            ),
        )
        numbers = {
            "pictures": count,
            "retrieved": retrieved,
            "psnr_median_db": float(np.median(psnr)),
            "psnr_worst_db": float(psnr.min()),
            "ssim_median": float(np.median(ssim)),
            "ssim_worst": float(ssim.min()),
            "twins": int((twins.sum(1) > 1).sum()),
            "right_caption": float((captions[nearest] == captions).mean()),
            "structure": float(np.median(alike.diagonal())),
            "structure_of_the_nearest": float(np.median(alike.max(1))),
            "tone_difference": float(np.median(np.linalg.norm(image_metrics.tones(own) - album.tones, axis=1))),
            "contrast": float(np.median([a.std() / max(t.std(), 1.0) for a, t in zip(own, album.truths)])),
            "roughness": float(np.median([_rough(a) / _rough(t) for a, t in zip(own, album.truths)])),
            "shuffled_follow_their_new_conditions": float((shuffled == self.partner).mean()),
        }
        reasons = []
        if count < MIN_PICTURES:
            reasons.append(f"only {count} pictures; at least {MIN_PICTURES} are needed to judge")
        if retrieved < RETRIEVED:
            reasons.append(
                f"{percent(retrieved)} of the pictures are nearest to their own original, "
                f"{percent(RETRIEVED)} are needed"
            )
        reasons += failed_controls(controls)
        others = np.where(twins | np.eye(count, dtype=bool), np.inf, distance).min(1)
        return Verdict(
            name="memorisation",
            title="Memorisation",
            question="Is every picture drawn again from nothing but its caption, its vector and noise?",
            value=retrieved,
            threshold=RETRIEVED,
            statement=f"{int(hit.sum())} of {count} drawn pictures are nearest to their own original",
            numbers=numbers,
            controls=controls,
            reasons=tuple(reasons),
            cases=tuple(
                Case(
                    album.caption(i),
                    f"{psnr[i]:.1f} dB, SSIM {ssim[i]:.3f}"
                    + ("" if hit[i] else f", but nearest to {album.records[nearest[i]].key}"),
                    float(psnr[i] - (0 if hit[i] else 1000)),
                    bool(hit[i]),
                    (("original", album.truths[i]), ("drawn", own[i])),
                )
                for i in range(count)
            ),
            chart=Chart(
                "How near is its own original, and how near the next best?",
                "distance to its own original (grey levels)",
                "distance to the nearest other",
                tuple(float(v) for v in distance.diagonal()),
                tuple(float(v) if np.isfinite(v) else 255.0 for v in others),
                tuple(bool(v) for v in hit),
            ),
        )


def _rough(image: np.ndarray) -> float:
    """Mean difference of neighbouring pixels, grey levels: large for noise, 0 for plain grey."""
    return float(np.abs(np.diff(image.astype(np.float32), axis=1)).mean()) + 0.1
