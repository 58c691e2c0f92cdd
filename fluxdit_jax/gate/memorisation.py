"""Test 1, memorisation: is every picture drawn again from its own caption and vector?"""

from __future__ import annotations

import dataclasses

import numpy as np

from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.retrieval import Library
from fluxdit_jax.gate.sampler import Draw, Request
from fluxdit_jax.gate.verdict import Case, Control, Verdict, failed_controls, percent
from fluxdit_jax.loader.reader import spread

RETRIEVED = 0.99  # share of the pictures that must be nearest to their own truth
MIN_PICTURES = 20  # pictures below which retrieval says little
OTHER_NOISE = 0.90  # share of the pictures that must be the same ones from another noise
ALONE = 50  # pictures at most that are asked for by one condition alone, spread evenly


def shuffled(eval_set: EvalSet) -> np.ndarray:
    """int [N]: to each record another, in one cycle, at random. Deterministic."""
    order = np.random.default_rng(eval_set.seed).permutation(len(eval_set))
    partner = np.empty(len(order), int)
    partner[order] = np.roll(order, -1)
    return partner


def from_other_noise(eval_set: EvalSet, index: int) -> Request:
    """A record's picture from the noise of another one, always the same one."""
    return eval_set.request(index, index, noise_of=int(np.flatnonzero(shuffled(eval_set) == index)[0]))


@dataclasses.dataclass(frozen=True, eq=False)
class Memorisation:
    """The plan. Of record i: `own[i]` from its noise, `moved[i]` from another's, `by_caption` and `by_vector`
    are some of them, `alone`, from one condition alone."""

    eval_set: EvalSet
    own: list[Request]
    moved: list[Request]
    alone: list[int]
    by_caption: list[Request]
    by_vector: list[Request]

    @classmethod
    def plan(cls, eval_set: EvalSet) -> Memorisation:
        indices = range(len(eval_set))
        alone = [int(i) for i in spread(len(eval_set), ALONE)]
        return cls(
            eval_set,
            [eval_set.request(i, i) for i in indices],
            [from_other_noise(eval_set, i) for i in indices],
            alone,
            [eval_set.request_alone(i, eval_set.of_caption) for i in alone],
            [eval_set.request_alone(i, ["vision"]) for i in alone],
        )

    def requests(self) -> list[Request]:
        return [*self.own, *self.moved, *self.by_caption, *self.by_vector]

    def measure(self, draw: Draw, library: Library) -> Verdict:
        eval_set, count = self.eval_set, len(self.eval_set)
        indices = list(range(count))
        own, moved = draw(self.own), draw(self.moved)
        found = library.retrieve(own, indices)
        caption, vector = (library.retrieve(draw(asked), self.alone) for asked in (self.by_caption, self.by_vector))
        partner = shuffled(eval_set)
        moved_found = library.retrieve(moved, indices)
        old = np.argsort(partner)  # whose noise each of them has
        follows_noise = np.mean([library.twins[a, b] for a, b in zip(moved_found.nearest, old)])

        chance = 1 / count
        controls = (
            Control(
                "captions and vectors shuffled, the noise kept: still the old picture",
                f"the picture must follow its conditions and not its noise: chance is {percent(chance)}",
                float(follows_noise),
                chance + 3 * float(np.sqrt(chance * (1 - chance) / count)),
                at_most=True,
            ),
            Control(
                "captions and vectors shuffled, the noise kept: the picture of the new conditions",
                "whatever noise it starts from, a caption and a vector give their picture",
                moved_found.share,
                OTHER_NOISE,
                at_most=False,
            ),
        )
        nearest = np.minimum(found.own, found.other)
        numbers = found.numbers() | {
            "twins": int((library.twins.sum(1) > 1).sum()),
            "by_caption_alone": caption.share,
            "by_caption_alone_right_row": caption.share_alike("row"),
            "by_vector_alone": vector.share,
            "by_vector_alone_right_light": vector.share_alike("light"),
            "distance_to_the_nearest": float(np.median(nearest)),
            "usual_distance": library.usual_distance,
            "contrast": float(np.median([a.std() / max(t.std(), 1.0) for a, t in zip(own, eval_set.truths)])),
            "roughness": float(np.median([_rough(a) / _rough(t) for a, t in zip(own, eval_set.truths)])),
        }
        reasons = []
        if count < MIN_PICTURES:
            reasons.append(f"only {count} pictures; at least {MIN_PICTURES} are needed to judge")
        if found.share < RETRIEVED:
            reasons.append(
                f"{percent(found.share)} of the pictures are nearest to their own original, "
                f"{percent(RETRIEVED)} are needed"
            )
        reasons += failed_controls(controls)
        return Verdict(
            name="memorisation",
            title="Memorisation",
            question="Is every picture drawn again from nothing but its caption, its vector and noise?",
            value=found.share,
            threshold=RETRIEVED,
            statement=f"{int(found.hit.sum())} of {count} drawn pictures are nearest to their own original "
            f"(chance {percent(chance)})",
            numbers=numbers,
            controls=controls,
            reasons=tuple(reasons),
            cases=tuple(
                Case(
                    eval_set.caption(i),
                    found.note(i),
                    float(found.margin[i]),
                    bool(found.hit[i]),
                    (("original", eval_set.truths[i]), ("drawn", own[i])),
                    i,
                )
                for i in indices
            ),
            chart=found.chart(),
        )


def _rough(image: np.ndarray) -> float:
    """Mean difference of neighbouring pixels, grey levels: large for noise, 0 for plain grey."""
    return float(np.abs(np.diff(image.astype(np.float32), axis=1)).mean()) + 0.1
