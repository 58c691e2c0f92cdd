"""Trains the runs that docs/ shows and draws its figures: python scripts/docs_figures.py WORK

WORK keeps the pictures, the data set and the runs; a second call reuses them. About 15 minutes of CPU time.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo_sheet
from matplotlib.figure import Figure
from PIL import Image

from fluxdit_jax import sample
from fluxdit_jax.run.metrics import METRICS, read_metrics
from fluxdit_jax.shared import image_grid
from fluxdit_jax.shared.paths import given_path

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"
SHOWN = ("c00", "c04", "c07", "c09")  # compositions of the demonstration set
# Every run is configs/demo.py, smaller, with one thing changed.
COMMON = (
    "model.width=128", "model.heads=2", "train.steps=600", "checkpoint.ema_every=150", "log.every=5",
    "log.preview_every=0", "log.heldout_every=50", "log.heldout_count=10",
)  # fmt: skip
RUNS = {
    "healthy": (),
    "rate_too_high": ("optim.lr=0.4", "optim.adam_lr=0.15", "train.steps=150"),
    "caption_dead": ("flow.drop=all 0.05, text 0.95", "train.steps=400"),
    "vector_dead": ("flow.drop=all 0.05, vision 0.95", "train.steps=400"),
    "shift_too_low": ("flow.shift=0.5", "train.steps=300"),
}
LABELS = {
    "healthy": "healthy",
    "rate_too_high": "learning rate 50 times too high",
    "caption_dead": "caption always dropped",
    "shift_too_low": "time shift 0.5 instead of 5",
}
COLOURS = ("#2b6a4d", "#c0392b", "#d08a1d", "#5b4fa0")
# Failures of the gate: file name, run, step of the EMA (None: the newest).
FAILURES = (
    ("gate_unfinished", "healthy", None),
    ("gate_collapsed", "rate_too_high", None),
    ("gate_caption_unread", "caption_dead", None),
    ("gate_vector_unread", "vector_dead", None),
)


def run(*words: str) -> None:
    print("+", *words, flush=True)
    code = subprocess.run([sys.executable, "-m", *words], cwd=ROOT).returncode
    if code not in (0, 1):  # 1: the gate has failed, as it should here
        sys.exit(code)


def train(work: Path) -> None:
    if not (work / "data" / "manifest.json").exists():
        run("preprocess", "demo", "--output", str(work / "images"))
        run(
            "preprocess", "build", "--input", str(work / "images"), "--output", str(work / "data"),
            "--resolution", "96", "--modulus", "16", "--holdout", "0.1", "--vae", "builtin:dct",
            "--text-encoder", "builtin:hash", "--vision-encoder", "builtin:tone",
        )  # fmt: skip
    for name, changes in RUNS.items():
        workdir = work / name
        if not (workdir / "done").exists():
            run(
                "fluxdit_jax.train", "--config=configs/demo.py", f"--config.data.path={work / 'data'}",
                f"--config.workdir={workdir}", *(f"--config.{change}" for change in (*COMMON, *changes)),
            )  # fmt: skip
            limits = ("--pairs", "20", "--edits", "10", "--steps", "4")
            run("fluxdit_jax.validate", "--workdir", str(workdir), *limits)
            (workdir / "done").touch()


def curve(log: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[name]) for entry in log if entry.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def save(figure: Figure, name: str) -> None:
    path = FIGURES / f"{name}.png"
    figure.savefig(path, dpi=80)
    Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(path, optimize=True)
    print(path, path.stat().st_size)


def draw_healthy(work: Path) -> None:
    log = read_metrics(work / "healthy" / METRICS)
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    titles = {
        "loss": "loss and heldout_loss",
        "loss_by_time/": "loss_by_time/T (T: 0 picture, 1 noise)",
        "velocity_rms_ratio": "velocity_rms_ratio",
        "gradient_norm": "gradient_norm",
        "gradient_norm_by_group/": "gradient_norm_by_group/PART",
        "ema_distance": "ema_distance and learning_rate / 1e-3",
    }
    for axes, (name, title) in zip(panels, titles.items()):
        axes.set_title(title, fontsize=10)
        names = sorted({key for entry in log for key in entry if key.startswith(name)})
        for number, key in enumerate(names if name.endswith("/") else [name]):
            shade = 0.15 + 0.75 * number / max(1, len(names) - 1)
            colour = (0.2 + 0.6 * shade, 0.5 - 0.3 * shade, 0.8 - 0.6 * shade)
            label = key.removeprefix(name) if name == "loss_by_time/" else None
            steps, values = curve(log, key)
            if name == "gradient_norm_by_group/":  # the nulls have none in a step that drops no condition
                steps, values = zip(*((s, v) for s, v in zip(steps, values) if v > 0))
            axes.plot(steps, values, color=colour if name.endswith("/") else COLOURS[0], lw=1.2, label=label)
        axes.grid(alpha=0.25)
    panels[0].plot(*curve(log, "heldout_loss"), color=COLOURS[1], lw=1.6, label="heldout_loss")
    panels[0].legend(fontsize=8)
    panels[1].legend(fontsize=7, ncols=2)
    panels[2].axhline(1.0, color="#888888", lw=0.8, ls="--")
    steps, rates = curve(log, "learning_rate")
    panels[5].plot(steps, [1000 * rate for rate in rates], color=COLOURS[3], lw=1.2)
    for index in (3, 4):
        panels[index].set_yscale("log")
    save(figure, "curves_healthy")


def draw_sick(work: Path) -> None:
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    for (name, label), colour in zip(LABELS.items(), COLOURS):
        log = read_metrics(work / name / METRICS)
        for axes, key in zip(panels, ("loss", "heldout_loss", "velocity_rms_ratio", "gradient_norm")):
            axes.plot(*curve(log, key), color=colour, lw=1.3, label=label)
            axes.set_title(key, fontsize=10)
            axes.grid(alpha=0.25)
    panels[0].set_ylim(0, 2.2)
    panels[1].set_ylim(0, 2.2)
    panels[2].set_ylim(0, 1.6)
    panels[3].set_yscale("log")
    panels[0].legend(fontsize=8)
    save(figure, "curves_sick")


def draw_failures(work: Path) -> None:
    for name, run_name, step in FAILURES:
        rows = demo_sheet.draw(work / run_name, SHOWN, step)
        save_sheet(image_grid.grid(rows, row_titles=demo_sheet.ROWS, cell=104), name)


def save_sheet(sheet: Image.Image, name: str) -> None:
    path = FIGURES / f"{name}.png"
    sheet.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(path, optimize=True)
    print(path, path.stat().st_size)


def draw_guidance(work: Path) -> None:
    texts, visions = (1, 2, 4, 7), (1, 1.5, 3)
    caption = "portrait of a woman with red curly hair in a green coat, looking right, in front of a brick wall"
    images = sample.sample(
        sample.parse_arguments(
            ["--workdir", str(work / "healthy"), "--prompt", caption]
            + ["--reference", str(work / "images" / "c13_l3.png"), "--steps", "16"]
            + ["--sweep-text", ",".join(map(str, texts)), "--sweep-vision", ",".join(map(str, visions))]
            + ["--out", str(work / "guidance.png")]
        )
    )
    sheet = image_grid.grid(
        [images[row * len(texts) : (row + 1) * len(texts)] for row in range(len(visions))],
        column_titles=[f"text {scale:g}" for scale in texts],
        row_titles=[f"vision {scale:g}" for scale in visions],
        cell=104,
    )
    save_sheet(sheet, "guidance")


def main(work: Path) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    train(work)
    draw_healthy(work)
    draw_sick(work)
    draw_failures(work)
    draw_guidance(work)


if __name__ == "__main__":
    main(given_path(sys.argv[1]))
