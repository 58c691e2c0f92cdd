"""Runs one list of tests again and again, each time in a fork of a process that has imported the libraries.

A mutation test of one second would otherwise wait four for its imports. `Server` is started by benchmarks/mutants.py;
the command that cosmic-ray runs for each fault is this file with the address of the server: it exits with the tests'
status. Nothing of this project is imported before the fork, and no JAX backend is initialised.
"""

import compileall
import contextlib
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

QUICK = 0.3  # seconds: tests below go first within their file


def serve(clone: Path, address: Path, tests: list[str]) -> None:
    """Answers each connection with the exit status of `pytest -x tests`, run in `clone` in a fork. Does not return."""
    import_libraries()
    os.chdir(clone)
    compileall.compile_dir(clone, quiet=1)  # once; the file with a fault is newer than its bytecode
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.path[:] = [str(clone), *[path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parents[1]]]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            status = _in_a_fork(connection, tests, address.with_suffix(".durations"))
            with contextlib.suppress(BrokenPipeError), connection:  # a client that took too long is gone
                connection.sendall(bytes([status]))


def import_libraries() -> None:
    """What the tests import and this project does not own."""
    # ruff: noqa: F401
    import flax.nnx
    import grain
    import hypothesis
    import jax
    import numpy
    import optax
    import orbax.checkpoint
    import PIL.Image
    import pyarrow.parquet
    import pytest
    import scipy.ndimage
    import tensorboard.summary
    import torch
    import transformers


def _in_a_fork(connection: socket.socket, tests: list[str], durations: Path) -> int:
    """The status of the tests, or 1 when the client went away (it took too long), in which case they are stopped."""
    child = os.fork()
    if child == 0:
        os.setsid()
        import hypothesis
        import pytest

        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # the first failure is enough
        hypothesis.settings.register_profile("first failure", phases=phases, database=None)
        hypothesis.settings.load_profile("first failure")
        options = ["-x", "-q", "--no-header", "--assert=plain", "-m", "not slow"]
        os._exit(int(pytest.main([*options, *tests], plugins=[_Order(durations)])))
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([connection, ended], [], [])
    if ended not in ready:
        os.killpg(child, signal.SIGKILL)
    os.close(ended)
    _, status = os.waitpid(child, 0)
    return min(255, abs(os.waitstatus_to_exitcode(status)))


class _Order:
    """Puts the tests that were quick in a whole run first, within their file."""

    def __init__(self, durations: Path) -> None:
        self.file, self.spent = durations, dict[str, float]()

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.file.is_file():
            known = json.loads(self.file.read_text())
            files = list(dict.fromkeys(item.path for item in items))
            items.sort(key=lambda item: (files.index(item.path), known.get(item.nodeid, 1.0) > QUICK))

    def pytest_runtest_logreport(self, report: object) -> None:
        self.spent[report.nodeid] = self.spent.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus == 0 and not self.file.is_file():
            self.file.write_text(json.dumps(self.spent))


def main() -> None:
    if len(sys.argv) > 2:
        serve(Path(sys.argv[2]), Path(sys.argv[1]), sys.argv[3:])
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(sys.argv[1])
            answer = connection.recv(1)
    except OSError:
        answer = b""
    if not answer:  # without a server every fault would look noticed
        os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(answer[0])


if __name__ == "__main__":
    main()
