"""Is it any good? `python -m fluxdit_jax.score --workdir=RUN` draws for captions it was not trained on, and measures.

The captions are those of the holdout split, drawn by the EMA without the vision vector, which would tell the model
the answer. The dataset's own vision encoder looks at what came. Each number stands between what true and what useless
pictures have, with an interval of 95 % over captions:

* likeness of all drawn pictures to the dataset's (unbiased MMD of vision vectors);
* whether captions are followed (the rank of the true picture), and vectors, where they are given;
* copies of training pictures; diversity of drawings of one caption; modes that many captions fell into.

Writes RUN/score/STEP/score.json and report.html.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging
from tqdm import tqdm

from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.fields import CAPTION, field_named
from fluxdit_jax.dataset.manifest import DatasetError, parts_of
from fluxdit_jax.device import devices
from fluxdit_jax.loader.reader import RecordSource
from fluxdit_jax.quality.answers import Amounts, Pupil
from fluxdit_jax.quality.exam import DECODED, Exam
from fluxdit_jax.quality.eye import Eye
from fluxdit_jax.quality.page import write_page
from fluxdit_jax.quality.scores import judge, told
from fluxdit_jax.run.checkpoint import CheckpointError
from fluxdit_jax.run.run_directory import RunError, RunLock, load_config, load_stage, require_dataset
from fluxdit_jax.run.weights import restore_weights
from fluxdit_jax.sampling import solvers
from fluxdit_jax.sampling.pipeline import Generator
from fluxdit_jax.sampling.prompts import SampleError
from fluxdit_jax.settings import Settings, resolve
from fluxdit_jax.shared import atomic_files
from fluxdit_jax.shared import cli as programs
from fluxdit_jax.shared.json_files import write_json
from fluxdit_jax.shared.paths import expanded, given_path
from fluxdit_jax.vae.decoder import load_decoder
from fluxdit_jax.vae.files import DecoderError
from preprocess import PreprocessError

FOLDER = "score"
USER_ERRORS = (
    CheckpointError, ConfigError, DatasetError, DecoderError, PreprocessError, RunError, SampleError, OSError,
)  # fmt: skip


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fluxdit_jax.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", type=given_path, required=True, help="run directory of fluxdit_jax.train (required)")
    add("--data", type=given_path, help="dataset directory; default: where it was when the run was trained")
    add("--step", type=int, help="weights of this step; default: the newest, of ema/ or of a checkpoint")
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
    return arguments


def score(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draws, measures, writes and tells; returns the content of `score.json`."""
    started = time.monotonic()

    # ------------------------------------------------------------ the run, its dataset, what looks at pictures
    load_config(arguments.workdir)
    weights = restore_weights(arguments.workdir, arguments.step)
    stage, manifest = load_stage(arguments.workdir, weights.step)
    config, settings = stage.config, resolve(stage.config, manifest, stage.first)
    directory = arguments.data or Path(config.data.path)
    if arguments.data is not None and config.data.resolution in parts_of(directory):
        directory = parts_of(directory)[config.data.resolution]
    require_dataset(directory, arguments.workdir, stage.name)
    holdout = _split(directory, manifest, config, "holdout")
    train = _split(directory, manifest, config, "train")
    decoder = load_decoder(manifest.vae, arguments.vae or config.log.vae)
    eye = Eye.open(manifest, arguments.vision_encoder, arguments.device)
    text = config.log.preview_guidance if arguments.guidance_text is None else arguments.guidance_text
    notes = [eye.note] if eye.note else []
    notes += _untrained(settings)
    print(f"weights: {weights}\ncaptions: {min(arguments.count, len(holdout)):,} of the {len(holdout):,} held out")
    for note in notes:
        print(f"note: {note}")

    # ------------------------------------------------------------ what is asked, and what is drawn
    references = min(len(train), arguments.references if eye.own else min(arguments.references, DECODED))
    questions = min(arguments.count, len(holdout))
    with _bar(questions + references, "looking at the dataset") as bar:
        exam = Exam.of(holdout, train, eye, decoder, count=questions, references=references, progress=bar.update)
    seconds = {"dataset": time.monotonic() - started}
    generator = Generator.of(
        settings, manifest, steps=arguments.steps, batch_size=arguments.batch_size, method=arguments.method
    )
    pupil = Pupil(generator, weights.ema, decoder, eye, settings.text_limit, text)
    amounts = Amounts(arguments.with_vector, arguments.captions, arguments.drawings)
    drawing = time.monotonic()
    with _bar(amounts.pictures(questions), "drawing") as bar:
        answers = pupil.answer(exam, settings.model.patch, amounts, bar.update)
    seconds["drawing"] = time.monotonic() - drawing

    # ------------------------------------------------------------ the numbers
    scores = judge(exam, answers)
    seconds["all"] = time.monotonic() - started
    epochs = config.optim.global_batch_size * (weights.step - stage.first) / len(train)
    report = {
        **scores.to_json(),
        "step": weights.step,
        "epochs": epochs,
        "digest": weights.digest,
        "workdir": str(arguments.workdir.absolute()),
        "dataset": str(directory),
        "questions": questions,
        "references": references,
        "eye": {"encoder": eye.encoder.identity.id, "own": eye.own},
        "sampling": {"method": arguments.method, "steps": arguments.steps, "guidance_text": text},
        "notes": notes,
        "device": f"{jax.default_backend()}: {jax.devices()[0].device_kind}",
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }
    folder = arguments.workdir / FOLDER / str(weights.step)
    write_json(report, folder / "score.json")
    write_page(exam, answers, scores, report, train, decoder, folder / "report.html")
    for line in told(scores):
        print(line)
    for mode in scores.modes[:5]:
        captions = "; ".join(repr(exam.caption(row)[:60]) for row in mode.rows[:3])
        print(f"collapsed: {len(mode.rows)} of {questions} captions came to one picture: {captions}, ...")
    print(f"{seconds['all']:.0f} s  {folder / 'report.html'}")
    return report


def _split(directory: Path, manifest: Any, config: Any, split: str) -> RecordSource:
    if not manifest.records(split):
        raise RunError(
            f"{directory} has no {split} split, so there are no captions that the model has not seen: build the "
            "dataset with a --holdout above 0"
        )
    return RecordSource(directory, manifest, split, config.data.get("on_corrupt", "stop"))


def _untrained(settings: Settings) -> list[str]:
    """What to know of a model that never met a caption without a vector, or nothing at all."""
    names = [condition.name for condition in settings.model.conditions]
    vectors = [name for name in names if name == "vision"]
    if vectors and not any(share and set(vectors) <= set(dropped) for dropped, share in settings.flow.drop):
        made = [name for name in names if field_named(name).made_from == CAPTION]
        return [f"this model never trained with {' and '.join(made)} alone (flow.drop); expect little of it"]
    return []


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
