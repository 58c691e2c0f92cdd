"""`score/report.html`: one file, without scripts, that a person reads from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fluxdit_jax.loader.reader import RecordSource, spread
from fluxdit_jax.pages import charts
from fluxdit_jax.pages.parts import document, picture, row, text
from fluxdit_jax.quality import files
from fluxdit_jax.quality.answers import Answers
from fluxdit_jax.quality.exam import Exam, thumbnail
from fluxdit_jax.quality.measured import Measured
from fluxdit_jax.quality.scores import KINDS, Kind, Scores, written
from fluxdit_jax.shared import image_grid
from fluxdit_jax.shared.atomic_files import write_whole
from fluxdit_jax.shared.sanitize import shown
from fluxdit_jax.vae.decoder import Decoder, decode_all

SHOWN = 12  # pairs of a kind
_WIDTH, _HEIGHT, _LEFT, _RIGHT = 620, 64, 16, 16


def write_page(
    exam: Exam,
    answers: Answers,
    scores: Scores,
    report: dict[str, Any],
    train: RecordSource,
    decoder: Decoder,
    folder: Path,
) -> None:
    """Writes the page atomically, with curves over the steps that were scored in the same way.

    Args:
      report: the content of `score.json`.
      train: the training split, whose nearest pictures are shown. decoder: of the VAE.
    """
    earlier = files.history(report, folder)
    body = [
        f"<header><h1>Step {report['step']:,}: {report['questions']:,} captions that were not trained on</h1>",
        f"<p>{text(_about(report))}</p></header>",
        *(f"<section><p>{text(note)}</p></section>" for note in report["notes"]),
        *(_number(name, one, earlier) for name, one in scores.numbers.items()),
        _modes(exam, answers, scores),
        _questions(exam, answers, scores),
        _nearest(exam, answers, scores, train, decoder),
        _particulars(report),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(
        folder / files.REPORT,
        document(f"score of {shown(Path(report['workdir']).name)}, step {report['step']:,}", "".join(body)),
    )


def _about(report: dict[str, Any]) -> str:
    sampling, eye = report["sampling"], report["eye"]
    return (
        f"{shown(report['workdir'])} after {report['epochs']:.1f} epochs of {shown(report['dataset'])}. Drawn from the "
        f"caption alone, guidance {sampling['guidance_text']:g}, {sampling['method']} in {sampling['steps']} steps; "
        f"seen by {eye['encoder']}. Intervals are of 95 % over captions."
    )


def _number(name: str, one: Measured, reports: list[dict[str, Any]]) -> str:
    kind = KINDS[name]
    interval = f"{written(one.low, kind)} to {written(one.high, kind)}, {one.count:,} of them"
    return (
        f'<section id="{text(name)}"><h2>{text(kind.title)}: {text(written(one.value, kind))} '
        f"<small>{text(interval)}</small></h2>"
        f'<p class="question">{text(kind.question)}</p>{_scale(one, kind)}{_curve(name, one, reports)}</section>'
    )


def _curve(name: str, one: Measured, reports: list[dict[str, Any]]) -> str:
    """The number over the steps at which it was measured in the same way; "" for one step."""
    points = []
    for report in reports:
        found = report["numbers"].get(name)
        if found is not None and found["value"] is not None:
            low, high = (math.nan if found[side] is None else found[side] for side in ("low", "high"))
            points.append((report["step"], found["value"], low, high))
    if len(points) < 2:
        return ""
    drawn = charts.line(points, one.best, "step", name, lambda value: written(value, KINDS[name]))
    return f'<figure class="curve"><figcaption>over the run; dashed: true pictures</figcaption>{drawn}</figure>'


def _scale(one: Measured, kind: Kind) -> str:
    """A line from what useless to what true pictures have, with the number and its interval on it."""
    sides = [(word, value, "good") for word, value in one.best.items()]
    sides += [(word, value, "bad") for word, value in one.worst.items()]
    values = [one.value, *(v for v in (one.low, one.high) if math.isfinite(v)), *(value for _, value, _ in sides)]
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)

    parts = [f'<line class="tick" x1="{_LEFT}" y1="20" x2="{_WIDTH - _RIGHT}" y2="20"/>']
    if math.isfinite(one.low):
        parts.append(f'<line class="mean" x1="{place(one.low):.1f}" y1="20" x2="{place(one.high):.1f}" y2="20"/>')
    for word, value, name in sides:
        title = f"<title>{text(word)}: {text(written(value, kind))}</title>"
        parts.append(f'<circle class="{name}" cx="{place(value):.1f}" cy="20" r="5">{title}</circle>')
    parts.append(f'<line class="limit" x1="{place(one.value):.1f}" y1="6" x2="{place(one.value):.1f}" y2="34"/>')
    parts.append(
        f'<text x="{place(one.value):.1f}" y="50" text-anchor="middle">{text(written(one.value, kind))}</text>'
    )
    drawn = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(kind.title)}">{"".join(parts)}</svg>'
    rows = [row(word, written(value, kind)) for word, value, _ in sides]
    legend = "dashed: this run, with its interval" + "; green: what true pictures have; red: useless ones" * bool(sides)
    figure = f"<figure><figcaption>{legend}</figcaption>{drawn}</figure>"
    return f'<div class="beside"><table>{"".join(rows)}</table>{figure}</div>'


def _modes(exam: Exam, answers: Answers, scores: Scores) -> str:
    if not scores.modes:
        return ""
    parts = ["<section><h2>Collapsed modes</h2><p>Drawings for different captions that are one picture.</p>"]
    for mode in scores.modes[:SHOWN]:
        pictures = "".join(picture(answers.pictures[k], exam.caption(k)[:80]) for k in mode.rows[:4])
        parts.append(f'<h3>{len(mode.rows):,} captions</h3><div class="row">{pictures}</div>')
    return "".join([*parts, "</section>"])


def _questions(exam: Exam, answers: Answers, scores: Scores) -> str:
    """Captions whose picture was found, in the middle, and lost."""
    order = np.argsort(scores.ranks, kind="stable")
    middle = max(0, (len(order) - SHOWN) // 2)
    parts = ["<section><h2>Captions and what was drawn for them</h2>"]
    shown = [
        ("the true picture is nearest", order[:SHOWN]),
        ("in the middle", order[middle : middle + SHOWN]),
        ("farthest from the true picture", order[::-1][:SHOWN]),
    ]
    for title, rows in shown if len(order) >= 3 * SHOWN else [("all, by the rank of the true picture", order)]:
        parts.append(f'<h3>{title}</h3><div class="cases narrow">')
        for k in rows:
            pair = picture(exam.pictures[k], "held out") + picture(answers.pictures[k], "drawn")
            label = f"{text(exam.caption(k)[:200])}<small>rank {scores.ranks[k]:,} of {len(order):,}</small>"
            parts.append(f'<article><div class="row">{pair}</div><p>{label}</p></article>')
        parts.append("</div>")
    return "".join([*parts, "</section>"])


def _nearest(exam: Exam, answers: Answers, scores: Scores, train: RecordSource, decoder: Decoder) -> str:
    """The drawings that are nearest to a training picture, beside it."""
    found = scores.copies
    order = np.argsort(found.distance, kind="stable")[:SHOWN]
    records = [train[exam.train[found.train[k]]] for k in order]
    originals: Sequence[np.ndarray] = [thumbnail(one) for one in decode_all(decoder, [r.latent for r in records])]
    parts = [
        "<section><h2>Nearest to a training picture</h2><p>By the distance of their vectors; "
        f"up to {found.threshold:.3f} it counts as a copy. Copies of other training pictures than the "
        f"{len(exam.train):,} compared with are not seen.</p>",
        '<div class="cases narrow">',
    ]
    for k, original in zip(order, originals, strict=True):
        name = "bad" if found.distance[k] <= found.threshold else "good"
        pair = picture(original, "trained on") + picture(answers.pictures[k], "drawn")
        label = f"{text(exam.caption(k)[:200])}<small>distance {found.distance[k]:.3f}</small>"
        parts.append(f'<article class="{name}"><div class="row">{pair}</div><p>{label}</p></article>')
    return "".join([*parts, "</div></section>"])


def _particulars(report: dict[str, Any]) -> str:
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    rows = [row("training pictures compared with", f"{report['references']:,}"), row("time", seconds)]
    rows += [row(name, report[name]) for name in ("digest", "device", "made") if name in report]
    return f"<section><h2>Particulars</h2><table>{''.join(rows)}</table></section>"


def draw_pairs(exam: Exam, names: list[str], answers: Sequence[Answers], path: Path) -> None:
    """A sheet of captions spread over all: the held-out picture, and what each model drew from the same noise."""
    rows = spread(len(exam.questions), 2 * SHOWN)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = image_grid.grid(
        [[exam.pictures[k], *(one.pictures[k] for one in answers)] for k in rows],
        column_titles=["held out", *map(shown, names)],
        row_titles=[exam.caption(k) for k in rows],
    )
    image_grid.save(sheet, path)
