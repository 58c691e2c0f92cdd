"""`validation/report.html`: one file, without scripts, that a person reads from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fluxdit_jax.gate.advice import by_cause
from fluxdit_jax.gate.report import chosen_cases
from fluxdit_jax.gate.sheet import LEGEND
from fluxdit_jax.gate.verdict import Case, Control, Verdict, grade, percent
from fluxdit_jax.pages import charts
from fluxdit_jax.pages.parts import document, jpeg, picture, row, text
from fluxdit_jax.shared.atomic_files import write_whole

WALL = 100  # pictures at most on the wall of originals and drawings, of a set that is no grid

# What the numbers of the tests are called, and how they are written: share, db, plain, count.
NAMES: dict[str, tuple[str, str]] = {
    "questions": ("pictures asked for", "count"),
    "retrieved": ("nearest to the answer among all of the set", "share"),
    "chance": ("... by chance", "share"),
    "rank_median": ("rank of the answer, median", "plain"),
    "rank_worst": ("rank of the answer, worst", "count"),
    "margin_median": ("the next picture is farther by, median (grey levels)", "plain"),
    "psnr_median_db": ("PSNR to the answer as the VAE keeps it, median", "db"),
    "psnr_worst_db": ("PSNR, worst", "db"),
    "right_row": ("nearest to one of the right photograph and view", "share"),
    "right_light": ("nearest to one in the right light", "share"),
    "twins": ("originals that are in the set twice, either counts", "count"),
    "by_caption_alone": ("from the caption alone", "share"),
    "by_caption_alone_right_row": ("from the caption alone: the right photograph and view", "share"),
    "by_vector_alone": ("from the vector alone", "share"),
    "by_vector_alone_right_light": ("from the vector alone: the right light", "share"),
    "distance_to_the_nearest": ("distance to the nearest original, median (grey levels)", "plain"),
    "usual_distance": ("... of two originals", "plain"),
    "contrast": ("contrast against the originals'", "share"),
    "roughness": ("roughness against the originals'", "share"),
    "stayed": ("nearest to one of the view before the edit", "share"),
    "unrelated_asked": ("captions with the unrelated word", "count"),
}


def write_page(
    verdicts: list[Verdict], report: dict[str, Any], log: list[dict[str, Any]], sheet: np.ndarray | None, path: Path
) -> None:
    """Writes the page atomically.

    Args:
      report: of `report.build_report`.
      log: the run's `metrics.jsonl`.
      sheet: of `sheet.draw_sheet`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(verdicts, report, log, sheet))


def page(
    verdicts: list[Verdict], report: dict[str, Any], log: list[dict[str, Any]], sheet: np.ndarray | None = None
) -> str:
    """The page as HTML text."""
    passed = report["passed"]
    open_ones = not passed and all(verdict.passed or not verdict.judged for verdict in verdicts)
    stamp = "PASS" if passed else "NOT JUDGED" if open_ones else "FAIL"
    body = [
        f'<header class="{"open" if open_ones else _grade(passed)}"><p class="stamp">{stamp}</p>',
        f"<h1>{_headline(verdicts)}</h1>",
        f"<p>{text(_about(report))}</p></header>",
        '<nav class="cards">' + "".join(_card(verdict) for verdict in verdicts) + "</nav>",
        _advice(verdicts),
        _everything(sheet, verdicts),
        *(_section(number, verdict) for number, verdict in enumerate(verdicts, start=1)),
        _training(log),
        _particulars(report),
    ]
    return document(f"{stamp}: validation of {Path(report['weights']['workdir']).name}", "".join(body))


def _grade(passed: bool) -> str:
    return "good" if passed else "bad"


def _headline(verdicts: list[Verdict]) -> str:
    failed = [verdict.title.lower() for verdict in verdicts if verdict.judged and not verdict.passed]
    if failed:
        return f"The model does not pass: {text(' and '.join(failed))}."
    if unknown := [verdict.title.lower() for verdict in verdicts if not verdict.judged]:
        return f"This set does not allow a judgement: {text(' and '.join(unknown))}."
    return "The model remembers its pictures, takes the light of another, and reads its captions."


def _class(verdict: Verdict) -> str:
    return _grade(verdict.passed) if verdict.judged else "open"


def _about(report: dict[str, Any]) -> str:
    model, data = report["model"], report["dataset"]
    return (
        f"EMA of step {report['weights']['ema_step']:,} of {report['weights']['workdir']}: "
        f"{model['parameters'] / 1e6:.1f} M parameters, width {model['width']}, depth {model['depth']}, "
        f"heads {model['heads']}; {data['records']} pictures of {data['path']}. "
        f"{report['sampling']['method']} in {report['sampling']['steps']} steps on {report['device']}, "
        f"{report['seconds']['total']:.0f} s in all, {report['made']}."
    )


def _card(verdict: Verdict) -> str:
    return (
        f'<a class="card {_class(verdict)}" href="#{verdict.name}"><h2>{text(verdict.title)}</h2>'
        f'<p class="big">{percent(verdict.value) if verdict.judged else "not judged"}</p>{_gauge(verdict)}'
        f"<p>{text(verdict.statement)}</p></a>"
    )


def _gauge(verdict: Verdict) -> str:
    return (
        f'<div class="gauge"><i style="width:{100 * min(1.0, max(0.0, verdict.value)):.1f}%"></i>'
        f'<b style="left:{100 * verdict.threshold:.1f}%" title="needed: {percent(verdict.threshold)}"></b></div>'
    )


def _section(number: int, verdict: Verdict) -> str:
    parts = [
        f'<section id="{verdict.name}"><h2><span class="mark {_class(verdict)}">'
        f"{grade(verdict).lower()}</span> {number}. {text(verdict.title)}</h2>",
        f'<p class="question">{text(verdict.question)}</p>',
        f"<p><strong>{text(verdict.statement)}</strong>; needed: {percent(verdict.threshold)}.</p>",
    ]
    if verdict.reasons:
        parts.append(_list("Why it failed" if verdict.judged else "Why it is not judged", verdict.reasons))
    if verdict.controls:
        parts.append("<h3>Controls</h3><table>" + "".join(_control(c) for c in verdict.controls) + "</table>")
    if verdict.numbers:
        parts.append('<div class="beside"><div>')
        parts.append("<h3>Numbers</h3><table>" + "".join(_numbers(verdict.numbers)) + "</table></div><div>")
        if verdict.chart is not None:
            labels = [f"{case.label}: {case.note}" for case in verdict.cases]
            parts.append(_figure(verdict.chart.title, charts.scatter(verdict.chart, labels)))
        if guidance := verdict.numbers.get("guidance"):
            parts.append(_figure("Over guidance scales", charts.shares(guidance, verdict.threshold, "guidance scale")))
        parts.append("</div></div>")
    for rank, cases in chosen_cases(verdict):
        parts.append(f"<h3>{text(rank)}</h3>{_cases(cases)}")
    parts.append("</section>")
    return "".join(parts)


def _figure(title: str, drawn: str) -> str:
    return f"<figure><figcaption>{text(title)}</figcaption>{drawn}</figure>"


def _everything(sheet: np.ndarray | None, verdicts: list[Verdict]) -> str:
    """All pictures of the set with all that was drawn of them; without a grid originals and drawings."""
    if sheet is None:
        return f"<section><h2>All pictures</h2>{_wall(verdicts[0].cases)}</section>"
    image = jpeg(sheet, longest=max(sheet.shape), quality=85)
    return (
        f'<section class="all"><h2>All pictures</h2><p>{text(LEGEND)}</p>'
        f'<img src="{image}" alt="photographs as rows, lights as columns"></section>'
    )


def _list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f'<h3>{title}</h3><ul class="why">{items}</ul>'


def _advice(verdicts: list[Verdict]) -> str:
    """The advice of all tests, once, by cause."""
    causes = by_cause(verdicts)
    if not causes:
        return ""
    lists = "".join(_list(text(f"{cause.name} ({', '.join(cause.tests)})"), cause.lines) for cause in causes)
    return f"<section><h2>Where to look first</h2>{lists}</section>"


def _control(control: Control) -> str:
    sign = "at most" if control.at_most else "at least"
    return (
        f'<tr><td><span class="mark {_grade(control.passed)}">{"ok" if control.passed else "failed"}</span></td>'
        f"<td>{text(control.name)}<small>{text(control.meaning)}</small></td>"
        f'<td class="number">{percent(control.value)}</td><td>{sign} {percent(control.bound)}</td></tr>'
    )


def _numbers(numbers: dict[str, Any]) -> list[str]:
    rows = []
    for key, value in numbers.items():
        if isinstance(value, dict):
            shares = ", ".join(f"{_format(part, 'plain')} {percent(share)}" for part, share in value.items())
            rows.append(row(key.replace("_", " "), shares))
        else:
            name, kind = NAMES.get(key, (key.replace("_", " "), "plain"))
            rows.append(row(name, _format(value, kind)))
    return rows


def _format(value: float | int | str | None, kind: str) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if kind == "share":
        return percent(value)
    if kind == "count":
        return str(value)
    return f"{value:.1f} dB" if kind == "db" else f"{value:.3g}"


def _cases(cases: Sequence[Case]) -> str:
    narrow = " narrow" if len(cases[0].pictures) < 3 else ""
    return f'<div class="cases{narrow}">{"".join(_case(case) for case in cases)}</div>'


def _case(case: Case) -> str:
    figures = "".join(picture(image, title) for title, image in case.pictures)
    return (
        f'<article class="{_grade(case.passed)}"><div class="row">{figures}</div>'
        f"<p>{text(case.label)}<small>{text(case.note)}</small></p></article>"
    )


def _wall(cases: Sequence[Case]) -> str:
    """All originals and all drawings as two sheets of small squares, in the same order."""
    shown = cases[:WALL]
    columns, side = min(10, max(1, len(shown))), 48
    sheets = []
    for which, title in ((0, "originals"), (1, "drawn from caption and vector")):
        sheet = np.full((side * -(-len(shown) // columns), side * columns, 3), 255, np.uint8)
        for k, case in enumerate(shown):
            small = Image.fromarray(case.pictures[which][1]).resize((side, side), Image.Resampling.LANCZOS)
            y, x = side * (k // columns), side * (k % columns)
            sheet[y : y + side, x : x + side] = np.asarray(small)
        source = jpeg(sheet, longest=side * columns, quality=85)
        sheets.append(f'<figure><img src="{source}" alt="{title}"><figcaption>{title}</figcaption></figure>')
    of_all = "" if len(shown) == len(cases) else f" (the first {len(shown)} of {len(cases)})"
    return f'<h3>all of them{of_all}</h3><div class="wall">{"".join(sheets)}</div>'


def _training(log: list[dict[str, Any]]) -> str:
    loss = [(entry["step"], entry["loss"]) for entry in log if entry.get("loss") is not None]
    drawn = charts.curve(loss, "step", "loss")
    if not drawn:
        return "<section><h2>Training</h2><p>The run logged no losses.</p></section>"
    last, rates = loss[-1], [entry["images_per_second"] for entry in log if entry.get("images_per_second")]
    rate = f", {np.median(rates):.0f} images a second" if rates else ""
    return (
        f"<section><h2>Training</h2><p>{last[0]:,} steps{rate}; the loss ends at {last[1]:.3f}.</p>"
        f'<figure class="curve">{drawn}</figure></section>'
    )


def _particulars(report: dict[str, Any]) -> str:
    weights = report["weights"]
    identity = f"EMA of step {weights['ema_step']:,}, digest {weights.get('digest') or 'not known'}"
    rows = [row("weights", identity)]
    rows += [
        row(f"{name} encoder", f"{e['id']} {e['revision']} (width {e['width']}, sha256 {e['sha256'][:16]})")
        for name, e in report["encoders"].items()
    ]
    model, data, sampling = report["model"], report["dataset"], report["sampling"]
    rows += [
        row("model family", ", ".join(f"{key} {value}" for key, value in model["family"].items())),
        row("data set", f"{data['name']}, format version {data['format_version']}, {data['resolution']} px"),
        row("pictures", _pictures(data)),
        row("shards", ", ".join(digest[:16] for digest in data["shards_sha256"][:8])),
        row("network evaluations", f"{sampling['network_evaluations']:,} (seed {sampling['seed']})"),
        row("time", ", ".join(f"{name} {value:.1f} s" for name, value in report["seconds"].items())),
    ]
    return f"<section><h2>Particulars</h2><table>{''.join(rows)}</table></section>"


def _pictures(data: dict[str, Any]) -> str:
    if data.get("drawn_portraits") is None:
        return f"{data['records']} in the set"
    drawn = f", {data['drawn_portraits']} of them drawn portraits of `preprocess demo`"
    return f"{data['pictures_tested']} of {data['records']} tested{drawn if data['drawn_portraits'] else ''}"
