"""Feeds every parser of ours with damaged and hostile input for a bounded time, in bounded memory.

    python tests/stress/fuzz.py --seconds 300            all targets, the time shared equally
    python tests/stress/fuzz.py --seconds 60 --target manifest

Input is made by hypothesis from valid examples: bytes are flipped, cut, repeated and overwritten; JSON trees get
odd values in odd places, and the manifest its checksum again afterwards. A target may accept what it is given or
raise the errors that it names; anything else, more than a second of time or `MEMORY` more bytes is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import hypothesis  # noqa: E402
from fuzz_targets import TARGETS, Target  # noqa: E402
from hypothesis import HealthCheck, Phase  # noqa: E402

MEMORY = 1_000_000_000  # bytes of address space that a target may ask for beyond what the process has
PATIENCE = 5.0  # seconds for one input; most take a millisecond
Row = tuple[str, int, int, int]


class TooSlow(Exception):
    """An input took longer than `PATIENCE`."""


@dataclasses.dataclass
class Tally:
    tried: int = 0
    accepted: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def bounded(memory: int) -> Iterator[None]:
    """Limits the address space to what it is now and `memory` bytes more."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _slow(*_: object) -> None:
    raise TooSlow(f"more than {PATIENCE:g} s")


def explore(target: Target, seconds: float, seed: int = 0) -> Tally:
    """Tries inputs for `seconds`; stops at the first that the target does not survive (shrunk by hypothesis)."""
    tally = Tally()

    def check(value: object) -> None:
        tally.tried += 1
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        try:
            target.call(value)
            tally.accepted += 1
        except target.errors:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    plan = hypothesis.settings(
        max_examples=100 if seconds else 30,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
    )
    signal.signal(signal.SIGALRM, _slow)
    end = time.monotonic() + seconds
    with target.prepared():
        while True:
            test = hypothesis.given(target.inputs)(check)
            for example in target.examples:
                test = hypothesis.example(example)(test)
            test = hypothesis.seed(seed)(plan(test))
            try:
                with bounded(MEMORY):
                    test()
            except Exception as error:  # noqa: BLE001  that is what this looks for
                tally.lost.append(_describe(error))
                return tally
            seed += 1
            if time.monotonic() > end:
                return tally


def _describe(error: BaseException) -> str:
    notes = " ".join(getattr(error, "__notes__", ()))
    frames, last = error.__traceback__, "?"
    while frames is not None:
        file = frames.tb_frame.f_code.co_filename
        if "/fluxdit_jax/" in file or "/preprocess/" in file:
            last = f"{Path(file).name}:{frames.tb_lineno}"
        frames = frames.tb_next
    return f"{type(error).__name__} at {last}: {str(error)[:200]} {notes[:400]}"


def run(quick: bool) -> list[Row]:
    """Every target in a process of its own, so that one that is killed for memory is a lost row and no more."""
    seconds = 0.5 if quick else 20.0
    rows = []
    for name in TARGETS:
        command = [sys.executable, __file__, "--target", name, "--seconds", str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300, check=False)
        tried, _, lost = (done.stdout.splitlines() or ["0 0 1"])[-1].split()
        if int(lost) or done.returncode:
            print(done.stdout + done.stderr[-2000:])
        rows.append((f"fuzz: {TARGETS[name].what}", int(tried), int(tried) - int(lost), int(lost)))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target (default: 60)")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    lost = tried = accepted = 0
    for name in arguments.target or TARGETS:
        with contextlib.redirect_stdout(io.StringIO()):
            tally = explore(TARGETS[name], arguments.seconds, arguments.seed)
        print(f"{TARGETS[name].what:60} tried {tally.tried:7,}  accepted {tally.accepted:6,}  lost {len(tally.lost)}")
        for line in tally.lost:
            print(f"    {line}")
        lost, tried, accepted = lost + len(tally.lost), tried + tally.tried, accepted + tally.accepted
    print(tried, accepted, lost)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
