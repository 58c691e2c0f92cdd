"""Test 3, text edit: the caption of the photograph's other view with A's vector gives the other view in A's light."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.memorisation import from_other_noise
from fluxdit_jax.gate.retrieval import Library
from fluxdit_jax.gate.sampler import Draw, Request
from fluxdit_jax.gate.verdict import Case, Control, Verdict, failed_controls, not_judged, percent
from fluxdit_jax.loader.reader import spread

RIGHT = 0.90  # share of the cases that must give the other view
MIN_CASES = 10  # cases
UNCHANGED = 0.90  # share of the cases that must stay what they are where nothing was said of them
TITLE = ("text_edit", "Text edit")
QUESTION = "Does changing a few words of the caption give the photograph that they describe, in the same light?"
# Tried in this order: words that say nothing of what the picture shows.
UNRELATED = (
    ("portrait of", "picture of"),
    ("photo of", "picture of"),
    ("photograph of", "picture of"),
    ("image of", "picture of"),
    ("picture of", "image of"),
    ("in front of", "before"),
    ("there is", "we see"),
    ("with", "having"),
    ("a", "one"),
    ("looking", "facing"),  # `preprocess subset` adds it to captions without a direction
)

Encode = Callable[[list[str]], list[dict[str, np.ndarray]]]


class EditError(Exception):
    """The words to change are not of the form OLD=>NEW, or no caption has them."""


def edited(caption: str, old: str, new: str) -> str | None:
    """The caption with the whole words `old` replaced by `new`, whatever their case; None if it has none."""
    before = r"(?<!\w)" if re.match(r"\w", old) else ""
    after = r"(?!\w)" if re.search(r"\w$", old) else ""
    result = re.sub(before + re.escape(old) + after, lambda _: new, caption, flags=re.IGNORECASE)
    return result if result != caption else None


def choose_unrelated(captions: list[str], given: str | None) -> tuple[str, str]:
    """(old, new) words that say nothing of what the picture shows: the given "OLD=>NEW", or from `UNRELATED`.

    Raises:
      EditError: the given one is not of that form or in no caption, or there is none that most captions have.
    """
    if given is not None:
        old, _, new = (part.strip() for part in given.partition("=>"))
        if not (old and new) or not any(edited(caption, old, new) for caption in captions):
            raise EditError(f"--unrelated {given!r} must be 'OLD=>NEW' with words that captions have")
        return old, new
    for old, new in UNRELATED:
        if sum(edited(caption, old, new) is not None for caption in captions) >= len(captions) / 2:
            return old, new
    raise EditError("no harmless word is common to the captions: give one to change, --unrelated 'OLD=>NEW'")


@dataclasses.dataclass(frozen=True, eq=False)
class TextEdit:
    """The plan. Case k is (a record, the record that is right once its caption is edited).

    Attributes:
      edited: the answer's caption with the record's vector.
      unrelated: the record's own caption with another word changed; None where the caption lacks it.
      moved: the record's own caption from another noise.
      words: what `unrelated` changes.
    """

    eval_set: EvalSet
    cases: list[tuple[int, int]]
    possible: int
    edited: list[Request]
    unrelated: list[Request | None]
    moved: list[Request]
    words: tuple[str, str]

    @classmethod
    def plan(cls, eval_set: EvalSet, limit: int, unrelated: str | None, encode: Encode) -> TextEdit:
        """
        Args:
          limit: cases at most; spread evenly over the records.
          unrelated: "OLD=>NEW" for the control; None: found in the captions.
          encode: what is made from captions, by name; asked only for those that no record has.

        Raises:
          EditError: see `choose_unrelated`.
        """
        every = [
            (index, other)
            for index, place in enumerate(eval_set.places)
            for row in eval_set.rows
            if place is not None and row[0] == place.photograph and row != place.row
            and (other := eval_set.at(row, place.light)) is not None
        ]  # fmt: skip
        if len(every) < MIN_CASES:
            return cls(eval_set, [], len(every), [], [], [], ("", ""))
        cases = [every[k] for k in spread(len(every), limit)]
        words = choose_unrelated([record.caption for record in eval_set.records], unrelated)
        changed = [edited(eval_set.caption(index), *words) for index, _ in cases]
        new = sorted({caption for caption in changed if caption})
        made = dict(zip(new, encode(new) if new else [], strict=True))

        def with_words_of(index: int, other: int) -> Request:
            record = eval_set.records[other]
            of_words = {name: record.conditions[name] for name in eval_set.of_caption}
            return eval_set.request(index, index, caption=record.caption, made=of_words)

        return cls(
            eval_set,
            cases,
            len(every),
            [with_words_of(index, answer) for index, answer in cases],
            [
                None if caption is None else eval_set.request(index, index, caption=caption, made=made[caption])
                for (index, _), caption in zip(cases, changed)
            ],
            [from_other_noise(eval_set, index) for index, _ in cases],
            words,
        )

    def requests(self) -> list[Request]:
        return [*self.edited, *(one for one in self.unrelated if one is not None), *self.moved]

    def measure(self, draw: Draw, library: Library) -> Verdict:
        if self.possible < MIN_CASES:
            why = f"which has {self.possible} pictures of a photograph's other view"
            return not_judged(*TITLE, QUESTION, RIGHT, why, self.eval_set.left_out)
        eval_set = self.eval_set
        own, answers = (list(indices) for indices in zip(*self.cases))
        drawn = draw(self.edited)
        found = library.retrieve(drawn, answers)
        asked = [(one, index) for one, index in zip(self.unrelated, own) if one is not None]
        unrelated = library.retrieve(draw([one for one, _ in asked]), [index for _, index in asked])
        moved = library.retrieve(draw(self.moved), own)
        rows = [None if place is None else place.row for place in eval_set.places]
        stayed = float(np.mean([rows[index] == rows[nearest] for index, nearest in zip(own, found.nearest)]))
        controls = (
            Control(
                "the same caption from another noise",
                "the picture must stay what it is: it is the words that change it",
                moved.share,
                UNCHANGED,
                at_most=False,
            ),
            Control(
                f"an unrelated word: {self.words[0]!r} becomes {self.words[1]!r}",
                "the picture must stay what it is: it is these words that change it, and not any",
                unrelated.share,
                UNCHANGED,
                at_most=False,
            ),
        )
        reasons = []
        if len(self.cases) < MIN_CASES:
            reasons.append(f"only {len(self.cases)} captions are edited; at least {MIN_CASES} are needed to judge")
        if found.share < RIGHT:
            reasons.append(
                f"{percent(found.share)} of the edited captions give the answer, {percent(RIGHT)} are needed: "
                f"{percent(found.share_alike('row') or 0)} the view that is asked for, {percent(stayed)} the old one, "
                f"{percent(found.share_alike('light') or 0)} the same light"
            )
        reasons += failed_controls(controls)
        return Verdict(
            name=TITLE[0],
            title=TITLE[1],
            question=QUESTION,
            value=found.share,
            threshold=RIGHT,
            statement=f"{int(found.hit.sum())} of {len(self.cases)} edited captions give the view that they describe "
            f"(chance {percent(1 / len(eval_set))})",
            numbers=found.numbers() | {"stayed": stayed, "unrelated_asked": len(asked)},
            controls=controls,
            reasons=tuple(reasons),
            cases=tuple(
                Case(
                    f"{eval_set.caption(index)} => {eval_set.caption(answer)}",
                    found.note(k),
                    float(found.margin[k]),
                    bool(found.hit[k]),
                    (("A", eval_set.truths[index]), ("the answer", eval_set.truths[answer]), ("drawn", drawn[k])),
                    answer,
                )
                for k, (index, answer) in enumerate(self.cases)
            ),
            chart=found.chart(),
        )
