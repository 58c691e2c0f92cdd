"""The arguments of `python -m preprocess build`."""

from __future__ import annotations

import argparse
from typing import Any

from fluxdit_jax.shared.paths import expanded, place
from preprocess.build.options import Options

DESCRIPTION = (
    "Encodes images and captions into a dataset directory. Give the same command again to continue after an "
    "interruption, or after images or captions have changed: only what depends on the change is done again. Options "
    "that are left out are those of the dataset in --output, if there is one: `build --output DATASET` repeats its "
    "build."
)


def _resolutions(text: str) -> tuple[int, ...]:
    """Sides, ascending."""
    given = text.split(",")
    if not all(side.isdecimal() for side in given) or len({int(side) for side in given}) < len(given):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of pixels, or different ones with commas between")
    return tuple(sorted(map(int, given)))


def _worker(text: str) -> tuple[int, int]:
    """(I, N) of "I/N"."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= 10_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, as 2/4: I from 1 to N")
    return int(number), int(count)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `build`."""
    default = Options(input="", output="")

    def option(name: str, help: str, **more: Any) -> None:  # noqa: A002
        value = getattr(default, name.strip("-").replace("-", "_"))
        shown = f" (default: {value})" if value not in ("", 0) else ""
        usual: dict[str, Any] = {"default": argparse.SUPPRESS, "type": type(value)}
        parser.add_argument(name, help=(help + shown).replace("%", "%%"), **usual | more)

    parser.add_argument(
        "--input",
        type=place,
        default=argparse.SUPPRESS,
        help="folder of images, or a table of image_path and caption (.jsonl, .csv, .parquet), or a .tar; "
        "needed for a new dataset",
    )
    parser.add_argument("--output", type=place, required=True, help="the dataset directory")
    option("--vae", "Hugging Face id, directory, or builtin:dct", type=expanded)
    option("--text-encoder", "Hugging Face id, directory, or builtin:hash", type=expanded)
    option("--vision-encoder", "Hugging Face id, directory, or builtin:tone", type=expanded)
    option("--vision-embeddings", "folder of KEY.npy (float32 [1024]) instead of a vision encoder", type=expanded)
    option(
        "--vision-patches",
        "store what the vision encoder says of each part of a picture, too, pooled to so many cells of a square one "
        "(256, 1024), for training with alignment; 256 are 260 KB a record with a width of 1024 (default: none)",
    )
    parser.add_argument(
        "--condition",
        action="append",
        default=argparse.SUPPRESS,
        metavar="NAME=DIR",
        help="a further condition of the network: a folder of KEY.npy, each one vector, which is scaled to unit "
        "length; may be given several times (default: none)",
    )
    option(
        "--resolution",
        "side of the square with the pixel budget; several, as 256,512,1024, make a dataset of each in a folder of its "
        "own, from one reading and one encoding of the captions",
        type=_resolutions,
        metavar="SIDE[,SIDE...]",
    )
    option(
        "--vision-resolution",
        "of several resolutions, the one whose pixels the vision encoder is given (default: the largest; of a dataset "
        "that is there, its own)",
    )
    option("--modulus", "bucket sides are multiples of this; a multiple of 16 (default: 64, less below 1024 px)")
    option("--fit", "how an image is brought to its bucket", choices=("resize", "pad", "crop"))
    option("--max-aspect", "reject images longer than this against their shorter side")
    option("--min-side", "reject images with a shorter side than this, pixels")
    option("--max-pixels", "reject images with more pixels than this, before decoding them")
    option("--max-upscale", "warn about images that are enlarged more than this")
    option("--caption-field", "field of the .json or column looked for before 'caption', 'text', 'captions'")
    parser.add_argument(
        "--allow-outside",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="follow links to folders, and take links and paths in tables that lead out of the input (default: they "
        "are rejects)",
    )
    option("--holdout", "share of the images kept out of training, by content")
    option("--shard-size", "records in a shard at most")
    option("--limit", "use only the first N images by name (default: all)")
    option("--latent", "posterior mean, or a seeded sample", choices=("mean", "sample"))
    option("--max-tokens", "cut captions to this many tokens")
    option("--seed", "for --latent sample")
    option("--device", "auto, cpu, cuda (also for ROCm), cuda:N, mps")
    option("--dtype", "of the encoders; auto is bfloat16 on an accelerator, float32 on a CPU", choices=None)
    option("--batch-size", "images in a batch of the VAE and the vision encoder")
    option("--workers", "threads that decode images (default: one a core)")
    option("--max-rejects", "exit with status 3 if a larger share of the inputs is rejected")
    parser.add_argument(
        "--worker",
        type=_worker,
        metavar="I/N",
        help="be one of N processes, on any machines that share the folders, that make every Nth shard; the first "
        "plans. Then the same command without --worker publishes (default: this process alone)",
    )
    parser.add_argument(
        "--engine",
        choices=("ray",),
        help="make the shards by Ray, one actor for each GPU of this machine or of a cluster (default: this process)",
    )
    parser.add_argument(
        "--ray-address", default="", help="of a running cluster; auto: this machine's (default: start one here)"
    )
    parser.add_argument(
        "--ray-workers", type=int, default=0, help="actors (default: one a GPU, without GPUs one a host)"
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="let a finished dataset lose records, or be encoded again, with other options or from another input "
        "(default: that is refused)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="plan only: print what would be done, decode and write nothing"
    )
    parser.add_argument(
        "--draw",
        type=expanded,
        default="",
        help="with --dry-run: draw aspect ratios and buckets to this .png",
    )
