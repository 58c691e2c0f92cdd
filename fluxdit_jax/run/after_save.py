"""A command that runs in the background after each complete save, to copy what is saved to another machine."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from fluxdit_jax.config import ConfigError
from fluxdit_jax.shared.atomic_files import write_whole

log = logging.getLogger(__name__)
OUTPUT = "after_save.log"
DONE = "after_save.done"  # the checkpoint for which the command has succeeded
NICENESS = 10
GRACE = 5.0  # seconds between asking a command to end and killing it
TIMED_OUT = (124, 137)  # exit codes of coreutils' timeout


class AfterSave:
    """Runs a command for one checkpoint at a time. Use as a context manager.

    What is saved while it runs waits, and of several that wait only the newest is done. It never stops the run: a
    command that fails, or takes longer than it may, is named in the log, and the next save is tried again.
    """

    def __init__(self, command: str, workdir: Path, minutes: float):
        """
        Args:
          command: as in `config.checkpoint.after`; empty: nothing is run. minutes: it is killed after.

        Raises:
          ConfigError: the command cannot be read, or there is no such program.
        """
        self._workdir, self._seconds = workdir.absolute(), 60 * minutes
        try:
            self._words = shlex.split(command)
            for word in self._words:
                word.format(checkpoint="", workdir="")
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            raise ConfigError(
                f"config.checkpoint.after is {command!r}: {error!r}; it must be a command with {{checkpoint}} and "
                "{workdir} that no shell reads: for pipes and variables give bash -c '...', with other braces doubled"
            ) from error
        program = self._words[0].format(checkpoint="", workdir=self._workdir) if self._words else ""
        if program and shutil.which(program) is None:
            raise ConfigError(f"config.checkpoint.after is {command!r}: there is no program {program!r} here")
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._running: Path | None = None
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._superseded = False
        self._failed = False  # the command of the last save, so far

    def __enter__(self) -> AfterSave:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def go_on(self, checkpoint: Path) -> None:
        """At a start: runs the command for the newest checkpoint, unless it has been done for that one."""
        done = self._workdir / DONE
        if not done.exists() or done.read_text(encoding="utf-8").strip() != checkpoint.name:
            self.saved(checkpoint)

    def finish(self) -> bool:
        """Waits for the last save's command, for which one of an earlier save is stopped; whether all is well."""
        until = time.monotonic() + self._seconds + 2 * GRACE
        with self._changed:
            if self._busy:
                log.info("waiting for config.checkpoint.after, at most %.3g minutes", self._seconds / 60)
            if self._waiting is not None and self._process is not None:
                self._superseded = True
                _kill(self._process)
            while self._busy and time.monotonic() < until:
                self._changed.wait(1.0)
            if self._busy:
                log.error("config.checkpoint.after is not done in time; the run ends without it")
        return not self._failed

    @property
    def _busy(self) -> bool:
        return self._waiting is not None or self._running is not None

    def saved(self, checkpoint: Path) -> None:
        """Says that a checkpoint is complete; returns at once."""
        if not self._words:
            return
        with self._changed:
            self._waiting, self._failed = checkpoint, True
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="after save", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running, self._waiting = self._waiting, None
                self._changed.notify_all()
                if self._running is None:
                    self._thread = None
                    return
            try:
                self._run(self._running)
            except Exception as error:  # noqa: BLE001  whatever it is, training goes on
                log.warning("config.checkpoint.after could not be run for %s: %s", self._running, error)

    def _locked(self, file: BinaryIO) -> bool:
        """Waits for a command of an earlier process, as long as one may take; False if it is still there."""
        until = time.monotonic() + self._seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > until:
                    return False
                time.sleep(0.2)
            except OSError:  # a file system without locks
                return True

    def _run(self, checkpoint: Path) -> None:
        words = [word.format(checkpoint=checkpoint, workdir=self._workdir) for word in self._words]
        output = self._workdir / OUTPUT
        # The command's output holds the lock as long as it lives: that of a run that was killed may still be there.
        with output.open("ab") as file:
            if not self._locked(file):
                log.warning("config.checkpoint.after: an earlier one still runs; %s is not done", checkpoint.name)
                return
            file.truncate(0)  # of the last one only: it must not fill the disk over weeks
            # `timeout` ends it at its time even if this process is killed.
            guard = [tool, "-k", f"{GRACE}", f"{self._seconds:g}"] if (tool := shutil.which("timeout")) else []
            process = subprocess.Popen(
                [*guard, *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            with self._changed:
                self._process = process
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
            code: Any = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(self._seconds + GRACE)
            _kill(process)  # the command, or what it has left behind
            with contextlib.suppress(subprocess.TimeoutExpired):  # waiting for a dead network disk it may never end
                process.wait(GRACE)
            with self._changed:
                self._process = None
        if self._superseded and self._waiting is not None:
            log.info("config.checkpoint.after for checkpoint %s was stopped for that of a later one", checkpoint.name)
            return
        if code is None or (guard and code in TIMED_OUT):
            code = f"killed after {self._seconds / 60:.3g} minutes (checkpoint.after_minutes)"
        if code:
            said = output.read_bytes()[-2000:].decode("utf-8", "replace").strip().splitlines() or ["-"]
            why = f"exit code {code}" if isinstance(code, int) else code
            form = "config.checkpoint.after failed for %s: %s: %s (all it said: %s)"
            log.warning(form, checkpoint.name, why, said[-1], output)
        else:
            log.info("config.checkpoint.after is done for checkpoint %s", checkpoint.name)
            with self._changed:
                self._failed = self._waiting is not None
            with contextlib.suppress(OSError):
                write_whole(self._workdir / DONE, checkpoint.name + "\n")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a command with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
