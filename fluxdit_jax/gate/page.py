"""`validation/report.html`: one file, without scripts, that a person reads from top to bottom."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fluxdit_jax.gate import charts
from fluxdit_jax.gate.advice import by_cause
from fluxdit_jax.gate.report import chosen_cases
from fluxdit_jax.gate.style import CSS
from fluxdit_jax.gate.verdict import Case, Control, Verdict, percent
from fluxdit_jax.shared.atomic_files import write_whole

PICTURE = 192  # longer side at most, pixels; larger pictures are reduced
WALL = 100  # pictures at most on the wall of originals and drawings

# What the numbers of the tests are called, and how they are written: share, db, plain, count, side.
NAMES: dict[str, tuple[str, str]] = {
    "pictures": ("pictures", "count"),
    "retrieved": ("nearest to their own original", "share"),
    "twins": ("originals that are in the set twice, either counts", "count"),
    "psnr_median_db": ("PSNR to the VAE's reconstruction, median", "db"),
    "psnr_worst_db": ("PSNR, worst", "db"),
    "ssim_median": ("SSIM, median", "plain"),
    "ssim_worst": ("SSIM, worst", "plain"),
    "right_caption": ("nearest to an original with the right caption", "share"),
    "structure": ("likeness of structure to the original, median", "plain"),
    "structure_of_the_nearest": ("likeness of structure to any original, median", "plain"),
    "tone_difference": ("difference in tone to the original, median (CIE76)", "plain"),
    "contrast": ("contrast against the originals'", "share"),
    "roughness": ("roughness against the originals'", "share"),
    "shuffled_follow_their_new_conditions": ("shuffled: nearest to what their new conditions describe", "share"),
    "pairs": ("pairs", "count"),
    "shared_captions": ("pictures whose caption another shares", "share"),
    "passing": ("pairs that pass", "share"),
    "structure_of_a": ("structure nearer to A's", "share"),
    "tone_of_b": ("tone nearer to B's", "share"),
    "structure_to_a_median": ("likeness of structure to A, median", "plain"),
    "structure_to_b_median": ("likeness of structure to B, median", "plain"),
    "tone_to_a_median": ("difference in tone to A, median (CIE76)", "plain"),
    "tone_to_b_median": ("difference in tone to B, median (CIE76)", "plain"),
    "true_answers_known": ("cases whose true answer is in the data set", "count"),
    "true_answers_passing": ("true answers that the measure itself would pass", "share"),
    "exactly_the_true_answer": ("of these, nearest to exactly that picture among all", "share"),
    "psnr_to_the_true_answer_median_db": ("PSNR to the true answer, median", "db"),
    "cases": ("cases", "count"),
    "right_way": ("subject moved the right way", "share"),
    "wrong_way": ("subject moved the wrong way", "share"),
    "not_measurable": ("not the picture expected: no score", "share"),
    "effect_median": ("displacement the right way, median", "side"),
    "seed_spread": ("displacement between noises, 90 % are below", "side"),
    "seeds_measured": ("pictures from other noises", "count"),
    "seeds_not_recognised": ("of these, not recognised", "share"),
    "unrelated_median": ("displacement by the unrelated word, median", "side"),
    "unedited_like_original": ("unedited: likeness of structure to the original, median", "plain"),
}  # fmt: skip


# Captions are escaped; should one get through all the same, the browser runs and fetches nothing.
_NOTHING_FOREIGN = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
)


def write_page(verdicts: list[Verdict], report: dict[str, Any], log: list[dict[str, Any]], path: Path) -> None:
    """Writes the page atomically.

    Args:
      report: of `report.build_report`.
      log: the run's `metrics.jsonl`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(verdicts, report, log))


def page(verdicts: list[Verdict], report: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """The page as HTML text."""
    passed = report["passed"]
    body = [
        f'<header class="{_grade(passed)}"><p class="stamp">{"PASS" if passed else "FAIL"}</p>',
        f"<h1>{_headline(verdicts)}</h1>",
        f"<p>{_text(_about(report))}</p></header>",
        '<nav class="cards">' + "".join(_card(verdict) for verdict in verdicts) + "</nav>",
        _advice(verdicts),
        *(_section(number, verdict) for number, verdict in enumerate(verdicts, start=1)),
        _training(log),
        _particulars(report),
    ]
    title = _text(f"{'PASS' if passed else 'FAIL'}: validation of {Path(report['weights']['workdir']).name}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{_NOTHING_FOREIGN}<title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _grade(passed: bool) -> str:
    return "good" if passed else "bad"


def _headline(verdicts: list[Verdict]) -> str:
    failed = [verdict.title.lower() for verdict in verdicts if not verdict.passed]
    if not failed:
        return "The model remembers its pictures, takes the light of another, and reads its captions."
    return f"The model does not pass: {_text(' and '.join(failed))}."


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
        f'<a class="card {_grade(verdict.passed)}" href="#{verdict.name}"><h2>{_text(verdict.title)}</h2>'
        f'<p class="big">{percent(verdict.value)}</p>{_gauge(verdict)}<p>{_text(verdict.statement)}</p></a>'
    )


def _gauge(verdict: Verdict) -> str:
    return (
        f'<div class="gauge"><i style="width:{100 * min(1.0, max(0.0, verdict.value)):.1f}%"></i>'
        f'<b style="left:{100 * verdict.threshold:.1f}%" title="needed: {percent(verdict.threshold)}"></b></div>'
    )


def _section(number: int, verdict: Verdict) -> str:
    parts = [
        f'<section id="{verdict.name}"><h2><span class="mark {_grade(verdict.passed)}">'
        f"{'pass' if verdict.passed else 'fail'}</span> {number}. {_text(verdict.title)}</h2>",
        f'<p class="question">{_text(verdict.question)}</p>',
        f"<p><strong>{_text(verdict.statement)}</strong>; needed: {percent(verdict.threshold)}.</p>",
    ]
    if verdict.reasons:
        parts.append(_list("Why it failed", verdict.reasons))
    if verdict.controls:
        parts.append("<h3>Controls</h3><table>" + "".join(_control(c) for c in verdict.controls) + "</table>")
    parts.append('<div class="beside"><div>')
    parts.append("<h3>Numbers</h3><table>" + "".join(_numbers(verdict.numbers)) + "</table></div>")
    if verdict.chart is not None:
        labels = [f"{case.label}: {case.note}" for case in verdict.cases]
        drawn = charts.scatter(verdict.chart, labels)
        parts.append(f"<figure><figcaption>{_text(verdict.chart.title)}</figcaption>{drawn}</figure>")
    parts.append("</div>")
    if verdict.name == "memorisation":
        parts.append(_wall(verdict.cases))
    for rank, cases in chosen_cases(verdict):
        parts.append(f"<h3>{_text(rank)}</h3>{_cases(cases)}")
    parts.append("</section>")
    return "".join(parts)


def _list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<h3>{title}</h3><ul class="why">{items}</ul>'


def _advice(verdicts: list[Verdict]) -> str:
    """The advice of all tests, once, by cause."""
    causes = by_cause(verdicts)
    if not causes:
        return ""
    lists = "".join(_list(_text(f"{cause.name} ({', '.join(cause.tests)})"), cause.lines) for cause in causes)
    return f"<section><h2>Where to look first</h2>{lists}</section>"


def _control(control: Control) -> str:
    sign = "at most" if control.at_most else "at least"
    return (
        f'<tr><td><span class="mark {_grade(control.passed)}">{"ok" if control.passed else "failed"}</span></td>'
        f"<td>{_text(control.name)}<small>{_text(control.meaning)}</small></td>"
        f'<td class="number">{percent(control.value)}</td><td>{sign} {percent(control.bound)}</td></tr>'
    )


def _numbers(numbers: dict[str, Any]) -> list[str]:
    rows = []
    for key, value in numbers.items():
        if isinstance(value, dict):
            rows += _calibration(value)
        elif isinstance(value, list):
            rows.append(_row(key.replace("_", " "), ", ".join(map(str, value))))
        else:
            name, kind = NAMES.get(key, (key.replace("_", " "), "plain"))
            rows.append(_row(name, _format(value, kind)))
    return rows


def _calibration(found: dict[str, Any]) -> list[str]:
    if not found:
        return [_row("calibration", "no true counterparts in this set")]
    spread = f"{percent(found['least'])} to {percent(found['most'])}" if found["least"] is not None else "-"
    return [
        _row("the measure on true counterparts: pairs", str(found["true_pairs"])),
        _row("... right way", percent(found["right_way"])),
        _row("... displacement, median", "-" if found["median"] is None else percent(found["median"])),
        _row("... least to most", spread),
    ]


def _row(name: str, value: str) -> str:
    kind = "number" if len(value) < 25 else "long"
    return f'<tr><td>{_text(name)}</td><td class="{kind}">{_text(value)}</td></tr>'


def _format(value: float | int | None, kind: str) -> str:
    if value is None:
        return "-"
    if kind in ("share", "side"):
        return percent(value) + (" of the side" if kind == "side" else "")
    if kind == "count":
        return str(value)
    return f"{value:.1f} dB" if kind == "db" else f"{value:.3g}"


def _cases(cases: Sequence[Case]) -> str:
    narrow = " narrow" if len(cases[0].pictures) < 3 else ""
    return f'<div class="cases{narrow}">{"".join(_case(case) for case in cases)}</div>'


def _case(case: Case) -> str:
    figures = "".join(
        f'<figure><img src="{_jpeg(image)}" alt="{_text(title)}"><figcaption>{_text(title)}</figcaption></figure>'
        for title, image in case.pictures
    )
    return (
        f'<article class="{_grade(case.passed)}"><div class="row">{figures}</div>'
        f"<p>{_text(case.label)}<small>{_text(case.note)}</small></p></article>"
    )


def _jpeg(image: np.ndarray, longest: int = PICTURE, quality: int = 88) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


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
        source = _jpeg(sheet, longest=side * columns, quality=85)
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
    rows = [_row("weights", identity)]
    rows += [
        _row(f"{name} encoder", f"{e['id']} {e['revision']} (width {e['width']}, sha256 {e['sha256'][:16]})")
        for name, e in report["encoders"].items()
    ]
    model, data, sampling = report["model"], report["dataset"], report["sampling"]
    rows += [
        _row("model family", ", ".join(f"{key} {value}" for key, value in model["family"].items())),
        _row("data set", f"{data['name']}, format version {data['format_version']}, {data['resolution']} px"),
        _row("pictures", _pictures(data)),
        _row("shards", ", ".join(digest[:16] for digest in data["shards_sha256"][:8])),
        _row("network evaluations", f"{sampling['network_evaluations']:,} (seed {sampling['seed']})"),
        _row("time", ", ".join(f"{name} {value:.1f} s" for name, value in report["seconds"].items())),
    ]
    return f"<section><h2>Particulars</h2><table>{''.join(rows)}</table></section>"


def _pictures(data: dict[str, Any]) -> str:
    if data.get("drawn_portraits") is None:
        return f"{data['records']} in the set"
    drawn = f", {data['drawn_portraits']} of them drawn portraits of `preprocess demo`"
    return f"{data['pictures_tested']} of {data['records']} tested{drawn if data['drawn_portraits'] else ''}"
