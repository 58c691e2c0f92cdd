"""The gate: `python -m fluxdit_jax.validate --workdir=RUN` measures whether a trained run does what it must.

Three tests with their controls, on the run's own training pictures, drawn by its EMA weights. Of a picture with
several captions the first is asked for. The right answer to each is a picture of the set, and the measure is whether
the drawn one is nearest to it among all of them.

1. memorisation: every picture from its own caption and vector;
2. vision swap: the caption of a photograph with the vector of another gives the first in the light of the second;
3. text edit: the caption of a photograph's other view gives that view, in the same light.

The second and third take a gate set, a grid of photographs, views and lights (`python -m preprocess subset`, or
`demo`). It draws without guidance, as the network was trained, and the swap with guidance as well, as a curve.

Writes RUN/validation/report.json and report.html. Exit status: 0 passed, 1 failed, 2 could not be measured or judged.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging
from tqdm import tqdm

from fluxdit_jax.config import ConfigError
from fluxdit_jax.dataset.manifest import DatasetError
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.device import devices
from fluxdit_jax.gate.advice import advise, by_cause
from fluxdit_jax.gate.edit import EditError
from fluxdit_jax.gate.noise_levels import of_lights
from fluxdit_jax.gate.page import write_page
from fluxdit_jax.gate.report import FOLDER, Circumstances, build_report, write_tensorboard
from fluxdit_jax.gate.retrieval import Library
from fluxdit_jax.gate.sampler import Request, Sampler
from fluxdit_jax.gate.sheet import draw_sheet
from fluxdit_jax.gate.subject import Subject
from fluxdit_jax.gate.verdict import Verdict, grade
from fluxdit_jax.run.checkpoint import CheckpointError
from fluxdit_jax.run.metrics import LogError
from fluxdit_jax.run.run_directory import RunError, RunLock
from fluxdit_jax.sampling import solvers
from fluxdit_jax.sampling.pipeline import Generator
from fluxdit_jax.sampling.prompts import SampleError
from fluxdit_jax.shared import atomic_files
from fluxdit_jax.shared import cli as programs
from fluxdit_jax.shared.arguments import Parser
from fluxdit_jax.shared.json_files import write_json
from fluxdit_jax.shared.paths import expanded, given_path
from fluxdit_jax.vae.files import DecoderError
from preprocess import PreprocessError

USER_ERRORS = (
    CheckpointError, ConfigError, DatasetError, DecoderError, EditError, LogError, PreprocessError, RunError,
    SampleError, OSError,
)  # fmt: skip


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m fluxdit_jax.validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_arguments(parser.add_argument)
    arguments = parser.parse_args(argv)
    for name in ("limit", "pairs", "edits", "steps", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= arguments.seed < 2**31:
        parser.error(f"--seed must be at least 0 and below 2**31, not {arguments.seed}")
    return arguments


def _add_arguments(add: Any) -> None:
    add("--workdir", type=given_path, required=True, help="run directory of fluxdit_jax.train (required)")
    add("--data", type=given_path, help="dataset directory; default: where it was when the run was trained")
    add("--step", type=int, help="weights of this step; default: the newest, of ema/ or of a checkpoint")
    add("--limit", type=int, default=200, help="records at most, whole photographs of a gate set; default: 200")
    add(
        "--pairs",
        type=int,
        default=60,
        help="pairs of the vision swap; at least 50 are needed to pass; default: 60",
    )
    add("--edits", type=int, default=40, help="captions edited at most; at least 10 are needed to pass; default: 40")
    add(
        "--unrelated", metavar="OLD=>NEW",
        help="harmless words to change as a control; default: found in the captions",
    )  # fmt: skip
    add("--steps", type=int, default=6, help="solver steps; 6 to 16 is usual; default: 6")
    add(
        "--method", choices=solvers.METHODS, default="rk3",
        help=f"solver; evaluations of the network for each step: {solvers.COSTS}; default: rk3",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="of the noise and of who is paired with whom; default: 0")
    add("--batch-size", type=int, default=20, help="pictures computed at once; default: 20")
    add(
        "--vae",
        type=expanded,
        help="directory of the VAE; default: config.log.vae, or where the data set found it",
    )
    add("--text-encoder", type=expanded, help="directory or id of the text encoder; default: the data set's")


def validate(arguments: argparse.Namespace) -> int:
    """Measures, writes the report, and tells; returns the exit status."""
    started = time.monotonic()
    seconds: dict[str, float] = {}

    # ------------------------------------------------------------ the run, its true pictures, what is to be drawn
    subject = Subject.load(
        arguments.workdir,
        arguments.limit,
        data=arguments.data,
        step=arguments.step,
        vae=arguments.vae,
        seed=arguments.seed,
    )
    count = len(subject.records)
    print(f"weights: {subject.weights}\npictures: {count} of the {subject.available} of {subject.directory}")
    tests = subject.tests(arguments.pairs, arguments.edits, arguments.unrelated, arguments.text_encoder)
    library = Library(subject.eval_set)
    seconds["load"] = time.monotonic() - started

    # ------------------------------------------------------------ drawing, all of it in one go
    drawing = time.monotonic()
    generator = Generator.of(
        subject.settings,
        subject.manifest,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        method=arguments.method,
    )
    sampler = Sampler(generator, subject.weights.ema, subject.decoder)
    requests = [request for test in tests for request in test.requests()]
    evaluations = draw(sampler, requests)
    seconds["draw"] = time.monotonic() - drawing

    # ------------------------------------------------------------ measuring
    measuring = time.monotonic()
    measured = [test.measure(sampler, library) for test in tests]
    manifest, flow = subject.manifest, subject.settings.flow
    levels = of_lights(subject.records, subject.grid, manifest.latent_mean, manifest.latent_std, flow)
    verdicts = advise(measured, subject.log, subject.weights.step, subject.config.train.steps, levels)
    seconds["measure"] = time.monotonic() - measuring
    seconds["total"] = time.monotonic() - started

    # ------------------------------------------------------------ the report
    circumstances = Circumstances(
        workdir=str(arguments.workdir.absolute()),
        dataset=str(subject.directory),
        step=subject.weights.step,
        steps=arguments.steps,
        method=arguments.method,
        seed=arguments.seed,
        device=f"{jax.default_backend()}: {jax.devices()[0].device_kind}",
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds={name: round(value, 2) for name, value in seconds.items()},
        networks=evaluations * arguments.steps * solvers.EVALUATIONS[arguments.method],
        digest=subject.weights.digest,
        weights=subject.weights.path.parent.name,
        pictures=count,
        drawn=count_drawn(subject.records),
    )
    report = build_report(verdicts, circumstances, subject.settings.model, subject.manifest)
    folder = arguments.workdir / FOLDER
    sheet = draw_sheet(subject.eval_set, verdicts)
    write_page(verdicts, report, subject.log, sheet, folder / "report.html")
    write_json(report, folder / "report.json")
    write_tensorboard(verdicts, subject.weights.step, sheet, arguments.workdir / "tensorboard")
    tell(verdicts, report, folder)
    if report["passed"]:
        return 0
    return 1 if any(verdict.judged and not verdict.passed for verdict in verdicts) else 2


def count_drawn(records: Sequence[Record]) -> int:
    """How many of the records are drawn portraits of `preprocess demo`, by caption."""
    from preprocess.demo.cast import COMPOSITIONS

    captions = {composition.caption for composition in COMPOSITIONS}
    return sum(record.caption in captions for record in records)


def draw(sampler: Sampler, requests: list[Request]) -> int:
    """Draws everything with a progress bar; returns the evaluations of the network for each solver stage."""
    missing = sampler.missing(requests)
    every = 1.0 if sys.stderr.isatty() else 30.0  # seconds: a log gets a line now and then
    with tqdm(total=len(missing), desc="drawing", unit="image", mininterval=every) as bar:
        sampler.draw(missing, bar.update)
    return sum(1 if one.guidance == 1 else 1 + len(one.conditions) for one in missing)


def tell(verdicts: list[Verdict], report: dict[str, Any], folder: Path) -> None:
    """The verdict on the terminal."""
    for verdict in verdicts:
        print(f"{grade(verdict):4}  {verdict.title}: {verdict.statement}")
        for control in verdict.controls:
            sign = "at most" if control.at_most else "at least"
            mark = "ok  " if control.passed else "FAIL"
            print(f"      {mark} {control.name}: {control.value:.1%} ({sign} {control.bound:.1%})")
        for line in verdict.reasons:
            print(f"      why: {line}")
        if curve := verdict.numbers.get("guidance"):
            print(f"      with guidance {', '.join(f'{scale:g}: {share:.0%}' for scale, share in curve.items())}")
    for cause in by_cause(verdicts):
        print(f"look first: {cause.name} ({', '.join(cause.tests)})")
        for line in cause.lines:
            print(f"      {line}")
    print(f"{report['verdict']}  ({report['seconds']['total']:.0f} s)  {folder / 'report.html'}")


def command(argv: list[str]) -> int:
    """The exit status: 0 passed, 1 failed, 2 could not be measured or judged."""
    try:
        return _locked(parse_arguments(argv))
    except USER_ERRORS as error:
        print(f"error: {programs.explain(error)}", file=sys.stderr)
        return 2


def _locked(arguments: argparse.Namespace) -> int:
    if not arguments.workdir.is_dir():
        raise RunError(f"--workdir {arguments.workdir} does not exist")
    atomic_files.require_writable(arguments.workdir / FOLDER)
    lock = RunLock(arguments.workdir, ".validation.lock", temporary=True, option="--workdir")
    try:
        return validate(arguments)
    finally:
        lock.release()


def main() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    devices.use_compilation_cache()
    programs.run(lambda: command(sys.argv[1:]), USER_ERRORS, failure=2)


if __name__ == "__main__":
    main()
