"""`python -m preprocess build | inspect | verify | export | demo | subset | compare-vae`: thin; a module each."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from fluxdit_jax.shared.arguments import Parser
from fluxdit_jax.shared.cli import explain, outlive_readers
from fluxdit_jax.shared.paths import expanded, place
from fluxdit_jax.shared.sanitize import shown
from preprocess import PreprocessError
from preprocess.build.arguments import DESCRIPTION, add_arguments
from preprocess.build.options import Options


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    outlive_readers()
    parsed = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # their cases are judged in images.py
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # likewise
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and so it stays
            signal.signal(number, _stop)
    sys.unraisablehook = _stop_again
    from fluxdit_jax.dataset.manifest import DatasetError

    try:
        return parsed.run(parsed)
    except (PreprocessError, DatasetError, OSError) as error:
        print(f"error: {shown(explain(error), lines=True)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        kept = "finished shards are kept, the same command goes on from there"
        print(f"\nstopped; {kept if parsed.run is _build else 'nothing half-written is left'}", file=sys.stderr)
        return 128 + _number(stop)


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one while cleaning up changes nothing
    raise KeyboardInterrupt(number)


def _number(stop: KeyboardInterrupt) -> int:
    """Of the signal that raised it: `_stop` tells, Python's own handler of SIGINT does not."""
    return stop.args[0] if stop.args else signal.SIGINT


def _stop_again(unraisable: Any) -> None:
    """A `sys.unraisablehook`: what a signal raises in a finaliser or while collecting garbage is lost; again."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    number = _number(unraisable.exc_value)
    if number != signal.SIGINT:
        signal.signal(number, _stop)
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()  # when that callback is at its end


def _build(parsed: argparse.Namespace) -> int:
    from preprocess.build.build import build
    from preprocess.build.repeat import complete
    from preprocess.inspect.forecast import dry_run

    names = {field.name for field in dataclasses.fields(Options)}
    given = {name: value for name, value in vars(parsed).items() if name in names}
    if "resolution" in given:
        sides = given.pop("resolution")
        given |= {"resolution": sides[-1], "resolutions": sides if len(sides) > 1 else ()}
    options, taken = complete(given)
    if taken:
        print(shown(f"As {parsed.output} was built: {' '.join(taken)}"))
    by_ray = [f"--{name.replace('_', '-')}" for name in ("ray_address", "ray_workers") if getattr(parsed, name)]
    if by_ray and parsed.engine != "ray":
        raise PreprocessError(f"{by_ray[0]} is for --engine ray")
    if parsed.worker and parsed.engine == "ray":
        raise PreprocessError("--worker and --engine ray divide the work each in its own way: give one")
    if parsed.draw and not parsed.draw.endswith(".png"):
        raise PreprocessError(f"--draw {parsed.draw} must end in .png")
    if parsed.draw and not parsed.dry_run:
        raise PreprocessError(f"--draw {parsed.draw} is for --dry-run; `inspect` draws a finished dataset")
    if parsed.dry_run:
        dry_run(options, parsed.draw, parsed.replace)
        return 0
    if parsed.worker:
        from preprocess.cluster.worker import work

        number, count = parsed.worker
        return work(options, number, count, parsed.replace)
    engine = None
    if parsed.engine == "ray":
        options = Options.from_dict(options.checked().to_dict(), "--output")  # with absolute paths
        from preprocess.cluster import ray_engine

        engine = functools.partial(ray_engine.run, address=parsed.ray_address, workers=parsed.ray_workers)
    return build(options, replace=parsed.replace, engine=engine).status


def _inspect(parsed: argparse.Namespace) -> int:
    from preprocess.inspect.report import inspect

    inspect(parsed.dataset, parsed.output, parsed.cells, parsed.device)
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    from fluxdit_jax.dataset.manifest import MANIFEST, DatasetError
    from preprocess.build.parts import datasets_of
    from preprocess.inspect.verify import WHOLE, Finding, difference, repair, report, verify

    datasets = datasets_of(Path(parsed.dataset))

    def findings() -> dict[Path, list[Finding]]:
        found = {}
        for dataset in datasets:
            try:
                found[dataset] = verify(dataset, parsed.workers)
            except DatasetError as error:
                if not parsed.repair and len(datasets) == 1:
                    raise
                found[dataset] = [Finding(MANIFEST, WHOLE, str(error))]
        return found

    found = findings()
    if parsed.repair and any(found.values()):
        for finding in (each for of_one in found.values() for each in of_one):
            print(shown(str(finding), lines=True))
        repair(parsed.dataset, found)
        found = findings()
    status = max([report(of_one, str(dataset), parsed.dataset) for dataset, of_one in found.items()])
    if status or len(datasets) == 1 or not (apart := difference(datasets)):
        return status
    for finding in apart:
        print(shown(str(finding), lines=True))
    print(
        f"error: the datasets of {parsed.dataset} are not of the same images; `python -m preprocess build --output "
        f"{parsed.dataset}` makes them so",
        file=sys.stderr,
    )
    return 1


def _export(parsed: argparse.Namespace) -> int:
    from preprocess.inspect.export import export

    written = export(parsed.dataset, parsed.output, parsed.format)
    print(f"{len(written)} files are in {parsed.output}, the first is {written[0].name}")
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    from preprocess.demo import draw_dataset

    count = draw_dataset(Path(parsed.output))
    print(f"{count} pictures with captions are in {parsed.output}")
    return 0


def _subset(parsed: argparse.Namespace) -> int:
    from preprocess.subset.candidates import SubsetOptions
    from preprocess.subset.subset import subset

    names = {field.name for field in dataclasses.fields(SubsetOptions)}
    values = {name: value for name, value in vars(parsed).items() if name in names}
    subset(SubsetOptions(**(values | {"edit": tuple(parsed.edit)})))
    return 0


def _compare_vae(parsed: argparse.Namespace) -> int:
    from preprocess.inspect.vae_comparison import CompareOptions, compare

    names = {field.name for field in dataclasses.fields(CompareOptions)}
    values = {name: value for name, value in vars(parsed).items() if name in names}
    compare(CompareOptions(**(values | {"vaes": tuple(parsed.vaes)})))
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m preprocess", description="Turns images with captions into an encoded dataset.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="encode a folder of images and captions", description=DESCRIPTION)
    add_arguments(build)
    build.set_defaults(run=_build)
    inspect = commands.add_parser("inspect", help="print and draw what is in a dataset")
    inspect.add_argument("dataset", type=place, help="the dataset directory")
    inspect.add_argument("--output", type=place, help="folder for the pictures (default: DATASET/inspect)")
    inspect.add_argument("--cells", type=_positive, default=24, help="records on the contact sheet (default: 24)")
    inspect.add_argument("--device", default="auto", help="for the VAE's decoder (default: auto)")
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser("verify", help="read everything and name what is damaged")
    verify.add_argument("dataset", type=place, help="the dataset directory")
    verify.add_argument("--workers", type=_positive, default=2, help="shards read at a time (default: 2)")
    verify.add_argument("--repair", action="store_true", help="encode again what is damaged, and nothing else")
    verify.set_defaults(run=_verify)
    export = commands.add_parser("export", help="write the records as WebDataset tar files")
    export.add_argument("dataset", type=place, help="the dataset directory")
    export.add_argument("--output", type=place, required=True, help="folder for the tar files")
    export.add_argument("--format", default="webdataset", choices=("webdataset",))
    export.set_defaults(run=_export)
    demo = commands.add_parser("demo", help="draw the demonstration pictures with their captions")
    demo.add_argument("--output", type=place, required=True, help="folder to write them to")
    demo.set_defaults(run=_demo)
    _add_subset(commands.add_parser("subset", help="make the set that the gate overfits", description=_SUBSET))
    _add_compare_vae(
        commands.add_parser("compare-vae", help="see which VAE keeps your pictures best", description=_VAES)
    )
    return parser


_SUBSET = (
    "Makes the set that the gate's run memorises: chooses photographs and writes each under several light changes and "
    "mirrored, as a folder to build from. COUNT x LIGHTS x 2 pictures: 10 x 5 x 2 = 100 by default."
)


def _add_subset(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--input",
        type=place,
        required=True,
        help="a dataset made by build, or a folder of images with captions",
    )
    add("--output", type=place, required=True, help="the new folder of PNG files with .json captions")
    add("--count", type=int, default=10, help="photographs to choose (default: 10)")
    add("--lights", type=int, default=5, help="light changes of each, the first one none (default: 5)")
    add(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write each mirrored as well, for the text edit (default: yes)",
    )
    add("--resolution", type=int, default=512, help="side of the square with the pixel budget (default: 512)")
    add("--square", action="store_true", help="resize to exactly RESOLUTION x RESOLUTION, without cropping")
    add("--images", type=expanded, default="", help="where the dataset's pictures are, if they have moved")
    add(
        "--vision-encoder",
        type=expanded,
        default="",
        help="id or directory: tells whether it sees the lights (default: the dataset's; for a folder builtin:tone)",
    )
    add(
        "--edit",
        action="append",
        default=[],
        metavar="OLD=>NEW",
        help="words that are exchanged in the mirrored picture's caption, besides left and right; to a caption "
        "without such words those of the first are added; may be given several times (default: 'looking left=>looking "
        "right')",
    )
    add("--candidates", type=int, default=4000, help="look at this many pictures at most (default: 4000)")
    add("--allow-fewer", action="store_true", help="take what there is if it is less than --count")
    add("--caption-field", default="", help="for a folder: field looked for before 'caption' and 'text'")
    add("--allow-outside", action="store_true", help="for a folder: as of build")
    add("--device", default="auto", help="for the encoder: auto, cpu, cuda, mps (default: auto)")
    add("--workers", type=int, default=0, help="threads that decode images (default: one a core)")
    parser.set_defaults(run=_subset)


_VAES = (
    "Encodes and decodes some of your pictures with two or more VAEs: PSNR, SSIM, statistics of the latents, disk, and "
    "sheets of pictures and of the places where the VAEs differ most. Captions are not needed."
)


def _add_compare_vae(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--vae",
        dest="vaes",
        action="append",
        required=True,
        type=expanded,
        help="Hugging Face id, directory, or builtin:dct; given two or more times, the others are held against the "
        "first",
    )
    add("--input", type=place, required=True, help="a folder of images, a table, a .tar, or a dataset")
    add("--output", type=place, required=True, help="folder for the sheets and the numbers")
    add("--count", type=int, default=64, help="pictures to take (default: 64)")
    add("--resolution", type=int, default=512, help="side of the square with the pixel budget (default: 512)")
    add("--allow-outside", action="store_true", help="as of build")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    add("--dtype", default="auto", help="of the VAEs: auto, bfloat16, float32 (default: auto)")
    add("--batch-size", type=int, default=4, help="pictures in a batch (default: 4)")
    add("--workers", type=int, default=0, help="threads that decode images (default: one a core)")
    parser.set_defaults(run=_compare_vae)


if __name__ == "__main__":
    sys.exit(main())
