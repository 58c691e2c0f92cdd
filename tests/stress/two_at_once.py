"""Two programs on the same output, and locks whose owner is dead.

    python tests/stress/two_at_once.py [--quick]

The second one is refused in one line with the owner's process and host, and the first does not notice. A lock file that
a dead process left, whatever it says (a process number that another has by now, another host, nothing, rubbish), stops
nobody: the kernel holds the lock, the text only tells of it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import forked
from fault_table import Row, Tally, as_script, on_training_scene, through_script

HOST = socket.gethostname()
STALE = {
    "a dead process of this host": lambda: f"pid {_dead()} on {HOST}",
    "a process number that is another's by now": lambda: f"pid {os.getppid()} on {HOST}",
    "another host": lambda: "pid 4711 on elsewhere",
    "nothing": lambda: "",
    "rubbish": lambda: "\x00\xff" * 300,
}


def run(quick: bool) -> list[Row]:
    """(fault, tried, survived, lost) for each program."""
    return through_script(__file__, quick)


def _dead() -> int:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


class Two(Tally):
    """Starts the second, and counts what came of it."""

    def second(
        self, name: str, start: Callable, output: Path, lock: Path, statuses: tuple[int, ...], same: Callable[[], bool]
    ) -> None:  # fmt: skip
        """Stops the first while it holds the lock, starts a second, lets the first go on.

        Args:
          start: of the program: takes `begin`. same: whether the output is what one alone makes.
        """
        shutil.rmtree(output, ignore_errors=True)
        for _ in range(20):
            first = start(begin=forked.start)
            held = first.wait_until(lambda: lock.exists() and "pid" in lock.read_text(errors="replace"), 60)
            if held:
                first.signal(signal.SIGSTOP)
                if first.alive() and lock.exists():
                    break
                first.signal(signal.SIGCONT)
            first.end()
        else:
            self.judge(f"{name}: a second one", ["the first was never seen with its lock"])
            return
        # the second has outputs of its own: those of the first are read at its end
        ended = start(begin=forked.run, scratch=self.scene.root / "second")
        first.signal(signal.SIGCONT)
        owner = first.pid
        done = first.end()
        wrong = []
        told = re.search(r"error: .*pid (\d+) on (?:host )?(\S+?);", ended.err)
        if ended.status not in (1, 2) or told is None or "Traceback" in ended.err:
            wrong.append(f"the second: {ended.status} {ended.err[-400:]}")
        elif (int(told[1]), told[2]) != (owner, HOST):
            wrong.append(f"names pid {told[1]} on {told[2]}, not {owner} on {HOST}")
        if done.status not in statuses or not same():
            wrong.append(f"the first was disturbed: {done.status} {done.err[-400:]}")
        self.judge(f"{name}: a second one is refused", wrong)

    def stale(self, name: str, start: Callable, lock: Path, statuses: tuple[int, ...], whose: str) -> None:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.write_text(STALE[whose](), encoding="latin-1")
        ended = start(begin=forked.run)
        wrong = [] if ended.status in statuses else [f"{ended.status} {ended.err[-400:]}"]
        self.judge(f"{name}: a lock left by {whose}", wrong)

    def all(self, quick: bool) -> None:
        scene, root = self.scene, self.scene.root
        one = root / "one"

        def train(**more):  # noqa: ANN003, ANN202
            return scene.train(one, **more)

        programs = {
            "train": (train, one, one / ".lock", (0,), lambda: scene.outcome(one) == scene.expected),
        }
        if not quick:
            for name, (module, arguments, out) in reversed(scene.programs().items()):  # an export tells the verdict

                def start(module=module, arguments=arguments, **more):  # noqa: ANN001, ANN003, ANN202
                    return scene.start(module, *arguments, **more)

                scene.start(module, *arguments)
                expected = scene.files(out)
                lock = {
                    "export": out / ".export" / "lock",
                    "sample": out / ".a.png.lock",
                    "validate": out.parent / ".validation.lock",
                }[name]
                fine = (0, 1) if name == "validate" else (0,)
                same = lambda out=out, expected=expected: scene.files(out) == expected  # noqa: E731
                programs[name] = (start, out, lock, fine, same)
            programs["preprocess build"] = self.build()
        for name, (start, output, lock, statuses, same) in programs.items():
            self.second(name, start, output, lock, statuses, same)
            for whose in list(STALE)[:1] if quick else STALE:
                self.stale(name, start, lock, statuses, whose)

    def build(self) -> tuple:
        from build_fixtures import contents
        from training_scene import BUILD

        root = self.scene.root
        output = root / "built" / "data"

        def start(begin, scratch=root / "scratch"):  # noqa: ANN001, ANN202
            arguments = ["build", f"--input={root / 'photos'}", f"--output={output}", *BUILD]
            return begin("preprocess", *arguments, scratch=scratch)

        start(forked.run)
        expected = contents(output)
        return start, output, output / ".build" / "lock", (0,), lambda: contents(output) == expected


def work_on(scene, quick: bool) -> list[Row]:  # noqa: ANN001
    two = Two(scene)
    two.all(quick)
    return two.rows()


if __name__ == "__main__":
    forked.enter("training_scene", "preprocess.__main__")
    sys.exit(as_script(__doc__, functools.partial(on_training_scene, __file__, work_on)))
