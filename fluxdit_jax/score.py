"""Is it any good? `python -m fluxdit_jax.score --workdir=RUN` draws for captions it was not trained on, and measures.

The captions are those of the holdout split, drawn by the EMA without the vision vector, which would tell the model
the answer. The dataset's own vision encoder looks at what came. Each number stands between what true and what useless
pictures have, with an interval of 95 % over captions:

* likeness of all drawn pictures to the dataset's (unbiased MMD of vision vectors);
* whether captions are followed (the rank of the true picture), and vectors, where they are given;
* copies of training pictures; diversity of drawings of one caption; modes that many captions fell into.

Writes RUN/score/score.json and report.html. With --against OTHER_RUN both runs are asked the same, from the same
noise, and the differences are printed with their standard errors (against.json, against.png).
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from tqdm import tqdm

from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.device import devices
from fluxdit_jax.quality import files
from fluxdit_jax.quality.answers import Amounts, Answers
from fluxdit_jax.quality.candidate import Candidate
from fluxdit_jax.quality.comparison import compare, paired
from fluxdit_jax.quality.exam import DECODED, Exam
from fluxdit_jax.quality.exam_file import kept_exam
from fluxdit_jax.quality.eye import Eye
from fluxdit_jax.quality.files import FOLDER
from fluxdit_jax.quality.page import draw_pairs, write_page
from fluxdit_jax.quality.scores import Scores, judge, told, write_tensorboard
from fluxdit_jax.run.checkpoint import CheckpointError
from fluxdit_jax.run.differences import dataset_difference
from fluxdit_jax.run.metrics import LogError
from fluxdit_jax.run.run_directory import RunError, RunLock
from fluxdit_jax.sampling import solvers
from fluxdit_jax.sampling.prompts import SampleError
from fluxdit_jax.shared import atomic_files
from fluxdit_jax.shared import cli as programs
from fluxdit_jax.shared.arguments import Parser
from fluxdit_jax.shared.json_files import write_json
from fluxdit_jax.shared.paths import expanded, given_path
from fluxdit_jax.shared.sanitize import shown
from fluxdit_jax.vae.decoder import Decoder, load_decoder
from fluxdit_jax.vae.files import DecoderError
from preprocess import PreprocessError

LOSSES = 128  # holdout pictures whose loss is measured, at 8 times each
FEW = 30  # captions, below which intervals are too wide to tell anything
USER_ERRORS = (
    CheckpointError, ConfigError, DatasetError, DecoderError, LogError, PreprocessError, RunError, SampleError, OSError,
)  # fmt: skip


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m fluxdit_jax.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", type=given_path, required=True, help="run directory of fluxdit_jax.train (required)")
    add("--data", type=given_path, help="dataset directory; default: where it was when the run was trained")
    add("--step", type=int, help="weights of this step; default: the newest, of ema/ or of a checkpoint")
    add("--against", type=given_path, help="another run, of the same dataset: both are asked the same")
    add("--against-step", type=int, help="weights of that run; default: the newest")
    add("--count", type=int, default=1024, help="holdout captions at most, spread evenly; default: 1024")
    add("--references", type=int, default=5000, help="training pictures at most, to compare with; default: 5000")
    add("--with-vector", type=int, default=256, help="captions drawn with their vision vector, too; default: 256")
    add("--captions", type=int, default=16, help="captions that are drawn several times; default: 16")
    add("--drawings", type=int, default=4, help="how many times; default: 4")
    add("--guidance-text", type=float, help="guidance scale of the caption; default: the run's log.preview_guidance")
    add("--steps", type=int, default=12, help="solver steps; default: 12")
    add("--method", choices=solvers.METHODS, default="heun", help="solver; default: heun")
    add("--batch-size", type=int, default=16, help="pictures computed at once; default: 16")
    add("--vae", type=expanded, help="directory of the VAE; default: config.log.vae, or where the data set found it")
    add("--vision-encoder", type=expanded, help="id or directory of the vision encoder; default: the data set's")
    add("--device", default="auto", help="of the vision encoder: auto, cpu, cuda, mps; default: auto")
    arguments = parser.parse_args(argv)
    for name, least in (("count", 2), ("references", 2), ("steps", 1), ("batch_size", 1), ("with_vector", 0),
                        ("captions", 0), ("drawings", 0)):  # fmt: skip
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if arguments.guidance_text is not None and not math.isfinite(arguments.guidance_text):
        parser.error(f"--guidance-text must be a finite number, got {arguments.guidance_text}")
    return arguments


def score(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draws, measures, writes and tells; returns the content of `score.json`, or of `against.json`."""
    started = time.monotonic()

    # ------------------------------------------------------------ the run, its dataset, what looks at pictures
    run = Candidate.load(arguments.workdir, arguments.step, arguments.data)
    other = Candidate.load(arguments.against, arguments.against_step, arguments.data) if arguments.against else None
    if other is not None:
        require_comparable(run, other)
    holdout, train = run.split("holdout"), run.split("train")
    decoder = load_decoder(run.manifest.vae, arguments.vae or run.config.log.vae)
    eye = Eye.open(run.manifest, arguments.vision_encoder, arguments.device)
    candidates = [run] if other is None else [run, other]
    costs = [each.cost() for each in candidates]  # before an hour of drawing: a log may be damaged
    questions = min(arguments.count, len(holdout))
    references = min(len(train), arguments.references if eye.own else min(arguments.references, DECODED))
    notes = [note for note in (eye.note, *(each.untrained for each in candidates)) if note]
    if questions < FEW:
        notes.append(f"of {questions} captions the numbers say next to nothing: hold out more (build --holdout)")
    for each in candidates:
        print(f"weights: {shown(str(each.weights))}")
    print(f"captions: {questions:,} of the {len(holdout):,} held out")
    for note in notes:
        print(f"note: {shown(note)}")

    # ------------------------------------------------------------ what is asked, and what is drawn
    with _bar(questions + references, "looking at the dataset") as bar:
        vae = str(arguments.vae or run.config.log.vae)
        amount: dict[str, Any] = {"count": questions, "references": references, "progress": bar.update}
        exam = kept_exam(run.workdir / FOLDER, holdout, train, eye, decoder, vae=vae, **amount)
    seconds = {"dataset": time.monotonic() - started}
    amounts = Amounts(arguments.with_vector, arguments.captions, arguments.drawings)
    text = run.config.log.preview_guidance if arguments.guidance_text is None else arguments.guidance_text
    how = {"steps": arguments.steps, "method": arguments.method, "batch": arguments.batch_size}
    losses = [each.heldout_losses(min(questions, LOSSES)) for each in candidates]
    drawing = time.monotonic()
    answers = [_answers(each, exam, decoder, eye, amounts, float(text), how) for each in candidates]
    seconds["drawing"] = time.monotonic() - drawing
    seconds["all"] = time.monotonic() - started

    # ------------------------------------------------------------ the numbers
    about = {
        **files.circumstances(run.directory, exam, eye, {**how, "guidance_text": float(text)}, amounts),
        "notes": notes,
        "device": f"{jax.default_backend()}: {jax.devices()[0].device_kind}",
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
    folder = run.workdir / FOLDER
    if other is not None:
        told_of = [_of(each, cost) for each, cost in zip(candidates, costs, strict=True)]
        return _tell_difference(exam, told_of, answers, losses, about, folder)
    scores = judge(exam, answers[0], losses[0])
    report = {**scores.to_json(), **_of(run, costs[0]), **about}
    files.write(report, folder)
    write_page(exam, answers[0], scores, report, train, decoder, folder)
    write_tensorboard(scores, run.weights.step, run.workdir / "tensorboard")
    _tell(exam, scores)
    print(f"{seconds['all']:.0f} s  {folder / 'report.html'}")
    return report


def _answers(
    run: Candidate, exam: Exam, decoder: Decoder, eye: Eye, amounts: Amounts, text: float, how: dict[str, Any]
) -> Answers:
    """What a run draws, with a progress bar; `text` is the guidance scale of captions."""
    pupil = run.pupil(decoder, eye, text, **how)
    with _bar(amounts.pictures(len(exam.questions)), f"drawing {shown(run.workdir.name)}") as bar:
        return pupil.answer(exam, run.settings.model.patch, amounts, bar.update)


def _tell(exam: Exam, scores: Scores) -> None:
    for line in told(scores):
        print(line)
    for mode in scores.modes[:5]:
        captions = "; ".join(repr(exam.caption(row)[:60]) for row in mode.rows[:3])
        print(f"collapsed: {len(mode.rows)} captions came to one picture: {captions}, ...")


def _of(run: Candidate, cost: dict[str, Any]) -> dict[str, Any]:
    return {
        "workdir": str(run.workdir.absolute()),
        "step": run.weights.step,
        "digest": run.weights.digest,
        "epochs": run.epochs,
        "cost": cost,
    }


def require_comparable(run: Candidate, other: Candidate) -> None:
    """Raises `RunError` unless both runs can be asked the same: of one dataset, at one resolution."""

    def held_out(each: Candidate) -> list[str]:
        return [shard.sha256 for shard in each.manifest.shards.get("holdout", ())]

    difference = dataset_difference(run.manifest, other.manifest)
    if not difference and held_out(run) != held_out(other):
        difference = "other pictures are held out"
    if difference:
        raise RunError(f"{run.workdir} and {other.workdir} were trained on other data: {difference}")


def _tell_difference(
    exam: Exam,
    runs: list[dict[str, Any]],
    answers: list[Answers],
    losses: list[np.ndarray],
    about: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Prints and writes the second run's numbers less the first's; the sheet shows both beside the true pictures."""
    found = {"held-out loss": paired(losses, "low")} | compare(exam, *answers)
    first, second = runs
    report = {
        "first": first,
        "second": second,
        "differences": {name: each.to_json() for name, each in found.items()},
        **about,
    }
    write_json(report, folder / "against.json")
    names = [f"{which}: {Path(one['workdir']).name}" for which, one in (("first", first), ("second", second))]
    draw_pairs(exam, names, answers, folder / "against.png")
    print(f"{'second less first':<28} {'first':>9} {'second':>9} {'difference':>11} {'error':>8}  ahead")
    for name, each in found.items():
        numbers = f"{each.first:>9.4g} {each.second:>9.4g} {each.value:>+11.4g} {each.error:>8.2g}"
        print(f"{name:<28} {numbers}  {each.verdict}")
    for name, one in (("first", first), ("second", second)):
        cost = one["cost"]
        hours = "unknown time" if cost["seconds"] is None else programs.duration(cost["seconds"])
        print(f"{name}: step {one['step']:,} of {shown(one['workdir'])}, {cost['tflop']:,.0f} TFLOP, {hours}")
    print(f"{folder / 'against.png'}")
    return report


def _bar(total: int, what: str) -> tqdm:
    every = 1.0 if sys.stderr.isatty() else 30.0  # seconds: a log gets a line now and then
    return tqdm(total=total, desc=what, unit="image", mininterval=every)


def _locked(arguments: argparse.Namespace) -> int:
    if not arguments.workdir.is_dir():
        raise RunError(f"--workdir {arguments.workdir} does not exist")
    atomic_files.require_writable(arguments.workdir / FOLDER)
    lock = RunLock(arguments.workdir, ".score.lock", temporary=True, option="--workdir")
    try:
        score(arguments)
    finally:
        lock.release()
    return 0


def main() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    devices.use_compilation_cache()
    programs.run(lambda: _locked(parse_arguments(sys.argv[1:])), USER_ERRORS)


if __name__ == "__main__":
    main()
