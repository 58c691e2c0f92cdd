"""The command line of `fluxdit_jax.train`: absl's flags, with errors of one line, and the keys on demand."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from fluxdit_jax.config import KEYS, STAGE_KEYS, default_config
from fluxdit_jax.renamed_keys import EARLIER, gone
from fluxdit_jax.shared.paths import expanded
from fluxdit_jax.stages import LENGTHS

SHIPPED = Path(__file__).parent / "configs"  # a link to configs/; in an installed package the files themselves

HELP = """\
usage: python -m fluxdit_jax.train --config=FILE --config.data.path=DATASET --config.workdir=RUN
           [--config.GROUP.KEY=VALUE ...]

Trains, or resumes the run in RUN: the same command goes on where it was stopped.

  --config=FILE            configs/demo.py (a demonstration), nano.py (the gate), prod.py (production), or your own;
                           where there is no such file, the package's: --config=demo works from any folder
  --config.GROUP.KEY=VALUE overrides a key of it, as --config.optim.lr=5e-5
  --plan                   prints what the run would take: time, energy, memory, disk; runs nothing
  --keys                   prints every key with its default (not the file's) and meaning; --keys=GROUP: of a group
  --help                   this

Ctrl-C saves and stops; twice stops at once. Curves: tensorboard --logdir RUN/tensorboard
Then: python -m fluxdit_jax.sample --workdir=RUN --prompt TEXT; python -m fluxdit_jax.validate --workdir=RUN"""

_FAULTS = (
    flags.Error,
    ImportError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    OverflowError,
    OSError,
    SyntaxError,
)


def parse(argv: list[str]) -> list[str]:
    """absl's flag parsing. Help and keys end with status 0; a wrong flag or file with one line and status 1."""
    wanted = argv[1:]
    if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(wanted):
        print(HELP)
        sys.exit(0)
    for argument in wanted:
        name, _, group = argument.partition("=")
        if name == "--keys":
            lines = described_keys(group.strip("."))
            if not lines:
                groups = sorted({line.partition(" ")[0].partition(".")[0] for line in described_keys()})
                sys.exit(f"error: no key begins with {group!r}; there are {', '.join(groups)}")
            print("\n".join(lines))
            sys.exit(0)
    try:
        left_over = flags.FLAGS([_found(argument) for argument in argv])
        getattr(flags.FLAGS.config, "workdir", None)  # a file that is not there is only told when it is used
        if flags.FLAGS.config is not None:
            require_effect(wanted, flags.FLAGS.config)
        return left_over
    except _FAULTS as error:
        words = str(error).replace("\\n", ". ").replace("\\", "").replace("'", "")
        unknown = "no such key: " if isinstance(error, (LookupError, AttributeError)) else ""
        keys = near_keys(wanted) if unknown else ""
        sys.exit(f"error in the flags or the configuration file: {unknown}{' '.join(words.split())}{keys}")


def require_effect(arguments: list[str], config: ConfigDict) -> None:
    """Refuses an override of which the run or no stage takes notice, and says of one which stages do not."""
    _require_one_length(arguments, config)
    names = [name.strip() for name in config.train.stages.split(",")]
    stages = {name: config.stages[name] for name in names if name in config.stages}
    for argument in arguments:
        match = re.fullmatch(r"--?config\.(\w+)\.(\w+)(=.*)?", argument)
        if match is None or not stages or (key := f"{match[1]}.{match[2]}") not in STAGE_KEYS:
            continue
        own = [name for name, group in stages.items() if group.get(match[1], {}).get(match[2]) is not None]
        own = list(stages) if key in LENGTHS else own  # each has a length of its own
        if not own:
            continue
        words = f"--config.{key} has no effect on the stages {', '.join(own)}, which have their own"
        if len(own) == len(stages):
            sys.exit(f"error: {words}: give --config.stages.{own[0]}.{key}")
        print(f"note: {words} (config.stages.{own[0]}.{key})", file=sys.stderr)


def _require_one_length(arguments: list[str], config: ConfigDict) -> None:
    """Refuses `train.steps` beside `train.images`, which decides then."""
    for argument in arguments:
        match = re.fullmatch(r"--?config\.((?:stages\.(\w+)\.)?train\.)steps(=.*)?", argument)
        group = (config.stages.get(match[2], {}) if match[2] else config).get("train", {}) if match else {}
        if match and (images := group.get("images")) is not None:
            sys.exit(
                f"error: --config.{match[1]}steps has no effect, as config.{match[1]}images is {images}: give "
                f"--config.{match[1]}images"
            )


def _found(argument: str) -> str:
    """`--config=FILE` with the home directory, and where FILE is not there but the package has one, with that.

    `demo` and `configs/demo.py` are then the package's, so that the README's commands work from any folder. The keys in
    the file have their home directory from `config.check`. Ends the process where there is no such file.
    """
    name, equals, given = argument.partition("=")
    if not equals or name not in ("--config", "-config"):
        return argument
    file = expanded(given)
    shipped = SHIPPED / f"{Path(file).stem}.py"
    if not Path(file).exists() and file in (shipped.stem, f"configs/{shipped.name}") and shipped.is_file():
        print(f"{file}: taken from the package, {shipped}", file=sys.stderr)
        file = str(shipped)
    if not Path(file.partition(":")[0]).exists():
        known = ", ".join(sorted(path.stem for path in SHIPPED.glob("[!_]*.py")))
        sys.exit(f"error: --config={given}: there is no such file; the package has {known}")
    return f"{name}={file}"


def near_keys(arguments: list[str]) -> str:
    """For the first override of an unknown key: its new name, or the keys of its group if none is near."""
    default = default_config()
    for argument in arguments:
        match = re.fullmatch(r"--?config\.([\w.]+)(=.*)?", argument)
        if match is None:
            continue
        if match[1] in EARLIER:
            return f". It {gone(match[1])}"
        group: Any = default
        parts = match[1].split(".")
        for depth, part in enumerate(parts):
            if not isinstance(group, ConfigDict) or part not in group:
                where = ".".join(["config", *parts[:depth]])
                names = list(group) if isinstance(group, ConfigDict) else []
                if not names or difflib.get_close_matches(part, names):
                    return ""  # ml_collections names a near one
                return f". The keys of {where}: {', '.join(names)}; all: python -m fluxdit_jax.train --keys"
            group = group[part]
    return ""


def described_keys(prefix: str = "") -> list[str]:
    """A line for each key that begins with `prefix`: "optim.lr = 0.0001  what it is"."""
    return [
        f"{f'{name} = {None if key.optional else key.default!r}':42} {key.meaning}"
        for name, key in KEYS.items()
        if name.startswith(prefix)
    ]
