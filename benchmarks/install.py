"""Installing as a new user: the packages each extra resolves to on each Python, and the quickstart from an empty clone.

    python -m benchmarks.install --resolve                               # needs uv; sizes from the package index
    python -m benchmarks.install --quickstart python3.12 python3.13      # interpreters; a clone of this commit for each

A clone is made of what is committed. pip's cache is left as it is, so seconds of installing are those of a warm cache;
the MB to download are sums over the wheels that the index names for Linux x86_64.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import environment

INDEX = "https://pypi.org/simple"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
EXTRAS = ("", "encoders", "cuda13", "encoders,cuda13", "cuda12", "dev")


def resolve(extras: str, python: str) -> list[str]:
    """The "name==version" that uv finds for this project's extras under requirements.txt, Linux x86_64."""
    command = ["uv", "pip", "compile", "--quiet", "pyproject.toml", "--constraints", "requirements.txt", "--no-header",
               "--no-annotate", "--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]  # fmt: skip
    for extra in filter(None, extras.split(",")):
        command += ["--extra", extra]
    done = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, check=True)
    return [line.partition(";")[0].strip() for line in done.stdout.splitlines() if "==" in line]


def megabytes(pin: str, python: str) -> float:
    """Of the wheel for Linux x86_64 that the index has, or of the source archive."""
    name, version = pin.split("==")
    ask = urllib.request.Request(f"{INDEX}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(ask, timeout=60) as answer:
        files = json.load(answer)["files"]
    sizes = {file["filename"]: file["size"] for file in files}
    tag = f"cp{python.replace('.', '')}"
    wheels = [size for file, size in sizes.items() if _fits(file, version, tag)]
    source = [size for file, size in sizes.items() if re.fullmatch(rf".*-{re.escape(version)}\.tar\.gz", file)]
    return min(wheels or source) / 1e6


def _fits(file: str, version: str, tag: str) -> bool:
    found = re.fullmatch(r"[^-]+-([^-]+)(?:-\d[^-]*)?-([^-]+)-([^-]+)-([^-]+)\.whl", file)
    if not found or found[1] != version:
        return False
    python, abi, platform = found[2], found[3], found[4]
    any_python = "py3" in python.split(".") or tag in python.split(".") or abi == "abi3"
    return any_python and not abi.endswith("t") and (platform == "any" or "x86_64" in platform and "linux" in platform)


def resolved() -> list[dict[str, Any]]:
    """A row for each set of extras and each Python; packages are listed in full once, then where they differ."""
    rows = []
    for extras in EXTRAS:
        first: list[str] = []
        for python in PYTHONS:
            pins = resolve(extras, python)
            with ThreadPoolExecutor(8) as pool:
                total = sum(pool.map(lambda pin, python=python: megabytes(pin, python), pins))
            row = {"extras": extras, "python": python, "packages": len(pins), "download_mb": round(total)}
            row["pins"] = pins if not first else sorted(set(pins) - set(first))
            first = first or pins
            print(f"[{extras}] {python}: {len(pins)} packages, {total:,.0f} MB")
            rows.append(row)
    return rows


def quickstart(python: str) -> dict[str, Any]:
    """Clones this commit into an empty folder, installs and runs the quickstart there."""
    with tempfile.TemporaryDirectory(prefix="fluxdit_jax_install_") as folder:
        clone = Path(folder) / "fluxdit_jax"
        subprocess.run(["git", "clone", "--quiet", str(environment.ROOT), str(clone)], check=True)
        variables = os.environ | {"PYTHON": python, "XDG_CACHE_HOME": str(Path(folder) / "cache")}
        seconds, status = [], 0
        for script in ("install.sh", "quickstart.sh"):
            start = time.perf_counter()
            with (Path(folder) / f"{script}.log").open("w") as log:
                done = subprocess.run(["bash", f"scripts/{script}"], cwd=clone, env=variables, stdout=log, stderr=log)
            seconds.append(round(time.perf_counter() - start))
            status = status or done.returncode
        verdict = json.loads((clone / "runs/demo/validation/report.json").read_text())
        size = subprocess.run(["du", "-sm", str(clone / ".venv")], capture_output=True, text=True).stdout.split()[0]
        version = subprocess.run(
            [str(clone / ".venv/bin/python"), "-V"], capture_output=True, text=True
        ).stdout.split()[1]
        report = [str(clone / ".venv/bin/python"), "-m", "fluxdit_jax.environment"]
        checked = subprocess.run(report, cwd=clone, capture_output=True, text=True)
        return {
            "python": version, "install_s": seconds[0], "quickstart_s": seconds[1], "status": status,
            "passed": verdict["passed"], "venv_mb": int(size), "environment": checked.stdout.splitlines(),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--quickstart", nargs="+", default=[], metavar="PYTHON")
    arguments = parser.parse_args()
    if arguments.resolve:
        print(environment.write("install_resolved", resolved()))
    rows = []
    for python in arguments.quickstart:
        rows.append(quickstart(python))
        print({name: value for name, value in rows[-1].items() if name != "environment"})
        print(environment.write("install_quickstart", rows))
    if not rows and not arguments.resolve:
        sys.exit(parser.format_usage())


if __name__ == "__main__":
    main()
