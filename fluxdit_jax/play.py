"""A page to draw with, in the browser: `python -m fluxdit_jax.play --workdir=RUN`, then http://127.0.0.1:7860.

It draws what `fluxdit_jax.sample` draws from the same prompt, reference, seed, scales and weights, to the bit; the
network, the encoders and the decoder stay loaded. Pictures go to RUN/play with their recipes. Needs gradio
(`pip install -c requirements.txt -e ".[play]"`), and the encoders of the dataset for prompts and references. Nothing is
fetched from or sent to other machines.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import threading
from pathlib import Path

from absl import logging as absl_logging

from fluxdit_jax.device import devices
from fluxdit_jax.playground.session import Session
from fluxdit_jax.run.run_directory import RunError, RunLock
from fluxdit_jax.sample import USER_ERRORS
from fluxdit_jax.shared import cli
from fluxdit_jax.shared.arguments import Parser
from fluxdit_jax.shared.paths import expanded, given_path
from fluxdit_jax.shared.sanitize import shown

LOCAL = ("127.0.0.1", "localhost", "::1")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m fluxdit_jax.play",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", type=given_path, help="run directory of fluxdit_jax.train, which may be training meanwhile")
    add("--model", type=given_path, metavar="DIR", help="directory of fluxdit_jax.export, instead of --workdir")
    add("--data", type=given_path, help="dataset whose pictures' vectors can be taken; default: the run's")
    add("--out", type=given_path, metavar="DIR", help="where pictures go; default: RUN/play or DIR/play")
    add("--host", default="127.0.0.1", help="address to listen on; default: 127.0.0.1, this machine alone")
    add("--port", type=int, default=7860, help="default: 7860")
    add("--vae", type=expanded, help="directory of the VAE; default: where the data set found it")
    add("--text-encoder", type=expanded, help="directory or id of the text encoder; default: the data set's")
    add("--vision-encoder", type=expanded, help="directory or id of the vision encoder; default: the data set's")
    arguments = parser.parse_args(argv)
    if (arguments.workdir is None) == (arguments.model is None):
        parser.error("give --workdir of a run or --model of an export")
    if not 0 < arguments.port < 65536:
        parser.error("--port must be between 1 and 65535")
    return arguments


def _require_free(host: str, port: int) -> None:
    """Raises `RunError` if nothing can listen there; gradio would speak of variables of its own."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise RunError(
            f"--host {host} --port {port}: {(error.strerror or str(error)).partition(' (while')[0]}; give another"
        ) from error


def _require_own(out: Path) -> None:
    """Raises `RunError` where a folder holds more than a history: the page serves every file in it."""
    ours = (".*", "play-[0-9]*.png", "[Tt]humbs.db", "desktop.ini")  # the last two are a file manager's
    others = [path.name for path in sorted(out.glob("*")) if not any(map(path.match, ours))]
    if others:
        raise RunError(
            f"--out {out} holds {shown(others[0])}, and the page serves every file in there: give a folder of its own"
        )


def play(arguments: argparse.Namespace) -> None:
    """Serves the page until a signal ends the process."""
    if arguments.workdir is not None and not arguments.workdir.is_dir():
        raise RunError(f"--workdir {arguments.workdir} does not exist")
    if importlib.util.find_spec("gradio") is None:
        raise RunError('the page needs gradio: pip install -c requirements.txt -e ".[play]"')
    with tempfile.TemporaryDirectory(prefix="fluxdit-play-") as scratch, contextlib.ExitStack() as held:
        _require_free(arguments.host, arguments.port)
        held.enter_context(cli.undoing(lambda: shutil.rmtree(scratch, ignore_errors=True)))
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": scratch}
        session = Session(arguments, Path(scratch))
        _require_own(session.out)
        lock = RunLock(session.out, ".lock", temporary=True, option="--out")  # two would give the same numbers
        held.callback(lock.release)
        from fluxdit_jax.playground import page  # imports gradio, which reads the environment

        address = page.launch(page.Page(session).build(), session, arguments.host, arguments.port)
        if arguments.host not in LOCAL:
            print(
                f"note: anyone who can reach {arguments.host}:{arguments.port} can draw and see the history", flush=True
            )
        print(f"{address}  weights: {session.averages()[0]}  pictures go to {session.out}  Ctrl-C ends", flush=True)
        threading.Event().wait()


def main() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)
    devices.use_compilation_cache()
    cli.run(lambda: play(parse_arguments(sys.argv[1:])), USER_ERRORS)


if __name__ == "__main__":
    main()
