"""Test 3, text edit: changing a word of the caption moves the subject the way the word says, and nothing else does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from fluxdit_jax.dataset.fields import of_captions
from fluxdit_jax.gate.album import Album
from fluxdit_jax.gate.displacement import Displacement, displacement
from fluxdit_jax.gate.image_metrics import structure
from fluxdit_jax.gate.painter import Draw, Wanted
from fluxdit_jax.gate.pairing import derangements
from fluxdit_jax.gate.verdict import Case, Chart, Control, Verdict, failed_controls, percent
from fluxdit_jax.loader.reader import spread
from fluxdit_jax.shared.edit_rules import Rule, edited

RIGHT = 0.90  # share of the cases in which the subject must move the right way
MIN_CASES = 10  # cases
MOVED = 0.02  # share of the side; less is no movement (the structure map has 64 pixels)
MIN_STRUCTURE = 0.35  # structure of the unedited picture against its original; unrelated pictures stay below 0.3
UNMOVED = 0.10  # share of the cases that an unrelated word may move


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """The plan. Case k is a record and a rule; all pictures of a case have the record's vector and size.

    Attributes:
      cases: (record, rule, edited caption).
      plain, edited: the unedited and the edited caption, from the record's noise.
      unrelated: the caption with another word changed, from the same noise; None where the caption lacks it.
      seeds: the unedited caption from other noises.
      words: what `unrelated` changes.
    """

    album: Album
    cases: list[tuple[int, Rule, str]]
    plain: list[Wanted]
    edited: list[Wanted]
    unrelated: list[Wanted | None]
    seeds: list[list[Wanted]]
    words: tuple[str, str]

    @classmethod
    def plan(
        cls,
        album: Album,
        rules: list[Rule],
        words: tuple[str, str],
        limit: int,
        encode: Callable[[list[str]], list[dict[str, np.ndarray]]],
    ) -> Edit:
        """
        Args:
          limit: cases at most; spread evenly over the rules and the records.
          encode: what is made from captions, by name; asked only for those that no record has.
        """
        by_rule = [
            [(i, rule, new) for i in range(len(album)) if (new := edited(album.caption(i), rule.old, rule.new))]
            for rule in rules
        ]
        share = max(1, limit // len(rules))
        cases = [cases[k] for cases in by_rule for k in spread(len(cases), share)]
        changed = [edited(album.caption(i), *words) for i, _, _ in cases]
        texts = {
            record.caption: {field.name: record.conditions[field.name] for field in of_captions(record.layout())}
            for record in album.records
        }
        unknown = sorted({c for c in [*(case[2] for case in cases), *changed] if c and c not in texts})
        texts.update(zip(unknown, encode(unknown) if unknown else [], strict=True))

        # Test 1 draws each record's conditions from the noise of another: that picture is one of its seeds here.
        shuffled_with = np.argsort(next(derangements(album)))

        def draw_of(index: int, caption: str) -> Wanted:
            return album.wanted(index, index, index, caption=caption, made=texts[caption])

        return cls(
            album,
            cases,
            [draw_of(i, album.caption(i)) for i, _, _ in cases],
            [draw_of(i, caption) for i, _, caption in cases],
            [None if caption is None else draw_of(case[0], caption) for case, caption in zip(cases, changed)],
            [_other_seeds(album, i, int(shuffled_with[i])) for i, _, _ in cases],
            words,
        )

    def wanted(self) -> list[Wanted]:
        unrelated = [one for one in self.unrelated if one is not None]
        return [*self.plain, *self.edited, *unrelated, *(one for seeds in self.seeds for one in seeds)]

    def measure(self, draw: Draw) -> Verdict:
        album = self.album
        plain, changed = draw(self.plain), draw(self.edited)
        moves = [displacement(p, e, case[1].axis) for p, e, case in zip(plain, changed, self.cases, strict=True)]
        likeness = [float(structure(p) @ album.structures[case[0]]) for p, case in zip(plain, self.cases)]
        # A picture that is not the one expected gives no score, whatever seems to move in it.
        shifts = [
            move.along(case[1].sign) if alike >= MIN_STRUCTURE else None
            for move, alike, case in zip(moves, likeness, self.cases)
        ]
        right = np.array([shift is not None and shift > MOVED for shift in shifts])
        effect = float(np.median([shift or 0.0 for shift in shifts]))
        over_seeds = self._over_seeds(draw, plain)
        unrelated = self._unrelated(draw, plain)
        calibration = self._calibrate()

        over = [abs(shift) for shift in over_seeds if shift is not None]
        noise = float(np.quantile(over, 0.9)) if over else 1.0
        lost = float(np.mean([shift is None for shift in over_seeds]))
        moved = float(np.mean([shift is None or abs(shift) > MOVED for shift in unrelated]))
        controls = (
            Control(
                "the same caption from other noises",
                "the subject must stand still: nine of ten movements must be below half of what the words do",
                noise,
                max(effect / 2, 0.0),
                at_most=True,
                unit="width",
            ),
            Control(
                f"an unrelated word: {self.words[0].strip()!r} becomes {self.words[1].strip()!r}",
                "share of the pictures in which something moves or nothing can be recognised any more",
                moved,
                UNMOVED,
                at_most=True,
            ),
        )
        numbers: dict[str, Any] = {
            "cases": len(self.cases),
            "rules": [f"{r.old} => {r.new}: {r.direction}" for r in dict.fromkeys(c[1] for c in self.cases)],
            "right_way": float(right.mean()),
            "effect_median": effect,
            "not_measurable": float(np.mean([shift is None for shift in shifts])),
            "wrong_way": float(np.mean([shift is not None and shift < -MOVED for shift in shifts])),
            "seed_spread": noise,
            "seeds_measured": len(over_seeds),
            "seeds_not_recognised": lost,
            "unrelated_median": float(np.median([abs(shift or 0.0) for shift in unrelated])),
            "unedited_like_original": float(np.median(likeness)),
            "calibration": calibration,
            **self._against_the_truth(changed),
        }
        reasons = []
        if len(self.cases) < MIN_CASES:
            reasons.append(f"only {len(self.cases)} captions can be edited; at least {MIN_CASES} are needed to judge")
        if right.mean() < RIGHT:
            reasons.append(
                f"the subject moves the right way in {percent(right.mean())} of the cases, {percent(RIGHT)} are "
                f"needed ({percent(numbers['wrong_way'])} the wrong way, "
                f"{percent(numbers['not_measurable'])} not recognisable)"
            )
        if lost > UNMOVED:
            reasons.append(f"the model is not stable: {percent(lost)} of its pictures from other noises are others")
        if calibration and calibration["right_way"] < 1:
            reasons.append(
                f"the measure itself is right on only {percent(calibration['right_way'])} of the true pairs of "
                "this set: its verdict means nothing here; test another edit"
            )
        reasons += failed_controls(controls)
        return Verdict(
            name="text_edit",
            title="Text edit",
            question="Does changing a word of the caption move the subject the way the word says, and nothing else?",
            value=float(right.mean()),
            threshold=RIGHT,
            statement=f"in {int(right.sum())} of {len(self.cases)} cases the subject moves the right way, by "
            f"{percent(effect)} of the side in the median; between noises by {percent(noise)}",
            numbers=numbers,
            controls=controls,
            reasons=tuple(reasons),
            cases=tuple(
                self._case(k, plain[k], changed[k], shifts[k], moves[k], bool(right[k])) for k in range(len(self.cases))
            ),
            chart=Chart(
                "Every case: how far did the subject move, and is it still the same scene?",
                "displacement the right way (share of the side)",
                "structure found again",
                tuple(0.0 if shift is None else shift for shift in shifts),
                tuple(move.found for move in moves),
                tuple(bool(v) for v in right),
                (MOVED,),
            ),
        )

    def _over_seeds(self, draw: Draw, plain: list[np.ndarray]) -> list[float | None]:
        flat = iter(draw([one for seeds in self.seeds for one in seeds]))
        return [
            displacement(before, next(flat), case[1].axis).shift
            for before, seeds, case in zip(plain, self.seeds, self.cases)
            for _ in seeds
        ]

    def _unrelated(self, draw: Draw, plain: list[np.ndarray]) -> list[float | None]:
        chosen = {k: one for k, one in enumerate(self.unrelated) if one is not None}
        images = draw(list(chosen.values()))
        shifts = [displacement(plain[k], image, self.cases[k][1].axis).shift for k, image in zip(chosen, images)]
        return shifts or [None]

    def _calibrate(self) -> dict[str, Any]:
        """The measure on true pictures: what it says where the right answer is in the set. Empty if it is nowhere."""
        album = self.album
        shifts = []
        for rule in dict.fromkeys(case[1] for case in self.cases):
            for index in range(len(album)):
                caption = edited(album.caption(index), rule.old, rule.new)
                answer = None if caption is None else album.true_answer(caption, index)
                if answer is None or album.truths[answer].shape != album.truths[index].shape:
                    continue
                move = displacement(album.truths[index], album.truths[answer], rule.axis)
                shifts.append(move.along(rule.sign))
        if not shifts:
            return {}
        known = [shift for shift in shifts if shift is not None]
        return {
            "true_pairs": len(shifts),
            "right_way": float(np.mean([shift is not None and shift > MOVED for shift in shifts])),
            "median": float(np.median(known)) if known else None,
            "least": min(known, default=None),
            "most": max(known, default=None),
        }

    def _against_the_truth(self, changed: list[np.ndarray]) -> dict[str, Any]:
        answers = [self.album.true_answer(caption, index) for index, _, caption in self.cases]
        known = [k for k, answer in enumerate(answers) if answer is not None]
        if not known:
            return {"true_answers_known": 0}
        nearest = self.album.nearest([changed[k] for k in known])
        return {
            "true_answers_known": len(known),
            "exactly_the_true_answer": float((nearest == [answers[k] for k in known]).mean()),
        }

    def _case(
        self,
        k: int,
        plain: np.ndarray,
        changed: np.ndarray,
        shift: float | None,
        move: Displacement,
        right: bool,
    ) -> Case:
        index, rule, caption = self.cases[k]
        shown = [("original", self.album.truths[index]), ("drawn", plain), ("edited", changed)]
        answer = self.album.true_answer(caption, index)
        if answer is not None:
            shown.append(("the truth", self.album.truths[answer]))
        went = "not the picture expected" if shift is None else f"{percent(shift)} to the {rule.direction}"
        return Case(
            f"{self.album.caption(index)} | {rule.old} => {rule.new}",
            f"{went}; {percent(move.found)} of the structure found again",
            -1.0 if shift is None else float(shift),
            right,
            tuple(shown),
        )


def _other_seeds(album: Album, index: int, source: int) -> list[Wanted]:
    """A record's picture from two other noises; the first is that of the record `source` if it has the same size."""
    fresh = album.wanted(index, index, index, seed=album.seed + 1_000_000 + index)
    if album.grid(source) == album.grid(index):
        return [album.wanted(index, index, source), fresh]
    return [album.wanted(index, index, index, seed=album.seed + 2_000_000 + index), fresh]
