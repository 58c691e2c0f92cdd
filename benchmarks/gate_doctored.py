"""Does the gate fail for the right reason? The weights of a run that passes, broken in one way each.

    python -m benchmarks.gate_doctored RUN [RUN ...]

The run's dataset must be a gate set. The true pictures are put in for the drawn ones, too: every test must find all of
them right. A run that is in the results already is measured again and replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.environment import replace_rows, table
from fluxdit_jax.dataset.grid import Place
from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.retrieval import Library
from fluxdit_jax.gate.sampler import Draw, Request, Sampler
from fluxdit_jax.gate.subject import Subject
from fluxdit_jax.gate.verdict import grade
from fluxdit_jax.model import dit
from fluxdit_jax.sampling.pipeline import Generator

NAME = "gate_doctored"
TESTS = ("memorisation", "vision_swap", "text_edit")
Change = Callable[[Request], Request]


class Asked:
    """What requests ask for, in records of a gate set, and how to ask for something else."""

    def __init__(self, eval_set: EvalSet):
        self.set = eval_set
        self.places: list[Place] = [place for place in eval_set.places if place is not None]
        if len(self.places) < len(eval_set):
            raise SystemExit("the run's dataset is no gate set: make one with `python -m preprocess subset`")
        self._captions = {eval_set.caption(i): i for i in reversed(range(len(eval_set)))}
        self._vectors = {record.vision.tobytes(): i for i, record in enumerate(eval_set.records)}

    def caption(self, one: Request) -> int:
        """A record with the caption, or with the one most like it."""
        return self._captions[difflib.get_close_matches(one.caption, self._captions, 1, 0.0)[0]]

    def vector(self, one: Request) -> int | None:
        """The record with the vector; None if none is given, or that of no record."""
        return self._vectors.get(one.conditions["vision"].tobytes()) if "vision" in one.conditions else None

    def own_photograph(self, one: Request) -> int | None:
        """The record with the vector, if it shows the caption's photograph."""
        shown, caption = self.vector(one), self.places[self.caption(one)]
        return shown if shown is not None and self.places[shown].photograph == caption.photograph else None

    def silenced(self, one: Request, names: Sequence[str]) -> Request:
        rest = {name: value for name, value in one.conditions.items() if name not in names}
        return dataclasses.replace(one, conditions=rest)

    def without_caption(self, one: Request) -> Request:
        return self.silenced(one, self.set.of_caption)

    def with_caption(self, one: Request, index: int) -> Request:
        """With another record's caption, and what is made from it, where one is given."""
        other = self.set.records[index].conditions
        conditions = {
            name: other[name] if name in self.set.of_caption else value for name, value in one.conditions.items()
        }
        return dataclasses.replace(one, caption=self.set.caption(index), conditions=conditions)

    def with_vector(self, one: Request, index: int) -> Request:
        """With another record's vector, where one is given."""
        vector = self.set.records[index].vision
        conditions = {name: vector if name == "vision" else value for name, value in one.conditions.items()}
        return dataclasses.replace(one, conditions=conditions)

    def truth(self, one: Request) -> np.ndarray:
        """The right picture: the caption's photograph and view under the vector's light."""
        vector = self.vector(one)
        light = self.set.lights[0] if vector is None else self.places[vector].light
        right = self.set.at(self.places[self.caption(one)].row, light)
        return self.set.truths[self.caption(one) if right is None else right]


def changes(asked: Asked) -> dict[str, Change]:
    """By name, what the weights are asked for instead."""
    rows, eval_set = asked.set.rows, asked.set

    def permuted(one: Request) -> Request:
        place = asked.places[asked.caption(one)]
        other = eval_set.at(rows[(rows.index(place.row) + 3) % len(rows)], place.light)
        return asked.with_caption(one, 0 if other is None else other)

    def view_of_vector(one: Request) -> Request:
        shown = asked.own_photograph(one)
        return one if shown is None else asked.with_caption(one, shown)

    def light_forgotten(one: Request) -> Request:
        strange = asked.vector(one) is not None and asked.own_photograph(one) is None
        return asked.with_vector(one, asked.caption(one)) if strange else one

    return {
        "as it was trained": lambda one: one,
        "caption silenced": asked.without_caption,
        "vector silenced": lambda one: asked.silenced(one, ["vision"]),
        "one caption, whatever is asked": lambda one: asked.with_caption(one, 0),
        "one vector, whatever is given": lambda one: asked.with_vector(one, 0),
        "captions permuted": permuted,
        "the view is the vector's": view_of_vector,
        "the vector of another photograph ignored": light_forgotten,
    }


def models(subject: Subject, asked: Asked) -> Iterator[tuple[str, Draw]]:
    """(name, what draws)."""
    generator = Generator.of(subject.settings, subject.manifest, steps=6, batch_size=20, method="rk3")
    sampler = Sampler(generator, subject.weights.ema, subject.decoder)
    untrained = Sampler(generator, dit.initialize(subject.settings.model, jax.random.key(0)), subject.decoder)

    yield "the true pictures", lambda requests: [asked.truth(one) for one in requests]
    for name, change in changes(asked).items():
        yield name, lambda requests, change=change: sampler([change(one) for one in requests])
    yield "untrained weights", untrained
    yield "grey", lambda requests: [np.full_like(asked.truth(one), 117) for one in requests]


def measure(run: Path, pairs: int, edits: int) -> list[dict[str, Any]]:
    """A row for each model."""
    subject = Subject.load(run, 200)
    asked, library = Asked(subject.eval_set), Library(subject.eval_set)
    tests = subject.tests(pairs, edits)
    rows = []
    for name, draw in models(subject, asked):
        verdicts = {verdict.name: verdict for verdict in (test.measure(draw, library) for test in tests)}
        rows.append({
            "run": run.name, "dataset": subject.directory.name, "step": subject.weights.step, "model": name,
            **{test: {"value": verdicts[test].value, "grade": grade(verdicts[test]),
                      "reasons": verdicts[test].reasons} for test in TESTS},
        })  # fmt: skip
        print(show(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        return [f"{row[test]['grade']} {row[test]['value']:.0%}" for test in TESTS]

    lines = [[row["dataset"], row["model"], *cells(row)] for row in rows]
    return table(["dataset", "model", "memorisation", "vision swap", "text edit"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--edits", type=int, default=40)
    arguments = parser.parse_args()
    for run in arguments.runs:
        measured = measure(run, arguments.pairs, arguments.edits)
        replace_rows(NAME, run.name, measured)
        print(show(measured))


if __name__ == "__main__":
    main()
