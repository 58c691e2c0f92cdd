"""The gate: `python -m fluxdit_jax.validate --workdir=RUN` measures whether a trained run does what it must.

Three tests with their controls, on the run's own training pictures, drawn by its EMA weights. Of a picture with
several captions the first is asked for.

1. memorisation: every picture again from its own caption and vector;
2. vision swap: the caption of one with the vector of another gives the one's composition in the other's light;
3. text edit: changing a word of the caption moves the subject the way the word says.

It draws without guidance (scales of 1), as the network was trained; there is no option for it.

Writes RUN/validation/report.json and report.html. Exit status: 0 passed, 1 failed, 2 could not be measured.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging
from tqdm import tqdm

from fluxdit_jax.config import ConfigError, Settings, resolve
from fluxdit_jax.dataset.manifest import DatasetError, Manifest
from fluxdit_jax.dataset.records import Record
from fluxdit_jax.device import devices
from fluxdit_jax.gate.advice import advise, by_cause
from fluxdit_jax.gate.album import DEMO_KEYS, Album
from fluxdit_jax.gate.edit import Edit
from fluxdit_jax.gate.memorisation import Memorisation
from fluxdit_jax.gate.page import write_page
from fluxdit_jax.gate.painter import Painter, Wanted
from fluxdit_jax.gate.report import FOLDER, Circumstances, build_report, write_json, write_tensorboard
from fluxdit_jax.gate.swap import Swap
from fluxdit_jax.gate.verdict import Verdict
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
from fluxdit_jax.shared.edit_rules import EditError, Rule, choose_rules, choose_unrelated
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
    )
    _add_arguments(parser.add_argument)
    arguments = parser.parse_args(argv)
    for name in ("limit", "pairs", "edits", "steps", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.seed < 0:
        parser.error("--seed must be at least 0")
    try:
        groups = re.compile(arguments.keys).groupindex
    except re.error as error:
        parser.error(f"--keys {arguments.keys!r} is not a regular expression: {error}")
    if not {"composition", "lighting"} <= groups.keys():
        parser.error(f"--keys {arguments.keys!r} must have the groups (?P<composition>...) and (?P<lighting>...)")
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
    add(
        "--edit", action="append", default=[], metavar="OLD=>NEW:DIRECTION",
        help="words to change and where the subject must then move: right, left, up or down; may be given several "
        "times; default: 'looking left=>looking right:right' and back",
    )  # fmt: skip
    add("--edits", type=int, default=40, help="captions edited at most; default: 40")
    add(
        "--unrelated", metavar="OLD=>NEW",
        help="harmless words to change as a control; default: found in the captions",
    )  # fmt: skip
    add(
        "--keys", default=DEMO_KEYS, metavar="REGEX",
        help="regular expression with groups named composition and lighting for record keys whose place in a grid of "
        f"known answers is known; default: that of the demonstration set, {DEMO_KEYS}",
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


def validate(arguments: argparse.Namespace) -> bool:
    """Measures, writes the report, and tells; True if all three tests passed."""
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
    captions = [record.caption for record in records]
    rules = choose_rules(captions, [Rule.parse(text) for text in arguments.edit])
    unrelated = choose_unrelated(captions, arguments.unrelated)
    print(f"weights: {weights}\npictures: {len(records)} of the {len(source)} of {directory}")

    # ------------------------------------------------------------ the true pictures
    decoder = load_decoder(manifest.vae, arguments.vae or config.log.vae)
    truths = image_grid.decode_all(decoder, [record.latent for record in records])
    album = Album(tuple(records), tuple(truths), settings.model.patch, arguments.seed, arguments.keys)
    seconds["load"] = time.monotonic() - started

    # ------------------------------------------------------------ what is to be drawn for the three tests
    memorisation, swap = Memorisation.plan(album), Swap.plan(album, arguments.pairs)
    edit = Edit.plan(
        album,
        rules,
        unrelated,
        arguments.edits,
        lambda captions: encode_prompts(captions, manifest, arguments.text_encoder, settings.text_limit),
    )

    # ------------------------------------------------------------ drawing, all of it in one go
    drawing = time.monotonic()
    painter = make_painter(arguments, settings, manifest, weights.ema, decoder)
    count = paint(painter, [*memorisation.wanted(), *swap.wanted(), *edit.wanted()])
    seconds["draw"] = time.monotonic() - drawing

    # ------------------------------------------------------------ measuring
    measuring = time.monotonic()
    measured = memorisation.measure(painter), swap.measure(painter), edit.measure(painter)
    verdicts = advise(*measured, log, weights.step, config.train.steps)
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
        networks=count * arguments.steps * solvers.EVALUATIONS[arguments.method],
        digest=weights.digest,
        weights=weights.path.parent.name,
        pictures=len(records),
        drawn=count_drawn(records),
    )
    report = build_report(verdicts, circumstances, settings.model, manifest)
    folder = arguments.workdir / FOLDER
    write_page(verdicts, report, log, folder / "report.html")
    write_json(report, folder / "report.json")
    write_tensorboard(verdicts, weights.step, arguments.workdir / "tensorboard")
    tell(verdicts, report, folder)
    return report["passed"]


def count_drawn(records: list[Record]) -> int:
    """How many of the records are drawn portraits of `preprocess demo`, by key and caption."""
    from preprocess.demo.cast import COMPOSITIONS

    captions = {composition.caption for composition in COMPOSITIONS}
    return sum(bool(re.fullmatch(DEMO_KEYS, record.key)) and record.caption in captions for record in records)


def make_painter(
    arguments: argparse.Namespace,
    settings: Settings,
    manifest: Manifest,
    ema: dict[str, Any],
    decoder: image_grid.Decoder,
) -> Painter:
    """The run's model as a painter."""
    generator = Generator.of(
        settings, manifest, steps=arguments.steps, batch_size=arguments.batch_size, method=arguments.method
    )
    return Painter(generator, generator.cast(ema), decoder, arguments.batch_size)


def paint(painter: Painter, wanted: list[Wanted]) -> int:
    """Draws everything with a progress bar; returns the number of pictures."""
    count = len(painter.missing(wanted))
    every = 1.0 if sys.stderr.isatty() else 30.0  # seconds: a log gets a line now and then
    with tqdm(total=count, desc="drawing", unit="image", mininterval=every) as bar:
        painter.paint(wanted, bar.update)
    return count


def read_log(workdir: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` of the run; empty if there is none."""
    path = workdir / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def tell(verdicts: list[Verdict], report: dict[str, Any], folder: Path) -> None:
    """The verdict on the terminal."""
    for verdict in verdicts:
        print(f"{'pass' if verdict.passed else 'FAIL'}  {verdict.title}: {verdict.statement}")
        for control in verdict.controls:
            sign = "at most" if control.at_most else "at least"
            mark = "ok  " if control.passed else "FAIL"
            print(f"      {mark} {control.name}: {control.value:.1%} ({sign} {control.bound:.1%})")
        for line in verdict.reasons:
            print(f"      why: {line}")
    for cause in by_cause(verdicts):
        print(f"look first: {cause.name} ({', '.join(cause.tests)})")
        for line in cause.lines:
            print(f"      {line}")
    print(f"{report['verdict']}  ({report['seconds']['total']:.0f} s)  {folder / 'report.html'}")


def command(argv: list[str]) -> int:
    """The exit status: 0 passed, 1 failed, 2 could not be measured."""
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
        return 0 if validate(arguments) else 1
    finally:
        lock.release()


def main() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    devices.use_compilation_cache()
    programs.run(lambda: command(sys.argv[1:]), USER_ERRORS, failure=2)


if __name__ == "__main__":
    main()
