"""A share of the faults of training: one run that meets most of them, one after the other, and exports of it.

    python tests/stress/training_quick.py

What CI runs: one data set, one compiled program, half a dozen starts. The modules it takes its parts from run whole by
themselves.
"""

from __future__ import annotations

import errno
import functools
import signal
import sys

import forked
import training_disk
from fault_table import Row, Tally, as_script, on_training_scene
from signals import broken_pipe
from training_kills import Kills
from two_at_once import Two

Fault = forked.Fault


def one_run(scene) -> list[Row]:  # noqa: ANN001
    """A full disk, two kills, a second process, a signal and a reader that goes, all in the same run."""
    run, tally = scene.root / "one", Tally(scene)
    judge = tally.judge

    ended = scene.train(run, under=run, fault=Fault(60, "fail", errno.ENOSPC), after=training_disk.SOON)
    judge("train: the disk is full from a write on", training_disk.plain(ended, run, (0, 1)))
    for what, fault in (
        ("train: killed in the middle of a write", Fault(350, "tear")),
        ("train: killed while it reads a checkpoint", Fault(60, "kill", reads=True)),
    ):
        ended = scene.train(run, under=run, fault=fault)
        judge(
            what,
            [] if ended.status == -signal.SIGKILL else [f"it was not: {ended.status} {ended.err[-600:]}"],
        )

    child = scene.train(run, begin=forked.start)
    lines = (run / "metrics.jsonl").read_bytes().count(b"loss") if (run / "metrics.jsonl").exists() else 0
    child.wait_until(lambda: f"pid {child.pid} " in (run / ".lock").read_text(errors="replace"), 60)
    second = scene.train(run, scratch=scene.root / "second")
    refused = second.status == 1 and f"pid {child.pid} on " in second.err
    judge("train: a second one is refused", [] if refused else [f"{second.status} {second.err[-600:]}"])
    child.wait_until(lambda: (run / "metrics.jsonl").read_bytes().count(b"loss") > lines, 60)
    child.signal(signal.SIGTERM)
    ended = child.end()
    saved = ended.status == 0 or (ended.status == 143 and f"(signal {int(signal.SIGTERM)})" in ended.err)
    judge("train: SIGTERM in the loop", [] if saved else [f"{ended.status} {ended.err[-600:]}"])

    ended = scene.train(run, prepare=lambda: broken_pipe(2))
    judge("train: stderr's reader is gone", [] if ended.status == 0 else [f"exit status {ended.status}"])
    wrong = [f"{scene.outcome(run)} is not {scene.expected}"] if scene.outcome(run) != scene.expected else []
    judge("train: after all of them the same bits, and nothing else", wrong + scene.litter(run))
    return tally.rows()


def work_on(scene, quick: bool) -> list[Row]:  # noqa: ANN001, ARG001
    rows = one_run(scene)
    export, arguments, out = scene.programs()["export"]
    kills, disks, two = Kills(scene), training_disk.Disks(scene), Two(scene)
    kills.program("export", export, arguments, out, 6)
    disks.program("export", export, arguments, out, 20)
    for whose in ("a process number that is another's by now", "rubbish"):
        two.stale(
            "export",
            lambda **more: scene.start(export, *arguments, **more),
            out / ".export" / "lock",
            (0,),
            whose,
        )
    return [*rows, *kills.rows(), *disks.rows(), *two.rows()]


if __name__ == "__main__":
    forked.enter("training_scene")
    sys.exit(as_script(__doc__, functools.partial(on_training_scene, __file__, work_on, pictures=False)))
