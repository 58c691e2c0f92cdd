"""Damages every file of a dataset and of a run, and uses them: is it noticed, by name, before it does harm?

    python tests/stress/damage.py                 hundreds of trials, some ten minutes on two cores
    python tests/stress/damage.py --quick         the share that runs in CI

Each trial damages one file of a copy and gives the copy to one program that reads it:

    noticed    the program names the file and refuses it, takes what there is instead, or repairs it
    harmless   what comes out has the same bits as with undamaged files
    lost       anything else: another result without a word, a traceback, an error that does not name the file
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import damage_scene  # noqa: E402
from damage_scene import Scene  # noqa: E402
from damage_uses import USES, Refused, Use  # noqa: E402
from fault_table import Row, as_script  # noqa: E402
from tqdm import tqdm  # noqa: E402

NOTICED, HARMLESS, LOST = "noticed", "harmless", "lost"


def _flip(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(8 * len(content))
    changed = bytearray(content)
    changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


# What happens to a file's content; None removes the file.
FAULTS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "bit flip": _flip,
    "cut to nothing": lambda content, rng: b"",
    "cut in half": lambda content, rng: content[: len(content) // 2],
    "last byte cut": lambda content, rng: content[:-1],
    "garbage": lambda content, rng: rng.randbytes(len(content)),
    "removed": lambda content, rng: None,
}


@dataclasses.dataclass(frozen=True)
class Trial:
    use: Use
    file: str  # below the data or the run directory
    fault: str
    seed: int

    def __str__(self) -> str:
        return f"{self.use.name}: {self.use.of}/{self.file}, {self.fault} (seed {self.seed})"


def kind(of: str, file: str) -> str:
    """The row of the table that a file belongs to."""
    name = Path(file).name
    if of == "data":
        return "shards" if ".array_record" in name else name
    if file.startswith(("checkpoints/", "ema/")):
        folder, step, *_ = Path(file).parts
        return f"{folder}, {'newest' if int(step) == damage_scene.STEPS else 'older'}"
    return "tensorboard/" if file.startswith("tensorboard/") else file


def told_as(of: str, file: str) -> str:
    """What a message about this file must contain."""
    parts = Path(file).parts
    return "/".join(parts[:2]) if of == "run" and parts[0] in ("checkpoints", "ema") else parts[-1]


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """What our programs log as a warning or an error."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("fluxdit_jax", "preprocess")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield told
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def attempt(scene: Scene, trial: Trial, expected: Any) -> tuple[str, str]:
    """(noticed, harmless or lost; what was said or went wrong)."""
    name = told_as(trial.use.of, trial.file)
    with scene.copy(trial.use.of) as folder, listening() as told:
        path = folder / trial.file
        changed = FAULTS[trial.fault](path.read_bytes(), random.Random(trial.seed))
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        try:
            with damage_scene.quiet():
                result = trial.use.call(scene, folder)
        except (Refused, *trial.use.errors) as error:
            return (NOTICED if name in str(error) else LOST), f"{type(error).__name__}: {error}"
        except Exception:  # noqa: BLE001  whatever a program did not expect is a defect
            return LOST, traceback.format_exc()
        named = [line for line in told if name in line]
        if result == expected:
            return (NOTICED if named else HARMLESS), "".join(named[:1])
        with damage_scene.quiet():
            right = trial.use.may_be(expected, result, folder)
        if right and (named or trial.use.of == "data" and not told):
            return NOTICED, "".join(named[:1])
        return LOST, "another result" + (f", and it said {told}" if told else " without a word")


def plan(scene: Scene, quick: bool, seed: int) -> list[Trial]:
    """What is tried: every file with every fault by the cheap programs, a share of it by the dear ones."""
    rng = random.Random(seed)
    files = {
        of: sorted(str(p.relative_to(scene.root / of)) for p in (scene.root / of).rglob("*") if p.is_file())
        for of in ("data", "run")
    }
    cheap = {"train, stop": 2, "train, skip": 2, "preprocess verify": 2, "preprocess export": 1}
    cheap |= {"resume": 3, "export": 3, "gate": 3}  # bit flips a file
    dear = {"preprocess inspect": 20, "train on": 30, "sample": 40, "validate": 20}  # trials in all
    trials = []
    for name, use in USES.items():
        of_use = []
        for file in files[use.of]:
            if name == "gate" and not file.startswith("validation/"):
                continue
            faults = [fault for fault in FAULTS for _ in range(cheap.get(name, 1) if fault == "bit flip" else 1)]
            of_use += [Trial(use, file, fault, rng.randrange(1 << 30)) for fault in faults]
        trials += rng.sample(of_use, min(dear.get(name, len(of_use)), len(of_use)))
    if not quick:
        return trials
    wanted = ("train, stop", "train, skip", "resume", "export", "gate")
    chosen = [trial for trial in trials if trial.use.name in wanted]
    return rng.sample(chosen, 60)


def run(quick: bool = False, only: str = "", seed: int = 0, limit: int = 10**9) -> list[Row]:
    """Rows of (file, tried, survived, lost); prints the table with what was noticed, by what happened."""
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        damage_scene.fast_compilation(Path(folder) / "cache")
        scene = damage_scene.make(Path(folder) / "scene")
        trials = [t for t in plan(scene, quick, seed) if only in t.use.name][:limit]
        expected = {}
        for use in {trial.use.name: trial.use for trial in trials}.values():
            with scene.copy(use.of) as copy, damage_scene.quiet():
                expected[use.name] = use.call(scene, copy)
        for trial in tqdm(trials, unit="trial", mininterval=1.0):
            verdict, what = attempt(scene, trial, expected[trial.use.name])
            counts[kind(trial.use.of, trial.file), trial.use.name][verdict] += 1
            if verdict == LOST:
                tqdm.write(f"LOST  {trial}: {what.strip()}")
    return tell(counts)


def tell(counts: dict[tuple[str, str], collections.Counter]) -> list[Row]:
    """Prints a line for each file and program; gives the rows of the common table, one for each file."""
    print(f"\n{'file':28}  {'used by':20} {'tried':>6} {NOTICED:>8} {HARMLESS:>9} {LOST:>5}")
    rows: dict[str, list[int]] = {}
    for (file, use), found in counts.items():
        tried = found.total()
        print(f"{file:28}  {use:20} {tried:6} {found[NOTICED]:8} {found[HARMLESS]:9} {found[LOST]:5}")
        row = rows.setdefault(file, [0, 0, 0])
        row[0], row[1], row[2] = row[0] + tried, row[1] + tried - found[LOST], row[2] + found[LOST]
    return [(f"damage: {file}", *row) for file, row in rows.items()]


if __name__ == "__main__":
    sys.exit(as_script(__doc__, run))
