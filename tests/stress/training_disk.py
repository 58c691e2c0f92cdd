"""Disks that are full, broken, read-only or hold what may not be read, under train, validate, sample and export.

    python tests/stress/training_disk.py               the whole (as root: it mounts small file systems)
    python tests/stress/training_disk.py --quick       a share of it

What is wanted of every case: an error of one line that names the file, no traceback, nothing half-written under a
final name, no temporary file; and when the disk is well again the same command ends with the bits of an undisturbed
run. Training goes on as long as it can: what it could not write it must have told.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
from fault_table import Row, Tally, as_script, on_training_scene, through_script

Fault = forked.Fault
SOON = 200.0  # seconds in which every run must have ended


def run(quick: bool) -> list[Row]:
    """(fault, tried, survived, lost) for each kind of disk."""
    return through_script(__file__, quick)


class Disks(Tally):
    """Tries disks and counts what came of it."""

    # ------------------------------------------------------------ training

    def train(self, what: str, case: str, run: Path, heal=None, **fault) -> bool:  # noqa: ANN001, ANN003
        """One run into the fault, and one when it is gone. Returns whether the first one met it at all."""
        shutil.rmtree(run, ignore_errors=True)
        ended = self.scene.train(run, after=SOON, **fault)
        hit = bool(ended.status) or " E " in ended.err
        wrong = plain(ended, run, (0, 1))
        wrong += [f"temporary files: {left}"] if (left := self.scene.litter(run)) and not ended.status else []
        if heal:
            heal()
        again = self.scene.train(run)
        if again.status:
            wrong.append(f"does not go on: {again.err[-600:]}")
        else:
            wrong += differences(self.scene.outcome(run), self.scene.expected, ended.err)
            wrong += [f"left behind: {left}"] if (left := self.scene.litter(run)) else []
        self.judge(what, wrong, case)
        return hit

    def writes(self, places: int, name: str, fault: Fault, what: str) -> None:
        """The fault at calls spread evenly over a run."""
        run = self.scene.root / "disk-run"
        shutil.rmtree(run, ignore_errors=True)
        calls = len(self.scene.train(run, under=run).calls)
        for number in range(places):
            at = 1 + number * calls // places
            placed = Fault(at, "fail", fault.error, fault.length)
            self.train(what, f"{name} at call {at} of {calls}", run, under=run, fault=placed)

    def sizes(self, factor: float, first: int) -> None:
        """Memory file systems of growing size in KB, until a run fits; each is then made large."""
        disk = self.scene.root / "disk"
        disk.mkdir(exist_ok=True)
        kilobytes, hit = first, True
        while hit:
            with mounted(disk, f"size={kilobytes}k"):
                hit = self.train(
                    "train: a full tmpfs",
                    f"{kilobytes} KB",
                    disk / "run",
                    heal=lambda: remount(disk, "size=64m"),
                )
            kilobytes = int(kilobytes * factor) + 4

    def read_only(self) -> None:
        """A run that is half done on a file system that then is read-only: nothing starts, nothing changes."""
        disk = self.scene.root / "disk"
        disk.mkdir(exist_ok=True)
        for begun in (False, True):
            with mounted(disk, "size=64m"):
                if begun:
                    half = Fault(300, "kill")
                    self.scene.train(disk / "run", under=disk / "run", fault=half)
                before = self.scene.files(disk)
                remount(disk, "ro")
                ended = self.scene.train(disk / "run")
                wrong = plain(ended, disk, (1,))
                wrong += ["something changed"] if self.scene.files(disk) != before else []
                remount(disk, "rw")
                again = self.scene.train(disk / "run")
                wrong += [again.err[-600:]] if again.status else []
                wrong += [] if again.status else differences(self.scene.outcome(disk / "run"), self.scene.expected)
                self.judge("train: a read-only file system", wrong, f"begun: {begun}")

    def unreadable(self) -> None:
        """Files of a run that is half done cannot be read for a while: permissions, a broken sector."""
        run = self.scene.root / "disk-run"
        for error in (errno.EACCES, errno.EIO):
            for name in ("config.json", "dataset.json", "metrics.jsonl", "checkpoints"):
                shutil.rmtree(run, ignore_errors=True)
                self.scene.train(run, under=run / "ema" / "2", fault=Fault(1, "kill"))  # there are checkpoints now
                ended = self.scene.train(run, under=run / name, fault=Fault(1, "fail", error, reads=True))
                wrong = plain(ended, run, (1,))
                again = self.scene.train(run)
                wrong += [again.err[-600:]] if again.status else []
                wrong += [] if again.status else differences(self.scene.outcome(run), self.scene.expected)
                wrong += [f"left behind: {left}"] if (left := self.scene.litter(run)) else []
                self.judge("train: a file cannot be read", wrong, f"{errno.errorcode[error]} {name}")

    def cache(self, places: int) -> None:
        """The compilation cache's disk is full: costs time, nothing else."""
        cold, run = self.scene.root / "cold", self.scene.root / "disk-run"
        for at in range(1, 1 + places):
            shutil.rmtree(cold, ignore_errors=True)
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(self.scene.cache, cold)
            largest = max((p for p in cold.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)
            largest.unlink()
            ended = self.scene.train(run, cache=cold, under=cold, fault=Fault(at, "fail"))
            wrong = [ended.err[-600:]] if ended.status else []
            wrong = wrong or differences(self.scene.outcome(run), self.scene.expected)
            again = self.scene.train(run, cache=cold)
            wrong += [f"again: {again.err[-600:]}"] if again.status else []
            self.judge("train: the compilation cache's disk is full", wrong, f"call {at}")

    # ------------------------------------------------------------ the programs that read a run

    def program(self, name: str, module: str, arguments: list[str], out: Path, most: int) -> None:
        """A full disk from each write on, over nothing and over what an earlier run wrote; unreadable inputs."""
        scene, fine = self.scene, (0, 1) if name == "validate" else (0,)
        shutil.rmtree(out, ignore_errors=True)
        whole = scene.start(module, *arguments, under=out)
        expected = scene.files(out)
        calls = len(whole.calls)
        for at in range(1, calls + 1, max(1, calls // most)):
            if at % 2:
                shutil.rmtree(out, ignore_errors=True)
            ended = scene.start(module, *arguments, under=out, fault=Fault(at, "fail"))
            wrong = plain(ended, out, (0, 1, 2), verdict=name == "validate")
            torn = scene.torn(out, expected)
            wrong += [f"half-written: {torn}"] if torn else []
            again = scene.start(module, *arguments)
            if again.status not in fine or scene.files(out) != expected:
                wrong.append(f"does not go on: {again.status} {again.err[-600:]}")
            self.judge(f"{name}: the disk is full", wrong, f"from write {at} of {calls} on")
        for error in (errno.EACCES, errno.EIO):
            for file in ("config.json", "dataset.json", "ema"):
                source = scene.root / "whole" / file
                ended = scene.start(module, *arguments, under=source, fault=Fault(1, "fail", error, reads=True))
                wrong = plain(ended, scene.root, (1, 2))
                wrong += ["its output changed"] if scene.files(out) != expected else []
                self.judge(f"{name}: a file cannot be read", wrong, f"{errno.errorcode[error]} {file}")

    def programs(self, most: int) -> None:
        for name, (module, arguments, out) in self.scene.programs().items():
            self.program(name, module, arguments, out, most)


def plain(ended: forked.Ended, folder: Path, statuses: tuple[int, ...], verdict: bool = False) -> list[str]:
    """What is not as it should be in how a program told its error. verdict: status 1 may also be what it found."""
    wrong = []
    if ended.status not in statuses:
        wrong.append(f"exit status {ended.status}: {ended.err[-900:]}")
    if "Traceback" in ended.err or "Logging error" in ended.err:
        start = max(ended.err.find("Traceback"), ended.err.find("Logging error"))
        wrong.append(f"a traceback: {ended.err[max(0, start - 300) : start + 1500]}")
    elif ended.status and ended.status in statuses and not (verdict and ended.status == 1):
        last = (ended.err.strip().splitlines() or [""])[-1]
        told = [line for line in ended.err.splitlines() if line.startswith("error: ") or " E " in line]
        if not told or not any(str(folder) in line for line in told):
            wrong.append(f"no line names the file: {last[:300]}")
    if ended.left:
        wrong.append(f"processes outlived it: {ended.left}")
    return wrong


def differences(outcome: str, expected: str, told: str = "") -> list[str]:
    """Where an outcome is not the expected one. A missing line, weight or picture is none if it was told."""
    if not outcome:
        return ["no outcome"]
    a, b = json.loads(outcome), json.loads(expected)
    wrong = [f"{name} differs" for name in ("state",) if a[name] != b[name]]
    for name in ("scalars", "heldout"):
        if any(line not in b[name] for line in a[name]):
            wrong.append(f"other {name}")
        elif len(a[name]) < len(b[name]) and not re.search(r"metrics\.jsonl .*incomplete", told):
            wrong.append(f"{name} are missing")
    for name, line in (("ema", r" E .*\bema/"), ("pictures", r" E .*\bpicture")):
        if any(b[name].get(step) != value for step, value in a[name].items()):
            wrong.append(f"other {name}")
        elif len(a[name]) < len(b[name]) and not re.search(line, told):
            wrong.append(f"{name} are missing")
    return wrong


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A memory file system. Raises `PermissionError` if it may not be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise PermissionError("mounting a tmpfs needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def work_on(scene, quick: bool) -> list[Row]:  # noqa: ANN001
    disks = Disks(scene)
    full, while_full = Fault(error=errno.ENOSPC), Fault(error=errno.ENOSPC, length=40)
    broken, read_only = Fault(error=errno.EIO, length=3), Fault(error=errno.EROFS)
    disks.writes(3 if quick else 40, "ENOSPC", full, "train: the disk is full from the n-th write on")
    if not quick:
        disks.writes(40, "ENOSPC", while_full, "train: the disk is full for 40 writes")
        disks.writes(30, "EIO", broken, "train: 3 writes fail")
        disks.writes(15, "EROFS", read_only, "train: the disk becomes read-only")
        disks.unreadable()
        disks.cache(3)
    disks.programs(2 if quick else 40)
    try:
        if not quick:
            disks.sizes(1.25, 4)
            disks.read_only()
    except PermissionError as error:
        print(f"not tried: {error}")
    return disks.rows()


if __name__ == "__main__":
    forked.enter("training_scene")
    sys.exit(as_script(__doc__, functools.partial(on_training_scene, __file__, work_on)))
