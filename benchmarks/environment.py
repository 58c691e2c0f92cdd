"""What a measurement was made on, and where its result is written: shared by the benchmarks."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from fluxdit_jax.device import cuda_stack

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "numpy", "torch",
            "transformers", "diffusers")  # fmt: skip


def describe() -> dict[str, Any]:
    """Versions, machine, date, commit and command line: what somebody needs to repeat the measurement."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "changed": sorted(_output(["git", "-C", str(ROOT), "diff", "--name-only", "HEAD"]).splitlines()),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := cuda_stack.version(name))},
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": _gpus(),
        "load": round(os.getloadavg()[0], 2),
    }


def write(name: str, rows: Any) -> Path:
    """Writes benchmarks/results/`name`.json: {"environment": `describe()`, "rows": rows}; returns the path.

    Written beside and renamed, so that a stopped benchmark leaves the last whole result.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"environment": describe(), "rows": rows}, indent=1) + "\n")
    temporary.replace(path)
    return path


def replace_rows(name: str, run: str, rows: list[dict[str, Any]]) -> None:
    """Writes benchmarks/results/`name`.json with these rows in the place of those that "run" names already.

    Processes that do so at once wait for each other.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    folder = os.open(RESULTS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        known = json.loads(path.read_text())["rows"] if path.exists() else []
        write(name, [row for row in known if row["run"] != run] + rows)
    finally:
        os.close(folder)


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers as they are given, so format them first."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _output(command: list[str]) -> str:
    """What a command prints; empty where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cpu() -> str:
    for line in _output(["cat", "/proc/cpuinfo"]).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _gpus() -> list[str]:
    return _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).splitlines()
