"""What a test found: its value against its threshold, its controls, and the cases it is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fluxdit_jax.pages.charts import Chart


@dataclasses.dataclass(frozen=True)
class Control:
    """A measurement that shows that the test measures what it says. A test passes only if its controls do.

    Attributes:
      name: what was done instead.
      meaning: what it shows.
      value, bound: the measurement, and what it must be at least, or at most if `at_most`.
    """

    name: str
    meaning: str
    value: float
    bound: float
    at_most: bool

    @property
    def passed(self) -> bool:
        return bool(self.value <= self.bound if self.at_most else self.value >= self.bound)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "passed": self.passed}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One record, pair or edit.

    Attributes:
      label: what it is, in words; captions as they are.
      note: its numbers, in words.
      score: cases are ranked by it, the best highest.
      passed: whether it counts for the test.
      pictures: titles and uint8 [H, W, 3].
      answer: index of the picture of the set that is right.
    """

    label: str
    note: str
    score: float
    passed: bool
    pictures: tuple[tuple[str, np.ndarray], ...]
    answer: int = -1

    @property
    def drawn(self) -> np.ndarray:
        """The picture that was judged: the last of `pictures`."""
        return self.pictures[-1][1]


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """The outcome of one test of the gate.

    Attributes:
      name: key in the report. title, question: for people.
      value: the share that decides. threshold: what it must be at least.
      statement: the value in words.
      numbers: everything else that was measured; None where it could not be.
      controls: see `Control`.
      reasons: why it failed, in words; empty if it passed.
      advice: where to look first, in words, if it failed. causes: the cause that each of these speaks of.
      cases, chart: for the page.
      judged: False if the set does not allow the test; it has not passed then, and `reasons` says why.
    """

    name: str
    title: str
    question: str
    value: float
    threshold: float
    statement: str
    numbers: dict[str, Any]
    controls: tuple[Control, ...]
    reasons: tuple[str, ...]
    cases: tuple[Case, ...]
    chart: Chart | None = None
    advice: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    judged: bool = True

    @property
    def passed(self) -> bool:
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures."""
        return {
            "passed": self.passed,
            "judged": self.judged,
            "value": self.value,
            "threshold": self.threshold,
            "statement": self.statement,
            "numbers": self.numbers,
            "controls": [control.to_json() for control in self.controls],
            "reasons": list(self.reasons),
            "advice": list(self.advice),
            "cases": [
                {"label": case.label, "note": case.note, "score": case.score, "passed": case.passed}
                for case in self.cases
            ],
        }


MAKE_ONE = "make one with `python -m preprocess subset`"


def not_judged(name: str, title: str, question: str, threshold: float, why: str, left_out: int = 0) -> Verdict:
    """Of a test that this set does not allow, or the part of it under test; `left_out`: its other records."""
    way = f"--limit leaves {left_out} of its pictures out: give a larger one" if left_out else MAKE_ONE
    return Verdict(
        name=name,
        title=title,
        question=question,
        value=0.0,
        threshold=threshold,
        statement=f"cannot be judged on this set: {way}",
        numbers={},
        controls=(),
        reasons=(f"cannot be judged on this set, {why}: {way}",),
        cases=(),
        judged=False,
    )


def grade(verdict: Verdict) -> str:
    """ "pass", "FAIL" or "not judged"."""
    return "pass" if verdict.passed else "FAIL" if verdict.judged else "not judged"


def percent(share: float) -> str:
    """0.934 -> "93.4 %", without a decimal where it says nothing."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def failed_controls(controls: tuple[Control, ...]) -> list[str]:
    """A sentence for each control that failed."""
    return [
        f"control failed: {c.name}: {percent(c.value)}, must be at {'most' if c.at_most else 'least'} "
        f"{percent(c.bound)} ({c.meaning})"
        for c in controls
        if not c.passed
    ]
