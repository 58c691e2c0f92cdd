"""`preprocess build` on a disk that is full: at every fill level, an error that says so, and then it goes on.

    python tests/stress/preprocess_disk.py        (as root: it mounts small file systems)

A memory file system of N kilobytes is mounted, the build runs into its end, the file system is made larger,
the same command is given again, and the result must equal that of a run with room.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from build_fixtures import contents  # noqa: E402
from fault_table import Row, as_script, through_script  # noqa: E402
from preprocess_kills import Make, alone, by_workers, draw  # noqa: E402

from fluxdit_jax.dataset.manifest import MANIFEST  # noqa: E402
from preprocess import PreprocessError  # noqa: E402
from preprocess.inspect.verify import verify  # noqa: E402


def mount(folder: Path, kilobytes: int, more: str = "") -> bool:
    """Whether a file system of this size could be mounted (or made that large)."""
    command = ["mount", "-t", "tmpfs", "-o", f"{more}size={kilobytes}k", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def quietly(photos: Path, output: Path, make: Make = alone) -> str:
    """Builds; returns the error's text, "" if there was none."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            make(photos, output)
        except PreprocessError as error:
            return str(error)
    return ""


def fill(step: int, make: Make = alone) -> tuple[int, int, list[str]]:
    """Tries disks of growing size until one is large enough; returns (tried, full, what went wrong)."""
    tried = full = 0
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        photos, disk = Path(name) / "photos", Path(name) / "disk"
        draw(photos, range(24))
        quietly(photos, Path(name) / "reference" / "data")
        reference = contents(Path(name) / "reference" / "data")
        disk.mkdir()
        kilobytes = 8
        while True:
            if not mount(disk, kilobytes):
                raise PermissionError("mounting a tmpfs needs root")
            try:
                error = quietly(photos, disk / "data", make)
                tried += 1
                if error:
                    full += 1
                    if "full" not in error:
                        wrong.append(f"{kilobytes} KB: {error}")
                    if (disk / "data" / MANIFEST).exists():
                        wrong.append(f"{kilobytes} KB: there is a manifest")
                    if list((disk / "data").rglob("*.tmp")):
                        wrong.append(f"{kilobytes} KB: a temporary file was left")
                    mount(disk, 64_000, "remount,")
                    if again := quietly(photos, disk / "data", make):
                        wrong.append(f"{kilobytes} KB: with room again: {again}")
                if contents(disk / "data") != reference or verify(disk / "data"):
                    wrong.append(f"{kilobytes} KB: the result differs")
                if not error:
                    return tried, full, wrong
            except Exception as surprise:  # noqa: BLE001  that is what this looks for
                wrong.append(f"{kilobytes} KB: {type(surprise).__name__}: {surprise}")
                if len(wrong) > 20:
                    return tried, full, wrong
            finally:
                subprocess.run(["umount", str(disk)], check=False)
            kilobytes += step


def run(quick: bool) -> list[Row]:
    """(fault, tried, survived, lost) for disks of many sizes that are full."""
    return through_script(__file__, quick)


def work(quick: bool) -> list[Row]:
    rows = []
    for what, make in (("a full tmpfs", alone), ("by two workers: a full tmpfs", by_workers)):
        try:
            _, full, wrong = fill(150 if quick else 24, make)
        except PermissionError as error:
            print(f"not tried: {error}")
            full, wrong = 0, []
        print("\n".join(wrong))
        rows.append((f"preprocess build, {what}", full, full - len(wrong), len(wrong)))
    return rows


if __name__ == "__main__":
    sys.exit(as_script(__doc__, work))
