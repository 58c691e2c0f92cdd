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
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging
from tqdm import tqdm

from fluxdit_jax.config import ConfigError, Settings, resolve
from fluxdit_jax.dataset.grid import GRID_FILE, read_grid
from fluxdit_jax.dataset.manifest import DatasetError, Manifest
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.device import devices
from fluxdit_jax.gate.advice import advise, by_cause
from fluxdit_jax.gate.edit import EditError, TextEdit
from fluxdit_jax.gate.eval_set import EvalSet
from fluxdit_jax.gate.memorisation import Memorisation
from fluxdit_jax.gate.page import write_page
from fluxdit_jax.gate.report import FOLDER, Circumstances, build_report, write_json, write_tensorboard
from fluxdit_jax.gate.retrieval import Library
from fluxdit_jax.gate.sampler import Request, Sampler
from fluxdit_jax.gate.sheet import draw_sheet
from fluxdit_jax.gate.swap import Swap
from fluxdit_jax.gate.verdict import Verdict, grade
from fluxdit_jax.loader.reader import RecordSource, spread
from fluxdit_jax.run.checkpoint import CheckpointError
from fluxdit_jax.run.metrics import LogError, read_metrics
from fluxdit_jax.run.run_directory import RunError, RunLock, load_config, load_dataset, require_dataset
from fluxdit_jax.run.weights import restore_weights
from fluxdit_jax.sampling import image_grid, solvers
from fluxdit_jax.sampling.pipeline import Generator
from fluxdit_jax.sampling.prompts import SampleError, encode_prompts
from fluxdit_jax.shared import atomic_files
from fluxdit_jax.shared import cli as programs
from fluxdit_jax.shared.paths import expanded, given_path
from fluxdit_jax.vae.decoder import load_decoder
from fluxdit_jax.vae.files import DecoderError
from preprocess import PreprocessError

USER_ERRORS = (
    CheckpointError, ConfigError, DatasetError, DecoderError, EditError, LogError, PreprocessError, RunError,
    SampleError, OSError,
)  # fmt: skip


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
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
    if arguments.seed < 0:
        parser.error("--seed must be at least 0")
    return arguments


def _add_arguments(add: Any) -> None:
    add("--workdir", type=given_path, required=True, help="run directory of fluxdit_jax.train (required)")
    add("--data", type=given_path, help="dataset directory; default: where it was when the run was trained")
    add("--step", type=int, help="weights of this step; default: the newest, of ema/ or of a checkpoint")
    add("--limit", type=int, default=200, help="records at most, spread evenly; default: 200")
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

    # ------------------------------------------------------------ the run: configuration, data set, weights
    config = load_config(arguments.workdir)
    manifest = load_dataset(arguments.workdir)
    settings = resolve(config, manifest)
    log = read_log(arguments.workdir)  # a damaged one is told before minutes of drawing
    weights = restore_weights(arguments.workdir, arguments.step)
    directory = arguments.data or Path(config.data.path)
    require_dataset(directory, arguments.workdir)
    source = RecordSource(directory, manifest, "train", config.data.get("on_corrupt", "stop"))
    records = [
        record.having(text=record.text[: settings.text_limit])  # as in training
        for _, record in source.iter_valid(spread(len(source), arguments.limit))
    ]
    grid = read_grid(directory / GRID_FILE)
    print(f"weights: {weights}\npictures: {len(records)} of the {len(source)} of {directory}")

    # ------------------------------------------------------------ the true pictures
    decoder = load_decoder(manifest.vae, arguments.vae or config.log.vae)
    truths = image_grid.decode_all(decoder, [record.latent for record in records])
    eval_set = EvalSet(tuple(records), tuple(truths), settings.model.patch, grid, arguments.seed)
    library = Library(eval_set)
    seconds["load"] = time.monotonic() - started

    # ------------------------------------------------------------ what is to be drawn for the three tests
    tests = (
        Memorisation.plan(eval_set),
        Swap.plan(eval_set, arguments.pairs),
        TextEdit.plan(
            eval_set,
            arguments.edits,
            arguments.unrelated,
            lambda captions: encode_prompts(captions, manifest, arguments.text_encoder, settings.text_limit),
        ),
    )

    # ------------------------------------------------------------ drawing, all of it in one go
    drawing = time.monotonic()
    sampler = make_sampler(arguments, settings, manifest, weights.ema, decoder)
    requests = [request for test in tests for request in test.requests()]
    evaluations = draw(sampler, requests)
    seconds["draw"] = time.monotonic() - drawing

    # ------------------------------------------------------------ measuring
    measuring = time.monotonic()
    measured = [test.measure(sampler, library) for test in tests]
    verdicts = advise(measured, log, weights.step, config.train.steps)
    seconds["measure"] = time.monotonic() - measuring
    seconds["total"] = time.monotonic() - started

    # ------------------------------------------------------------ the report
    circumstances = Circumstances(
        workdir=str(arguments.workdir.absolute()),
        dataset=str(directory),
        step=weights.step,
        steps=arguments.steps,
        method=arguments.method,
        seed=arguments.seed,
        device=f"{jax.default_backend()}: {jax.devices()[0].device_kind}",
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds={name: round(value, 2) for name, value in seconds.items()},
        networks=evaluations * arguments.steps * solvers.EVALUATIONS[arguments.method],
        digest=weights.digest,
        weights=weights.path.parent.name,
        pictures=len(records),
        drawn=count_drawn(records),
    )
    report = build_report(verdicts, circumstances, settings.model, manifest)
    folder = arguments.workdir / FOLDER
    sheet = draw_sheet(eval_set, verdicts)
    write_page(verdicts, report, log, sheet, folder / "report.html")
    write_json(report, folder / "report.json")
    write_tensorboard(verdicts, weights.step, sheet, arguments.workdir / "tensorboard")
    tell(verdicts, report, folder)
    if report["passed"]:
        return 0
    return 1 if any(verdict.judged and not verdict.passed for verdict in verdicts) else 2


def count_drawn(records: list[Record]) -> int:
    """How many of the records are drawn portraits of `preprocess demo`, by caption."""
    from preprocess.demo.cast import COMPOSITIONS

    captions = {composition.caption for composition in COMPOSITIONS}
    return sum(record.caption in captions for record in records)


def make_sampler(
    arguments: argparse.Namespace,
    settings: Settings,
    manifest: Manifest,
    ema: dict[str, Any],
    decoder: image_grid.Decoder,
) -> Sampler:
    """The run's model."""
    generator = Generator.of(
        settings, manifest, steps=arguments.steps, batch_size=arguments.batch_size, method=arguments.method
    )
    return Sampler(generator, generator.cast(ema), decoder, arguments.batch_size)


def draw(sampler: Sampler, requests: list[Request]) -> int:
    """Draws everything with a progress bar; returns the evaluations of the network for each solver stage."""
    missing = sampler.missing(requests)
    every = 1.0 if sys.stderr.isatty() else 30.0  # seconds: a log gets a line now and then
    with tqdm(total=len(missing), desc="drawing", unit="image", mininterval=every) as bar:
        sampler.draw(missing, bar.update)
    return sum(1 if one.guidance == 1 else 1 + len(one.conditions) for one in missing)


def read_log(workdir: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` of the run; empty if there is none."""
    path = workdir / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


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
