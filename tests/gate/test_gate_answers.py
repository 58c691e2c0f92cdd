"""The measure is right about true answers: on drawn scenes, on photographs, and on a set of any pictures whatever."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from gate_pictures import set_of
from gate_scenes import encode_words, eval_set, photographs
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxdit_jax.dataset.grid import Place
from fluxdit_jax.gate.edit import TextEdit
from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.memorisation import Memorisation
from fluxdit_jax.gate.retrieval import Library
from fluxdit_jax.gate.sampler import Request
from fluxdit_jax.gate.swap import Swap, pairs
from fluxdit_jax.gate.verdict import Verdict


class Answers:
    """A `Draw` that knows of each question of the plans which picture of the set is right, and gives that."""

    def __init__(self, of: EvalSet, questions: Sequence[tuple[Request, int]]):
        self.set, self._answers = of, {one.key: answer for one, answer in questions}

    def __call__(self, requests: Sequence[Request]) -> list[np.ndarray]:
        return [self.set.truths[self._answers.get(one.key, 0)] for one in requests]


def judged_on_answers(of: EvalSet, pairs: int) -> list[Verdict]:
    """The verdicts on the true answers of these many pairs, and of all pictures and edits of the set."""
    remembered, swap, edit = Memorisation.plan(of), Swap.plan(of, pairs), TextEdit.plan(of, 10_000, None, encode_words)
    indices = range(len(of))
    questions = [*zip(remembered.own, indices), *zip(remembered.moved, indices)]
    questions += [(one, pair.answer) for one, pair in zip(swap.swapped, swap.pairs)]
    for guided in swap.guided.values():
        questions += [(one, pair.answer) for one, pair in zip(guided, swap.pairs)]
    questions += [(one, answer) for one, (_, answer) in zip(edit.edited, edit.cases)]
    draw, library = Answers(of, questions), Library(of)
    return [plan.measure(draw, library) for plan in (remembered, swap, edit)]


@pytest.mark.parametrize("make", [eval_set, photographs])
def test_the_true_answers_of_all_questions_of_a_set(make):
    of = make()
    library, indices = Library(of), list(range(len(of)))
    assert (library.retrieve(of.truths, indices).rank == 1).all() and library.twins.sum() == len(of)
    swap, edit = Swap.plan(of, 10_000), TextEdit.plan(of, 10_000, None, encode_words)
    assert len(swap.pairs) == 40 * 6 and len(edit.cases) == 40
    for places, light_of in (
        ([(of.places[p.answer], of.places[p.a]) for p in swap.pairs], [of.places[p.b].light for p in swap.pairs]),
        ([(of.places[answer], of.places[index]) for index, answer in edit.cases], None),
    ):
        for k, (answer, start) in enumerate(places):
            assert answer.photograph == start.photograph
            if light_of is None:
                assert answer.light == start.light and answer.view != start.view
            else:
                assert answer.view == start.view and answer.light == light_of[k] != start.light


@st.composite
def sets(draw: st.DrawFn) -> EvalSet:
    """A full grid of pictures of anything: of a few colours or of many, in three sizes, some of them the same."""
    photographs_, lights = draw(st.integers(3, 4)), draw(st.integers(3, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([2, 4, 256]))
    places, captions, pictures = [], [], []
    for photograph in range(photographs_):
        height, width = draw(st.sampled_from([(8, 8), (8, 16), (40, 24)]))
        for view in ("a", "b"):
            for light in range(lights):
                places.append(Place(f"p{photograph}", view, f"l{light}"))
                captions.append(f"picture of {photograph}, {view}")
                grain = draw(st.sampled_from([1, 8]))
                small = rng.integers(0, levels, (height // grain, width // grain, 3)) * (255 // (levels - 1))
                pictures.append(np.kron(small, np.ones((grain, grain, 1), int)).astype(np.uint8))
    for _ in range(draw(st.integers(0, 3))):
        one, other = rng.integers(len(pictures), size=2)
        pictures[one] = pictures[other].copy()
    return set_of(pictures, captions, places, seed=draw(st.integers(0, 9)))


@given(sets())
@settings(deadline=None, max_examples=20)
def test_true_answers_have_full_marks_on_any_set(of):
    verdicts = judged_on_answers(of, 60)
    if len(pairs(of, 50)) < 50:
        assert not verdicts.pop(1).judged
    for verdict in verdicts:
        assert verdict.judged and verdict.value == 1 and set(verdict.chart.x) == {0}
        assert all(case.passed and "nearest to the answer" in case.note for case in verdict.cases)


@pytest.mark.parametrize("make", [eval_set, photographs])
def test_true_answers_have_full_marks_on_scenes_and_photographs(make):
    for verdict, questions in zip(judged_on_answers(make(), 10_000), (40, 240, 40), strict=True):
        numbers = verdict.numbers
        assert verdict.judged and verdict.value == numbers["retrieved"] == 1
        assert numbers["questions"] == len(verdict.cases) == questions and all(case.passed for case in verdict.cases)
        assert (numbers["rank_worst"], numbers["psnr_worst_db"]) == (1, 99)
        assert numbers["right_row"] == numbers["right_light"] == 1
        assert set(verdict.chart.x) == {0}  # the distance to the answer
