"""`python -m fluxdit_jax.environment`, on this environment and on fabricated ones."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from wording import lines_naming

from fluxdit_jax import environment
from fluxdit_jax.device.cuda_stack import Card

REPOSITORY = Path(__file__).parents[1]
NCCL = "nvidia/nccl/lib/libnccl.so.2"


def package(site: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A package of `site`: {file: hash} in its RECORD."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    rows = [f"{file},{f'sha256={digest}' if digest else ''}," for file, digest in files.items()]
    (folder / "RECORD").write_text("\n".join([*rows, f"{folder.name}/RECORD,,"]) + "\n")


def installed(site: Path) -> list[metadata.Distribution]:
    return list(metadata.distributions(path=[str(site)]))


def report(site: Path | None, path: str = "") -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([*([str(site)] if site else []), str(REPOSITORY)])}
    variables["PATH"] = f"{path}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", "fluxdit_jax.environment"], env=variables, capture_output=True, text=True
    )


def test_this_environment_has_no_problem():
    done = report(None)
    assert done.returncode == 0, done.stdout
    for word in (sys.executable, f"jax {' ' * 16} {metadata.version('jax')}", "JAX      cpu:0", " GB", "xla"):
        assert word in done.stdout, word


def test_a_file_of_two_packages_and_two_stacks_end_with_status_1(tmp_path):
    package(tmp_path, "nvidia-nccl-cu12", "2.29.3", {NCCL: "a"})
    package(tmp_path, "nvidia-nccl-cu13", "2.29.7", {NCCL: "b"})
    done = report(tmp_path)
    assert done.returncode == 1
    assert lines_naming(done.stdout, NCCL, "nvidia-nccl-cu12", "nvidia-nccl-cu13")
    assert "stacks" in done.stdout and "rm -r .venv" in done.stdout


def test_every_record_is_read(tmp_path):
    """Without hashes and with equal ones a file is owned twice; an __init__.py that is alike is shared."""
    shared = {"nvidia/__init__.py": "e", "one/tool.py": "", "one/same.bin": "s", "x/__pycache__/a.pyc": ""}
    package(tmp_path, "first", "1", shared | {"first/__init__.py": "1"})
    package(tmp_path, "second", "1", shared | {"second/__init__.py": "2"})
    package(tmp_path, "third", "1", {"one/other/../tool.py": "t", "second/__init__.py": "3"})
    owned = environment.owned_twice(installed(tmp_path))
    assert owned == {
        str(tmp_path / "one/tool.py"): ["first", "second", "third"],
        str(tmp_path / "one/same.bin"): ["first", "second"],
        str(tmp_path / "second/__init__.py"): ["second", "third"],
    }


@pytest.mark.parametrize(
    ("packages", "card", "problem"),
    [
        ({"nvidia-cudnn-cu12": "9.9", "nvidia-cublas-cu12": "12.9"}, Card("550.1", None), ""),
        ({"nvidia-cudnn-cu13": "9.9", "nvidia-cuda-runtime": "13.0"}, Card("580.1", None), ""),
        ({"nvidia-cudnn-cu13": "9.9", "nvidia-cuda-runtime": "13.0"}, None, ""),
        ({"nvidia-cudnn-cu12": "9.9", "nvidia-cuda-runtime": "13.0"}, None, "stacks"),
        ({"nvidia-cuda-runtime": "13.0"}, Card("570.1", None), "570.1"),
        ({"nvidia-ml-py": "13.1"}, Card("570.1", None), ""),  # not a library of CUDA
    ],
)
def test_stacks(tmp_path, packages, card, problem):
    for name, version in packages.items():
        package(tmp_path, name, version, {})
    found = environment.stacks(installed(tmp_path), card)
    assert bool(found) == bool(problem) and all(problem in one for one in found)


def test_a_card_that_jax_does_not_use_is_a_problem(tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '580.65.06, 8.9'\n")
    smi.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    variables |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "fluxdit_jax.environment"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "580.65.06" in done.stdout and "scripts/install.sh" in done.stdout
