"""The arguments of `python -m fluxdit_jax.sample`."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fluxdit_jax.run.checkpoint import EMA, SHORT_EMA
from fluxdit_jax.sampling import recipe, solvers
from fluxdit_jax.sampling.prompts import read_prompts
from fluxdit_jax.shared.arguments import Parser
from fluxdit_jax.shared.paths import expanded, given_path

T = TypeVar("T")
# Of arguments that neither the command line nor a recipe gives.
DEFAULTS: dict[str, Any] = {
    "count": 1, "seed": 0, "steps": 32, "method": "heun", "guidance_text": 1.0, "guidance_vision": 1.0,
    "guidance": {}, "condition": {}, "rescale": 0.0, "weights": EMA,
}  # fmt: skip
EPILOG = """\
guidance: 1 draws what the model learned. With a prompt alone, --guidance-text 3 to 7 is usual; with a reference, 2 to 5
and --guidance-vision 1 to 3. Stronger guidance follows the condition more closely, varies less and saturates; --rescale
0.5 to 0.7 takes the saturation back. A guided picture costs one more evaluation of the network for each condition that
is given: two with a prompt alone, three with a reference. The best scales differ from model to model:
--sweep-text 1,3,5,7 --sweep-vision 1,2,3 draws a sheet of all of them.
"""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The arguments, completed from the recipe and by defaults.

    `read_recipe` is the recipe or None; `given` names what the command line gives itself.
    """
    parser = Parser(
        prog="python -m fluxdit_jax.sample",
        description="Draws pictures from a run or an export. Sizes are width x height.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(parser.add_argument)
    arguments = parser.parse_args(argv)
    if arguments.prompts:
        arguments.prompt = [*(arguments.prompt or ()), *read_prompts(arguments.prompts)]
    values = vars(arguments)
    for name in ("condition", "guidance"):
        values[name] = values[name] and dict(values[name])
    arguments.given = frozenset(name for name, value in values.items() if value is not None)
    arguments.read_recipe = recipe.read(arguments.recipe) if arguments.recipe else None
    taken = dict(arguments.read_recipe.arguments) if arguments.read_recipe else {}
    if arguments.model or arguments.workdir:  # instead of the recipe's, whichever it names
        taken |= {"workdir": None, "model": None}
    for name, value in (DEFAULTS | taken).items():
        if values[name] is None:
            values[name] = value
    if (arguments.workdir is None) == (arguments.model is None):
        parser.error("give --workdir of a run or --model of an export, or --recipe of a picture that names one")
    for name in ("workdir", "model"):
        values[name] = values[name] and Path(values[name])
    for name in ("text", "vision"):
        scales = list(dict.fromkeys(values[f"sweep_{name}"] or ()))
        values[f"sweep_{name}"] = scales if len(scales) > 1 else None
        if len(scales) == 1:  # no sweep but the scale
            values[f"guidance_{name}"] = scales[0]
    _check_arguments(parser, arguments)
    return arguments


def _add_arguments(add: Any) -> None:
    def default(name: str) -> str:
        return f"default: {DEFAULTS[name]}"

    add("--workdir", type=given_path, help="run directory of fluxdit_jax.train; default: the recipe's")
    add("--model", type=given_path, metavar="DIR", help="directory of fluxdit_jax.export, instead of --workdir; "
        "default: the recipe's")  # fmt: skip
    add("--recipe", type=given_path, metavar="FILE.png", help="a picture or sheet of this program: draws it again; "
        "other arguments change what they name; default: none")  # fmt: skip
    add("--prompt", action="append", help="what to draw; may be given several times; default: the recipe's")
    add("--prompts", type=given_path, help="text file with one prompt per line; default: none")
    add("--reference", type=given_path, help="picture whose light and mood (vision vector) to take; default: none, "
        "which the model must have been trained for (flow.drop)")  # fmt: skip
    add("--guidance-text", type=float, help=f"1: the model itself; 3 to 7 is usual, with a reference 2 to 5; higher: "
        f"closer to the prompt; {default('guidance_text')}")  # fmt: skip
    add("--guidance-vision", type=float, help=f"the same for the reference; 1 to 3 is usual; "
        f"{default('guidance_vision')}")  # fmt: skip
    add("--condition", type=_named(given_path), action="append", metavar="NAME=FILE.npy", help="a further condition "
        "of the dataset, as `preprocess build --condition NAME=DIR` read it; default: none")  # fmt: skip
    add("--guidance", type=_named(float), action="append", metavar="NAME=SCALE", help="guidance of a further "
        "condition; default: 1")  # fmt: skip
    add("--rescale", type=float, help=f"0 to 1: undoes the over-saturation of strong guidance; 0.5 to 0.7 is usual "
        f"above a scale of 5; {default('rescale')}")  # fmt: skip
    add(
        "--sweep-text",
        type=_scales,
        metavar="A,B,...",
        help="a sheet over these text scales instead; default: none",
    )
    add("--sweep-vision", type=_scales, metavar="A,B,...", help="a sheet over these vision scales instead; "
        "default: none")  # fmt: skip
    add("--steps", type=int, help=f"solver steps; 16 to 50 is usual; {default('steps')}")
    add("--method", choices=solvers.METHODS, help="solver; evaluations of the network for each step: "
        f"{solvers.COSTS}; {default('method')}")  # fmt: skip
    add("--seed", type=int, help=f"seed of the first picture; the next ones count up; {default('seed')}")
    add("--count", type=int, help=f"pictures per prompt; {default('count')}")
    add(
        "--size",
        metavar="WIDTHxHEIGHT",
        help="in pixels, one of the sizes trained on; default: the most common",
    )
    add("--step", type=int, help="weights of this step; default: the newest, of ema/ or of a checkpoint")
    add("--weights", choices=(EMA, SHORT_EMA), help=f"which average; short_ema: of a run with ema.short_decay; "
        f"{default('weights')}")  # fmt: skip
    add("--vae", type=expanded, help="directory of the VAE; default: where the data set found it")
    add("--text-encoder", type=expanded, help="directory or id of the text encoder; default: the data set's")
    add(
        "--vision-encoder",
        type=expanded,
        help="directory or id of the vision encoder; default: the data set's",
    )
    add("--out", type=given_path, required=True, help="PNG file; with several pictures their sheet, each one beside "
        "it. What is there is replaced (required)")  # fmt: skip


def _check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not arguments.prompt:
        parser.error("give --prompt or --prompts, or --recipe")
    for prompt in arguments.prompt:
        if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
            parser.error(f"--prompt {prompt!r} is not UTF-8")
    if min(arguments.steps, arguments.count) < 1 or arguments.seed < 0:
        parser.error("--steps and --count must be at least 1, --seed at least 0")
    if arguments.seed + arguments.count * len(arguments.prompt) >= 2**31:
        parser.error("--seed must stay below 2**31, counted up for every picture")
    scales = [arguments.guidance_text, arguments.guidance_vision, *arguments.guidance.values()]
    sweeps = [arguments.sweep_text or (), arguments.sweep_vision or ()]
    if not all(abs(scale) < recipe.MAX_SCALE for scale in itertools.chain(scales, *sweeps)):
        parser.error(f"guidance scales must be finite numbers below {recipe.MAX_SCALE:g}")
    pictures = arguments.count * len(arguments.prompt) * math.prod(max(1, len(sweep)) for sweep in sweeps)
    if pictures > recipe.MAX_PICTURES or max(map(len, sweeps)) > recipe.MAX_SCALES:
        most = f"at most {recipe.MAX_PICTURES:,} at once, and a sweep has at most {recipe.MAX_SCALES:,} scales"
        parser.error(f"{pictures:,} pictures are asked for; {most}")
    if arguments.steps > recipe.MAX_STEPS:
        parser.error(f"--steps must be at most {recipe.MAX_STEPS:,}")
    if not 0 <= arguments.rescale <= 1:
        parser.error("--rescale must be between 0 and 1")
    if arguments.method not in solvers.METHODS or arguments.weights not in (EMA, SHORT_EMA):
        parser.error(f"--recipe {arguments.recipe}: it has another --method or --weights than this version knows")
    if arguments.out.suffix.lower() != ".png":
        parser.error("--out must end in .png")


def _named(kind: Callable[[str], T]) -> Callable[[str], tuple[str, T]]:
    """Parses NAME=VALUE."""

    def parse(text: str) -> tuple[str, T]:
        name, equals, value = text.partition("=")
        try:
            if not (name and equals and value):
                raise ValueError
            return name, kind(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE") from error

    return parse


def _scales(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them") from error
