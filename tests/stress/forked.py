"""Runs the project's programs in forks of a process that has imported them, with faults of the file system.

A fork starts without the seconds that importing takes, and `interposer.c` stands between it and the file
system: at the n-th call on a file under a folder it is killed, or told that the disk is full. A script that uses
this calls `enter` first, before it imports anything of the project.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import errno
import faulthandler
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from fork_server import ALONE, preload  # noqa: E402

SOURCE = Path(__file__).with_name("interposer.c")
_LIBRARY = "FLUXDIT_INTERPOSER"
_ACTS = {"count": 0, "kill": 1, "tear": 2, "fail": 3}


class NoCompiler(Exception):
    """`interposer.c` cannot be compiled here."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens at the n-th call on a file under the folder.

    Attributes:
      at: n, from 1; 0 for never.
      act: kill; tear (writes half and kills); fail with `error`, from there on for `length` calls (0: for ever).
      reads: count what reads instead of what changes.
    """

    at: int = 0
    act: str = "kill"
    error: int = errno.ENOSPC
    length: int = 0
    reads: bool = False


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
      status: exit status, or minus the number of the signal.
      calls: the counted calls, "open64 /path".
      left: processes of its session that outlived it (they have been killed since).
    """

    status: int
    out: str
    err: str
    calls: list[str]
    left: list[str]
    seconds: float


def enter(*modules: str) -> None:
    """Starts this script again with the library loaded, if it is not, and imports `modules` for the forks.

    Raises:
      NoCompiler: there is no C compiler.
    """
    if _LIBRARY not in os.environ:
        folder = tempfile.mkdtemp(prefix="interposer-")
        library = f"{folder}/interposer.so"
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise NoCompiler(f"{SOURCE} needs a C compiler (cc), and there is none")
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", library, str(SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        quiet = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}
        quiet |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # half the time to compile
        environment = os.environ | ALONE | quiet | {"LD_PRELOAD": library, _LIBRARY: library}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    library = os.environ[_LIBRARY]
    atexit.register(shutil.rmtree, Path(library).parent, ignore_errors=True)
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # its thread's lock, held at the moment of a fork, would stay locked in the child
    preload(*modules)


class Child:
    """A program that runs as a fork of this process, in a session of its own. See `start`."""

    def __init__(self, pid: int, scratch: Path):
        self.pid = pid
        self._scratch, self._started = scratch, time.monotonic()

    def err(self) -> str:
        """What it has said on stderr so far."""
        return (self._scratch / "err.txt").read_text(errors="replace")

    def alive(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Until the condition holds; False if the time was over, or the program at its end, before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.alive():
            if condition():
                return True
            time.sleep(0.002)
        return False

    def catches(self, number: int) -> bool:
        """Whether it has set a handler for a signal."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> Ended:
        """Waits for its end."""
        _, status = os.waitpid(self.pid, 0)
        calls = (self._scratch / "calls.log").read_text(errors="replace").splitlines()
        return Ended(
            status=os.waitstatus_to_exitcode(status),
            out=(self._scratch / "out.txt").read_text(errors="replace"),
            err=self.err(),
            calls=[line.split(" ", 1)[1] for line in calls if " " in line],
            left=_end_session(self.pid),
            seconds=time.monotonic() - self._started,
        )


def start(
    module: str,
    *arguments: str,
    scratch: Path,
    fault: Fault | None = None,
    under: Path | None = None,
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Child:
    """Starts `python -m module arguments` as a fork.

    Args:
      scratch: folder for its output and its TMPDIR.
      fault: what befalls its files under `under`.
      prepare: called in the child before the program; may replace its descriptors 0 to 2.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "tmp").mkdir(exist_ok=True)
    for name in ("calls.log", "out.txt", "err.txt"):
        (scratch / name).write_text("")
    child = fork()
    if not child:
        _become(module, arguments, scratch, fault, under, environment or {}, prepare)
    return Child(child, scratch)


def run(module: str, *arguments: str, after: float | None = None, **more) -> Ended:  # noqa: ANN003
    """`start`, and waits for the end. after: seconds until it is killed, if it has not ended."""
    child = start(module, *arguments, **more)
    if after is not None:
        child.wait_until(lambda: False, after)
        child.signal(signal.SIGKILL)
    return child.end()


def fork() -> int:
    """`os.fork` of a process that has no other threads."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: a lock that one of them holds would stay locked in the child"
    return os.fork()


def call(function, *arguments, seconds: float = 120):  # noqa: ANN001, ANN201
    """The string that a function returns, called in a fork: this process must not start JAX's threads.

    Raises:
      RuntimeError: it failed, or took longer than `seconds`; its traceback or its threads' stacks are on stderr.
    """
    receiving, sending = os.pipe()
    child = fork()
    if not child:
        text = ""
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            text = function(*arguments)
            with os.fdopen(sending, "w") as pipe:
                pipe.write(text)
        except BaseException:  # noqa: BLE001  it is shown
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving) as pipe:
        text = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"{function.__name__}{arguments} failed in a fork")
    return text


def _become(
    module: str,
    arguments: tuple[str, ...],
    scratch: Path,
    fault: Fault | None,
    under: Path | None,
    environment: dict[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    """The child: a session of its own, its own outputs, and then the program. Never returns."""
    status = 1
    try:
        os.setsid()
        for number, name in ((1, "out.txt"), (2, "err.txt")):
            descriptor = os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
        if prepare is not None:
            prepare()
        log = os.open(scratch / "calls.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.environ.update({"TMPDIR": str(scratch / "tmp")} | environment)
        tempfile.tempdir = None
        for inherited in list(weakref.finalize._registry):
            inherited.atexit = False  # the parent's temporary folders are the parent's to remove
        sys.argv = [module, *arguments]
        warnings.simplefilter("ignore")
        if under is not None:
            fault = fault or Fault()
            ctypes.CDLL(os.environ[_LIBRARY]).interposer_arm(
                str(under).encode(),
                ctypes.c_long(fault.at),
                ctypes.c_long(fault.length),
                _ACTS[fault.act],
                fault.error,
                int(fault.reads),
                log,
            )
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:  # as the interpreter does
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:  # noqa: BLE001  as the interpreter does
            traceback.print_exc()
        threading._shutdown()
        atexit.unregister(shutil.rmtree)  # the parent's library
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001  of this function, not of the program
        traceback.print_exc()
    finally:
        os._exit(status)


def _end_session(session: int) -> list[str]:
    """Names of the processes of a session that still live, after killing them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        fields = text[text.rindex(")") + 2 :].split()
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(text[: text.rindex(")") + 1])
            os.kill(int(stat.parent.name), signal.SIGKILL)
    return found
