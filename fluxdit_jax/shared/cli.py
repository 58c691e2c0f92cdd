"""What every command line program of this project does alike: outputs that nobody reads, signals, errors in one line.

Imports neither JAX nor PyTorch; `preprocess` uses it too.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from tqdm import tqdm

_ADVICE = {
    errno.ENOSPC: "the disk is full; make space and give the same command again",
    errno.EDQUOT: "the quota is used up; make space and give the same command again",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not; see its owner and permissions",
    errno.EIO: "the disk does not work; look at the system's log",
}


class Quiet:
    """A text stream that goes on when whoever was reading it has gone: a closed pipe, a closed terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def _give_up(self, error: Exception) -> None:
        """Nobody reads any more: what is in the buffer, and all that follows, goes nowhere."""
        if getattr(error, "errno", None) in (errno.EPIPE, errno.EIO):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """From here on closed outputs disturb nothing: neither a pipe's reader that ends nor descriptors closed from start.

    A descriptor 0 to 2 that is closed would be given to the next file that is opened, and get what libraries say.
    Progress bars get a lock of this process alone: tqdm's own is a semaphore in /dev/shm, which stays there if the
    process is killed while making it.
    """
    tqdm.set_lock(threading.RLock())
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Quiet):
            setattr(sys, name, Quiet(stream or open(os.devnull, "w", encoding="utf-8")))  # noqa: SIM115, PTH123


def explain(error: BaseException) -> str:
    """An error in one line. One of the system names the file and what to do."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename2 or error.filename}: " if error.filename else ""
        advice = f" ({_ADVICE[error.errno]})" if error.errno in _ADVICE else ""
        return f"{where}{error.strerror}{advice}"
    return str(error)


def duration(seconds: float) -> str:
    """A time as people say it: "45 s", "12 min", "5 h 20 min", "121 d 4 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def without_traceback(record: logging.LogRecord) -> bool:
    """A filter of `logging` that leaves an error's first line."""
    record.exc_info = record.exc_text = None
    return True


def thread_error(failed: threading.ExceptHookArgs) -> None:
    """A `threading.excepthook` of one line: Orbax raises in its threads what it raises again where it is asked."""
    why = failed.exc_type.__name__ if failed.exc_value is None else explain(failed.exc_value)
    print(f"thread {failed.thread.name if failed.thread else '?'}: {why}", file=sys.stderr)


def without_closed_loops(unraisable: Any) -> None:
    """A `sys.unraisablehook`: where Orbax gives up, each part that TensorStore still handles finds no event loop.

    Its threads say so hundreds of times, each with a traceback; why Orbax gave up is reported elsewhere.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def without_pages() -> None:
    """Reports why Orbax gives up once, and not again for every array that it could not read or write."""
    sys.unraisablehook = without_closed_loops
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def leave(status: int) -> NoReturn:
    """Ends the process without waiting for its threads; all of its work must be done."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


_undo: list[Callable[[], object]] = []


@contextlib.contextmanager
def undoing(action: Callable[[], object]) -> Iterator[None]:
    """A signal that stops the program inside this block has `action` done before the program ends."""
    _undo.append(action)
    try:
        yield
    finally:
        _undo.remove(action)


def run(work: Callable[[], int | None], errors: tuple[type[Exception], ...], failure: int = 1) -> None:
    """Runs a program's work and exits: with its status, or one line and `failure` for `errors`.

    SIGINT, SIGTERM and SIGHUP undo what is half done (`undoing`) and exit with 128 and the number. They raise nothing:
    an exception that a signal raises inside a callback of the garbage collector is swallowed, and JAX has one.
    """
    outlive_readers()
    without_pages()
    stopping = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

    def stop(number: int, _frame: Any) -> None:
        for other in stopping:
            signal.signal(other, signal.SIG_IGN)  # a second one while cleaning up changes nothing
        for action in reversed(_undo):
            with contextlib.suppress(Exception):
                action()
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of a line
            print("\nstopped; nothing half-written is left", file=sys.stderr)
            sys.stdout.flush()
        os._exit(128 + number)

    for number in stopping:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and so it stays
            signal.signal(number, stop)
    try:
        status = work() or 0
    except errors as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        status = failure
    sys.stdout.flush()
    sys.exit(status)
