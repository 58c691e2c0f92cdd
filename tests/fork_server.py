"""Commands of this project as processes that begin with their libraries imported: forks of one that has them.

Most of a short command's time is the import of JAX and PyTorch. `Commands` starts this file as a process, which
imports libraries, nothing of this project, and forks for every command: what runs there is `python -m MODULE`, with a
process id, files, environment and end of its own, that can be signalled and killed. Not for tests of what happens at
import, nor for environment variables that libraries read then.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parent.parent
JAX = ("absl.logging", "flax.nnx", "grain", "jax", "ml_collections", "optax", "orbax.checkpoint", "PIL.Image", "tqdm",
       "tensorboard.summary", "tensorflow_datasets.proto", "google.protobuf.json_format")  # fmt: skip
ENCODERS = ("jax", "pyarrow.parquet", "PIL.Image", "scipy.ndimage", "torch", "transformers", "diffusers",
            "transformers.models.t5.modeling_t5", "transformers.models.dinov3_vit.modeling_dinov3_vit",
            "diffusers.models.autoencoders.autoencoder_kl")  # fmt: skip

# For a process that forks: a lock that another thread holds at that moment stays locked in the child for ever, and
# these libraries start threads when they are imported.
ALONE = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")} | {
    "JE_ARROW_MALLOC_CONF": "background_thread:false"
}


def preload(*modules: str) -> None:
    """Imports modules before forking, and what they would import in every fork."""
    for module in modules:
        importlib.import_module(module)
    if "pyarrow" in sys.modules:
        with contextlib.suppress(ImportError):
            importlib.import_module("pandas")  # which pyarrow imports where it is installed, with the first array


# ------------------------------------------------------------------------------------------- the side of the tests


class Process:
    """What `subprocess.Popen` is, as far as tests use it, for a child of the server."""

    def __init__(self, connection: socket.socket, args: list[str], stdout: IO | None, stderr: IO | None):
        self.args, self.stdout, self.stderr, self.returncode = args, stdout, stderr, None
        self._connection = connection
        self.pid = int(connection.recv(32))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        for pipe in (self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()
        self.wait()

    def poll(self) -> int | None:
        return self.returncode if self._ended(0) else None

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """(stdout, stderr) to their ends."""
        read: dict[Any, str] = {}
        readers = [
            threading.Thread(target=lambda pipe=pipe: read.update({pipe: pipe.read()}), daemon=True)
            for pipe in (self.stdout, self.stderr)
            if pipe is not None
        ]
        for reader in readers:
            reader.start()
        deadline = None if timeout is None else time.monotonic() + timeout
        for reader in readers:
            reader.join(None if deadline is None else max(0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if deadline is None else max(0, deadline - time.monotonic()))
        return read.get(self.stdout), read.get(self.stderr)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> bool:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            told = self._connection.recv(32)
            if not told:
                raise RuntimeError("the server of the commands has gone")
            self.returncode = int(told)
            self._connection.close()
        return self.returncode is not None


class Commands:
    """Starts commands as forks of a process that has imported `libraries`, which is started with the first one.

    Use as a context manager, which ends that process, not the commands that still run.
    """

    def __init__(self, libraries: tuple[str, ...], env: dict[str, str]):
        """env: variables of the server, and of the commands, besides those of this process."""
        self._libraries, self._env, self._server, self._requests = libraries, env, None, None

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._server is not None:
            self._requests.close()
            self._server.kill()  # a fork of this process may hold the other end of the socket
            self._server.wait()

    def start(
        self,
        module: str,
        *arguments: object,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        stdout: Any = subprocess.PIPE,
        stderr: Any = subprocess.PIPE,
    ) -> Process:
        """`python -m MODULE ARGUMENTS`.

        Args:
          env: variables of this command alone. cwd: this process's by default.
          stdout, stderr: PIPE, DEVNULL, an open file, or (stderr) STDOUT.
        """
        if self._server is None:
            self._begin()
        ours, theirs = socket.socketpair()
        opened: list[int] = []
        out, out_of = _target(stdout, opened, None)
        err, err_of = _target(stderr, opened, out)
        args = [module, *map(str, arguments)]
        environment = {"PYTHONPATH": str(REPOSITORY)} | os.environ | self._env | (env or {})
        request = {"args": args, "cwd": str(cwd or Path.cwd()), "env": environment}
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(request, file)
        socket.send_fds(self._requests, [file.name.encode()], [theirs.fileno(), out, err])
        theirs.close()
        for descriptor in opened:
            os.close(descriptor)
        return Process(ours, args, out_of, err_of)

    def run(self, module: str, *arguments: object, timeout: float = 300, **more: Any) -> subprocess.CompletedProcess:
        """`start`, to its end; output that is not piped is None."""
        process = self.start(module, *arguments, **more)
        try:
            out, err = process.communicate(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def _begin(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno()), *self._libraries]
        self._server = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=REPOSITORY,
            env=os.environ | self._env | ALONE,
        )
        theirs.close()


def _target(wanted: Any, opened: list[int], out: int | None) -> tuple[int, IO | None]:
    """(the descriptor that the command writes to, what the test reads from, if it does)."""
    if wanted == subprocess.STDOUT:
        return out, None
    if wanted == subprocess.PIPE:
        read, write = os.pipe()
        opened.append(write)
        return write, os.fdopen(read, encoding="utf-8")
    if wanted == subprocess.DEVNULL:
        opened.append(os.open(os.devnull, os.O_WRONLY))
        return opened[-1], None
    return wanted.fileno(), None


# ------------------------------------------------------------------------------------------- the side of the server


def serve(requests: socket.socket) -> list[str]:
    """Forks for every request until the tests close their side; returns in a fork alone, what it is to run."""
    running: dict[int, socket.socket] = {}
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            os.read(woken, 1024)
            _report(running)
            continue
        name, descriptors, _, _ = socket.recv_fds(requests, 4096, 3)
        if not name:
            sys.exit()
        request = json.loads(Path(name.decode()).read_text())
        Path(name.decode()).unlink()
        connection = socket.socket(fileno=descriptors[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of JAX, which has no threads yet
            child = os.fork()
        if child:
            running[child] = connection
            connection.sendall(str(child).encode())
            for descriptor in descriptors[1:]:
                os.close(descriptor)
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in (*running.values(), requests, connection):
            other.close()
        os.dup2(descriptors[1], 1)
        os.dup2(descriptors[2], 2)
        for descriptor in (*descriptors[1:], woken, wakes):
            os.close(descriptor)
        return _become(request)


def _report(running: dict[int, socket.socket]) -> None:
    """Tells how children have ended."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with running.pop(ended[0]) as connection, contextlib.suppress(BrokenPipeError):
                connection.sendall(str(os.waitstatus_to_exitcode(ended[1])).encode())


def _become(request: dict[str, Any]) -> list[str]:
    """Takes the environment, folder and module path of a new process."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    added = [path for path in os.environ["PYTHONPATH"].split(os.pathsep) if path]
    sys.path[:] = [request["cwd"], *added, *sys.path[1:]]
    return request["args"]


if __name__ == "__main__":
    preload(*sys.argv[2:])
    gc.freeze()  # what forks share is not looked through in each of them
    sys.argv[:] = serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
