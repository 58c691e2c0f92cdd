"""Test 2, vision swap: the caption of A with the vector of another photograph under light k gives A under light k."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.retrieval import Library
from fluxdit_jax.gate.sampler import Draw, Request
from fluxdit_jax.gate.verdict import Case, Control, Verdict, failed_controls, not_judged, percent

PASSING = 0.80  # share of the pairs
MIN_PAIRS = 50  # pairs
CONTROLLED = 30  # pairs that are drawn again with a random vector
CURVE = (1.5, 3.0, 5.0)  # guidance scales
ON_CURVE = 20  # pairs that are drawn again for each of them
TITLE = ("vision_swap", "Vision swap")
QUESTION = (
    "Does the caption of one photograph with the vector of another give the first one's composition in the second "
    "one's light?"
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Records: the caption, size and noise are those of `a`, the vector is that of `b`, `answer` is what is right."""

    a: int
    b: int
    answer: int


def pairs(eval_set: EvalSet, wanted: int) -> list[Pair]:
    """Up to `wanted` pairs: lights in turn, and under each light every photograph and view before one comes again.

    `a` is under another light than the answer, and `b` shows another photograph. Deterministic.
    """
    rng = np.random.default_rng([eval_set.seed, 1])
    by_light = []
    for light in eval_set.lights:
        under = [(row, index) for row in eval_set.rows if (index := eval_set.at(row, light)) is not None]
        questions = []
        for row, answer in under:
            others = [index for other, index in under if other[0] != row[0]]
            starts = [i for name in eval_set.lights if name != light and (i := eval_set.at(row, name)) is not None]
            if starts:
                questions.append([Pair(starts[rng.integers(len(starts))], b, answer) for b in rng.permutation(others)])
        # the first partner of every row, then the second of every row, ...
        rounds = itertools.zip_longest(*(questions[k] for k in rng.permutation(len(questions))))
        by_light.append([pair for turn in rounds for pair in turn if pair is not None])
    turns = itertools.zip_longest(*by_light)
    found = [pair for turn in turns for pair in turn if pair is not None]
    return [Pair(int(p.a), int(p.b), int(p.answer)) for p in found[:wanted]]


@dataclasses.dataclass(frozen=True, eq=False)
class Swap:
    """The plan: `swapped[k]` is pair k, `random` the first ones with random unit vectors, `guided` with guidance."""

    eval_set: EvalSet
    pairs: list[Pair]
    possible: int
    swapped: list[Request]
    random: list[Request]
    guided: dict[float, list[Request]]

    @classmethod
    def plan(cls, eval_set: EvalSet, wanted: int) -> Swap:
        """
        Args:
          wanted: pairs at most.
        """
        found = pairs(eval_set, max(wanted, MIN_PAIRS))
        chosen = found[:wanted] if len(found) >= MIN_PAIRS else []
        rng = np.random.default_rng([eval_set.seed, 2])
        vectors = rng.normal(size=(CONTROLLED, len(eval_set.records[0].vision)))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        return cls(
            eval_set,
            chosen,
            min(len(found), MIN_PAIRS),
            [eval_set.request(p.a, p.b) for p in chosen],
            [eval_set.request(p.a, p.b, vision=v) for p, v in zip(chosen, vectors)],
            {scale: [eval_set.request(p.a, p.b, guidance=scale) for p in chosen[:ON_CURVE]] for scale in CURVE},
        )

    def requests(self) -> list[Request]:
        return [*self.swapped, *self.random, *(one for asked in self.guided.values() for one in asked)]

    def measure(self, draw: Draw, library: Library) -> Verdict:
        eval_set = self.eval_set
        if self.possible < MIN_PAIRS:
            lights, photographs = len(eval_set.lights), len({photograph for photograph, _ in eval_set.rows})
            why = (
                f"which is a grid of {photographs} photographs under {lights} lights with {self.possible} pairs of "
                f"{MIN_PAIRS}"
                if eval_set.rows
                else "which is no grid of photographs and lights"
            )
            return not_judged(*TITLE, QUESTION, PASSING, why, eval_set.left_out)
        answers = [pair.answer for pair in self.pairs]
        swapped = draw(self.swapped)
        found = library.retrieve(swapped, answers)
        random = library.retrieve(draw(self.random), answers[: len(self.random)])
        chance = 1 / len(eval_set.lights)
        controls = (
            Control(
                "A's caption with a random vector",
                "the picture must rarely be the answer: it is B's vector that brings the light, which is right by "
                f"chance in {percent(chance)}",
                random.share,
                chance + 3 * float(np.sqrt(chance * (1 - chance) / max(1, len(self.random)))),
                at_most=True,
            ),
        )
        few = answers[:ON_CURVE]
        curve = {1.0: float(found.hit[: len(few)].mean())}
        curve |= {scale: library.retrieve(draw(asked), few).share for scale, asked in self.guided.items()}
        reasons = []
        if len(self.pairs) < MIN_PAIRS:
            reasons.append(f"only {len(self.pairs)} pairs; at least {MIN_PAIRS} are needed to judge")
        if found.share < PASSING:
            reasons.append(
                f"{percent(found.share)} of the pairs give the answer, {percent(PASSING)} are needed: "
                f"{percent(found.share_alike('row') or 0)} A's photograph and view, "
                f"{percent(found.share_alike('light') or 0)} B's light"
            )
        reasons += failed_controls(controls)
        return Verdict(
            name=TITLE[0],
            title=TITLE[1],
            question=QUESTION,
            value=found.share,
            threshold=PASSING,
            statement=f"{int(found.hit.sum())} of {len(self.pairs)} pairs give A's photograph under B's light "
            f"(chance {percent(1 / len(eval_set))})",
            numbers=found.numbers() | {"by_light": self._by_light(found.hit), "guidance": curve},
            controls=controls,
            reasons=tuple(reasons),
            cases=tuple(self._case(k, swapped[k], bool(found.hit[k]), found.note(k), found.margin[k])
                        for k in range(len(self.pairs))),
            chart=found.chart(),
        )  # fmt: skip

    def _by_light(self, hit: np.ndarray) -> dict[str, float]:
        """Share of the pairs of each light that give the answer."""
        places = [self.eval_set.places[pair.answer] for pair in self.pairs]
        lights = np.array([place.light for place in places if place is not None])
        return {light: float(hit[lights == light].mean()) for light in self.eval_set.lights if (lights == light).any()}

    def _case(self, k: int, image: np.ndarray, hit: bool, note: str, margin: float) -> Case:
        pair, eval_set = self.pairs[k], self.eval_set
        shown = (("A: caption", pair.a), ("B: vector", pair.b), ("the answer", pair.answer))
        return Case(
            f"{eval_set.caption(pair.a)} | in the light of: {eval_set.caption(pair.b)}",
            note,
            float(margin),
            hit,
            (*((title, eval_set.truths[index]) for title, index in shown), ("drawn", image)),
            pair.answer,
        )
