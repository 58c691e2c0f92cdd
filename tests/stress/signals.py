"""Signals, closed pipes and terminals that go away, under every long program.

    python tests/stress/signals.py               the whole
    python tests/stress/signals.py --quick       a share of it

A program that is told to stop saves or cleans up, says so in one line, exits with 128 and the number, and the same
command then ends with the bits of one that was never stopped. Nobody's reading what it says changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import forked
from fault_table import Row, Tally, as_script, on_training_scene, through_script

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
ENDS = {"INT": INT, "TERM": TERM, "HUP": HUP}


def run(quick: bool) -> list[Row]:
    """(fault, tried, survived, lost) for each kind of signal or output."""
    return through_script(__file__, quick)


class Signalled(Tally):
    """Sends signals, closes outputs, and counts what came of it."""

    # ------------------------------------------------------------ training

    def train(
        self,
        what: str,
        act: Callable[[forked.Child], None],
        statuses: tuple[int, ...],
        says: str = "",
        begun: str = "",
        **more,  # noqa: ANN003
    ) -> forked.Ended:
        """Starts a run, acts, and looks at its end and at what the same command then gives.

        It acts when the run has said `begun` in its log, or, without that, when it has done a step. Before, a signal
        simply ends a run: there is nothing to lose.
        """
        run = self.scene.root / "signalled"
        shutil.rmtree(run, ignore_errors=True)
        child = self.scene.train(run, begin=forked.start, **more)
        log = run / "train.log"
        sign, words = (log, begun) if begun else (run / "metrics.jsonl", '"loss"')
        child.wait_until(lambda: sign.exists() and words in sign.read_text(errors="replace"), 120)
        act(child)
        ended = child.end()
        wrong = self.sober(ended, statuses)
        told = ended.err + (log.read_text(errors="replace") if log.exists() else "")
        wrong += [f"does not say {says!r}: {told[-600:]}"] if says not in told and ended.status else []
        again = self.scene.train(run)
        if again.status:
            wrong.append(f"does not go on: {again.err[-600:]}")
        elif (now := self.scene.outcome(run)) != self.scene.expected:
            wrong.append(f"other bits: {now[:300]}")
        wrong += [f"left behind: {left}"] if (left := self.scene.litter(run)) else []
        self.judge(what, wrong)
        return ended

    def sober(self, ended: forked.Ended, statuses: tuple[int, ...]) -> list[str]:
        wrong = [] if ended.status in statuses else [f"exit status {ended.status}: {ended.err[-600:]}"]
        wrong += [f"a traceback: {ended.err[-900:]}"] if "Traceback" in ended.err else []
        wrong += [f"processes outlived it: {ended.left}"] if ended.left else []
        return wrong

    def training_signals(self, quick: bool) -> None:
        saved = "(signal {})".format
        for name, number in ENDS.items():
            if quick and name == "INT":
                continue
            self.train(
                f"train: SIG{name} in the loop",
                lambda child, n=number: child.signal(n),
                (128 + number, 0),
                saved(int(number)),
            )
        if quick:
            return

        def twice(number: int, pause: float) -> Callable[[forked.Child], None]:
            def act(child: forked.Child) -> None:
                child.signal(number)
                child.wait_until(lambda: False, pause)
                with contextlib.suppress(ProcessLookupError):
                    child.signal(number)

            return act

        for name, number in ENDS.items():
            self.train(
                f"train: SIG{name}, and its echo 20 ms later",
                twice(number, 0.02),
                (128 + number, 0),
                saved(int(number)),
            )
            early = (128 + number, -number, 0)
            self.train(
                f"train: SIG{name} while it starts",
                lambda child, n=number: child.signal(n),
                early,
                begun="batch:",
            )
            for wait in (0.05, 0.2, 0.5, 1.0):
                moment = lambda child, n=number, t=wait: (child.wait_until(lambda: False, t), child.signal(n))  # noqa: E731
                self.train(f"train: SIG{name} at other moments", moment, early)

    # ------------------------------------------------------------ outputs that close

    def training_outputs(self, quick: bool) -> None:
        nothing = lambda child: None  # noqa: E731
        self.train("train: stderr's reader is gone (| head -1)", nothing, (0,), prepare=lambda: broken_pipe(2))
        if quick:
            return
        self.train("train: stdout's reader is gone", nothing, (0,), prepare=lambda: broken_pipe(1))
        self.train("train: stderr on a full disk", nothing, (0, 120), prepare=lambda: full_device(2))
        self.terminal()
        self.nohup()

    def terminal(self) -> None:
        """A real terminal that closes: the kernel sends SIGHUP, writing to it fails, the shell sends SIGHUP again."""
        master, slave = pty.openpty()

        def become() -> None:
            for number in (0, 1, 2):
                os.dup2(slave, number)
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            os.close(master)

        def close(child: forked.Child) -> None:
            os.close(slave)
            os.close(master)
            child.wait_until(lambda: False, 0.1)
            with contextlib.suppress(ProcessLookupError):
                child.signal(HUP)

        self.train("train: its terminal closes", close, (128 + HUP, 0), f"(signal {int(HUP)})", prepare=become)

    def nohup(self) -> None:
        """`nohup`: SIGHUP is ignored, there is no terminal, and the log is lines, not a bar."""
        ended = self.train(
            "train: nohup",
            lambda child: child.signal(HUP),
            (0,),
            "done: ",
            prepare=lambda: signal.signal(HUP, signal.SIG_IGN),
        )
        if "\r" in ended.err or len(ended.err.splitlines()) > 20:
            self.judge("train: nohup", [f"the log is full of progress: {ended.err[:600]}"])

    def closed_from_start(self) -> None:
        """Descriptors that are closed when the interpreter starts: then there is no sys.stderr."""
        for closed in ("2>&-", "0<&- 1>&- 2>&-"):
            run = self.scene.root / "signalled"
            shutil.rmtree(run, ignore_errors=True)
            words = f"exec {sys.executable} -m fluxdit_jax.train --config={self.scene.config} --config.workdir={run}"
            environment = os.environ | {
                "XDG_CACHE_HOME": str(self.scene.cache),
                "PYTHONPATH": str(forked.REPOSITORY),
            }
            environment.pop("LD_PRELOAD", None)
            done = subprocess.run(["sh", "-c", f"{words} {closed}"], env=environment, check=False)
            wrong = [f"exit status {done.returncode}"] if done.returncode else []
            if not done.returncode and self.scene.outcome(run) != self.scene.expected:
                wrong.append("other bits")
            self.judge("train: outputs closed from the start", wrong)

    # ------------------------------------------------------------ the other programs

    def programs(self, quick: bool) -> None:
        for name, (module, arguments, out) in self.scene.programs().items():
            fine = (0, 1) if name == "validate" else (0,)
            shutil.rmtree(out, ignore_errors=True)
            whole = self.scene.start(module, *arguments)
            expected = self.scene.files(out)
            # before a program has set its handlers a signal ends it as it ends any: there is nothing to clean up yet
            for label, number in () if quick else ENDS.items():
                for part in (0.1, 0.4, 0.7, 0.95):
                    shutil.rmtree(out, ignore_errors=True)
                    child = self.scene.start(module, *arguments, begin=forked.start)
                    child.wait_until(lambda c=child: c.catches(TERM), 10)
                    child.wait_until(lambda: False, (part - 0.1) * whole.seconds)
                    child.signal(number)
                    wrong = self.sober(child.end(), (128 + number, -number, *fine))
                    wrong += self.goes_on(module, arguments, out, fine, expected)
                    self.judge(f"{name}: SIG{label}", wrong)
            for number in (1, 2):
                shutil.rmtree(out, ignore_errors=True)
                child = self.scene.start(
                    module, *arguments, begin=forked.start, prepare=lambda n=number: broken_pipe(n)
                )
                wrong = self.sober(child.end(), fine)
                wrong += ["its output is not whole"] if self.scene.files(out) != expected else []
                self.judge(f"{name}: an output's reader is gone", wrong)

    def goes_on(
        self, module: str, arguments: list[str], out: Path, fine: tuple[int, ...], expected: dict[str, str]
    ) -> list[str]:
        torn = self.scene.torn(out, expected)
        wrong = [f"half-written: {torn}"] if torn else []
        again = self.scene.start(module, *arguments)
        if again.status not in fine or self.scene.files(out) != expected:
            wrong.append(f"does not go on: {again.status} {again.err[-600:]}")
        return wrong + [f"left behind: {left}" for left in self.scene.litter(out)]

    def build(self) -> None:
        """`preprocess build` under the same: the dataset is byte for byte that of a build left alone."""
        from build_fixtures import contents
        from training_scene import BUILD

        root = self.scene.root
        output = root / "built" / "data"
        arguments = ["build", f"--input={root / 'photos'}", f"--output={output}", *BUILD]
        begin = {"scratch": root / "scratch"}
        whole = forked.run("preprocess", *arguments, **begin)
        assert whole.status == 0, whole.err
        expected = contents(output)
        for label, number in ENDS.items():
            for part in (0.1, 0.3, 0.6, 0.9):
                shutil.rmtree(output)
                child = forked.start("preprocess", *arguments, **begin)
                child.wait_until(lambda: False, part * whole.seconds)
                child.signal(number)
                wrong = self.sober(child.end(), (128 + number, -number, 0))
                again = forked.run("preprocess", *arguments, **begin)
                wrong += [again.err[-600:]] if again.status else []
                wrong += ["other bytes"] if not again.status and contents(output) != expected else []
                self.judge(f"preprocess build: SIG{label}", wrong)
        for number in (1, 2):
            shutil.rmtree(output)
            ended = forked.run("preprocess", *arguments, **begin, prepare=lambda n=number: broken_pipe(n))
            wrong = self.sober(ended, (0,))
            wrong += ["other bytes"] if not wrong and contents(output) != expected else []
            self.judge("preprocess build: an output's reader is gone", wrong)


def broken_pipe(number: int) -> None:
    """Makes a descriptor a pipe that nobody reads, and the stream on it one that writes each line at once."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, number)
    (sys.stdout, sys.stderr)[number - 1].reconfigure(line_buffering=True)


def full_device(number: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def work_on(scene, quick: bool) -> list[Row]:  # noqa: ANN001
    signalled = Signalled(scene)
    signalled.training_signals(quick)
    signalled.training_outputs(quick)
    signalled.programs(quick)
    if not quick:
        signalled.closed_from_start()
        signalled.build()
    return signalled.rows()


if __name__ == "__main__":
    forked.enter("training_scene", "preprocess.__main__")
    sys.exit(as_script(__doc__, functools.partial(on_training_scene, __file__, work_on)))
