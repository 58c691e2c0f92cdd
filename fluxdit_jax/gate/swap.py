"""Test 2, vision swap: the caption of A with the vector of B must give A's composition in B's light."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from fluxdit_jax.gate import image_metrics
from fluxdit_jax.gate.album import Album
from fluxdit_jax.gate.painter import Draw, Wanted
from fluxdit_jax.gate.pairing import swap_pairs
from fluxdit_jax.gate.verdict import Case, Chart, Control, Verdict, failed_controls, percent

PASSING = 0.80  # share of the pairs
MIN_PAIRS = 50  # pairs
CONTROLLED = 30  # pairs that are drawn again for each control
OWN = 0.80  # share of them that must take B's structure with B's caption
RANDOM = 0.65  # ... that must be farther from B's tone with a random vector; some random light is B's by chance


@dataclasses.dataclass(frozen=True, eq=False)
class Swap:
    """The plan. For pair k = (A, B), always with A's noise and size: `swapped[k]` has A's caption and B's vector.

    The controls are drawn for the first pairs only: `own[k]` has B's caption as well, `random[k]` A's caption and
    a random unit vector.
    """

    album: Album
    pairs: list[tuple[int, int]]
    swapped: list[Wanted]
    own: list[Wanted]
    random: list[Wanted]

    @classmethod
    def plan(cls, album: Album, pairs: int) -> Swap:
        chosen = swap_pairs(album, pairs)
        rng = np.random.default_rng([album.seed, 2])
        vectors = rng.normal(size=(CONTROLLED, len(album.records[0].vision)))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        # The pairs of the first derangement come first: for them `own` is what test 1 drew as its shuffle.
        return cls(
            album,
            chosen,
            [album.wanted(a, b, a) for a, b in chosen],
            [album.wanted(b, b, a) for a, b in chosen[:CONTROLLED]],
            [album.wanted(a, b, a, vision=v) for (a, b), v in zip(chosen, vectors)],
        )

    def wanted(self) -> list[Wanted]:
        return [*self.swapped, *self.own, *self.random]

    def measure(self, draw: Draw) -> Verdict:
        if not self.pairs:
            return _nothing_to_swap()
        album = self.album
        a, b = np.array(self.pairs).T
        swapped, own, random = draw(self.swapped), draw(self.own), draw(self.random)

        structure = image_metrics.structures(swapped)
        structure_a = (structure * album.structures[a]).sum(1)
        structure_b = (structure * album.structures[b]).sum(1)
        tone = image_metrics.tones(swapped)
        tone_a = np.linalg.norm(tone - album.tones[a], axis=1)
        tone_b = np.linalg.norm(tone - album.tones[b], axis=1)
        keeps, takes = structure_a > structure_b, tone_b < tone_a
        passing = keeps & takes

        few = len(own)
        own_structure = image_metrics.structures(own)
        own_is_b = (own_structure * (album.structures[b[:few]] - album.structures[a[:few]])).sum(1) > 0
        random_b = np.linalg.norm(image_metrics.tones(random) - album.tones[b[:few]], axis=1)
        controls = (
            Control(
                "B's caption with B's vector, A's noise",
                "the structure must now be B's: it is the caption that decides it, not the noise",
                float(own_is_b.mean()),
                OWN,
                at_most=False,
            ),
            Control(
                "A's caption with a random vector",
                "its tone must be farther from B's than the swapped picture's: it is B's vector that brings B's light",
                float((random_b > tone_b[:few]).mean()),
                RANDOM,
                at_most=False,
            ),
        )
        captions = collections.Counter(record.caption for record in album.records)
        answers = [album.true_answer(album.caption(i), j) for i, j in self.pairs]
        numbers = {
            "pairs": len(self.pairs),
            "shared_captions": float(np.mean([captions[record.caption] > 1 for record in album.records])),
            "passing": float(passing.mean()),
            "structure_of_a": float(keeps.mean()),
            "tone_of_b": float(takes.mean()),
            "structure_to_a_median": float(np.median(structure_a)),
            "structure_to_b_median": float(np.median(structure_b)),
            "tone_to_a_median": float(np.median(tone_a)),
            "tone_to_b_median": float(np.median(tone_b)),
            **self._against_the_truth(swapped, answers),
        }
        reasons = []
        if len(self.pairs) < MIN_PAIRS:
            reasons.append(f"only {len(self.pairs)} pairs; at least {MIN_PAIRS} are needed to judge")
        if passing.mean() < PASSING:
            reasons.append(
                f"{percent(passing.mean())} of the pairs pass, {percent(PASSING)} are needed: {percent(keeps.mean())} "
                f"keep A's structure, {percent(takes.mean())} take B's tone"
            )
        reasons += failed_controls(controls)
        gain = (tone_a - tone_b) / np.maximum(np.linalg.norm(album.tones[a] - album.tones[b], axis=1), 1e-6)
        margin = structure_a - structure_b
        return Verdict(
            name="vision_swap",
            title="Vision swap",
            question="Does the caption of one picture with the vector of another give the first one's composition in "
            "the second one's light?",
            value=float(passing.mean()),
            threshold=PASSING,
            statement=f"{int(passing.sum())} of {len(self.pairs)} pairs keep A's composition and take B's light",
            numbers=numbers,
            controls=controls,
            reasons=tuple(reasons),
            cases=tuple(
                self._case(k, swapped[k], answers[k], margin[k], gain[k], passing[k]) for k in range(len(self.pairs))
            ),
            chart=Chart(
                "Every pair: whose composition, whose light?",
                "tone: nearer to A  |  nearer to B",
                "structure: nearer to B  |  nearer to A",
                tuple(float(v) for v in gain),
                tuple(float(v) for v in margin),
                tuple(bool(v) for v in passing),
                (0.0,),
                (0.0,),
            ),
        )

    def _against_the_truth(self, swapped: list[np.ndarray], answers: list[int | None]) -> dict[str, Any]:
        """Where the one right picture is in the set: what the measure says of it, and how near the swaps come to it."""
        known = [k for k, answer in enumerate(answers) if answer is not None]
        if not known:
            return {"true_answers_known": 0}
        album = self.album
        right = np.array([answers[k] for k in known])
        a, b = np.array([self.pairs[k] for k in known]).T
        nearest = album.nearest([swapped[k] for k in known])
        errors = [
            image_metrics.psnr(album.truths[answer], swapped[k])
            for k, answer in zip(known, right)
            if album.truths[answer].shape == swapped[k].shape
        ]
        keeps = (album.structures[right] * (album.structures[a] - album.structures[b])).sum(1) > 0
        to_a, to_b = (np.linalg.norm(album.tones[right] - album.tones[other], axis=1) for other in (a, b))
        return {
            "true_answers_known": len(known),
            "true_answers_passing": float((keeps & (to_b < to_a)).mean()),
            "exactly_the_true_answer": float((nearest == right).mean()),
            "psnr_to_the_true_answer_median_db": float(np.median(errors)) if errors else None,
        }

    def _case(self, k: int, image: np.ndarray, answer: int | None, margin: float, gain: float, passed: bool) -> Case:
        (a, b), album = self.pairs[k], self.album
        shown = [("A: caption", album.truths[a]), ("B: vector", album.truths[b]), ("swapped", image)]
        if answer is not None:
            shown.append(("the truth", album.truths[answer]))
        return Case(
            f"{album.caption(a)} | in the light of: {album.caption(b)}",
            f"structure {margin:+.2f} towards A, tone {gain:+.2f} towards B",
            float(min(margin, gain)),
            bool(passed),
            tuple(shown),
        )


def _nothing_to_swap() -> Verdict:
    return Verdict(
        name="vision_swap",
        title="Vision swap",
        question="Does the caption of one picture with the vector of another give the first one's composition in the "
        "second one's light?",
        value=0.0,
        threshold=PASSING,
        statement="no two pictures differ in caption and clearly in tone",
        numbers={"pairs": 0},
        controls=(),
        reasons=("no two pictures of the set differ in caption and clearly in tone: nothing can be swapped",),
        cases=(),
    )
