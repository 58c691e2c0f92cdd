"""scripts/install.sh: which Python, which extras, which CUDA build; nothing is installed here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fluxdit_jax.device import cuda_stack
from fluxdit_jax.device.cuda_stack import Card, StackError, Torch

REPOSITORY = Path(__file__).parents[1]
PYPI, CU126, ROCM, CPU = (
    Torch("2.13.0", 13),
    Torch("2.13.0+cu126", 12),
    Torch("2.14.1+rocm7.0", None),
    Torch("2.13.0+cpu", None),
)


def program(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file


def interpreter(folder: Path, name: str, as_version: str = "") -> None:
    """A `name` on the path that is this Python, or one that calls itself `as_version`."""
    claim = f"import sys; sys.version_info = {tuple(map(int, as_version.split('.')))}; " if as_version else ""
    body = f'[ "$1" = -c ] && {{ code="$2"; shift 2; exec {shlex.quote(sys.executable)} -c "{claim}$code" "$@"; }}\n'
    program(folder, name, f'{body}exec {shlex.quote(sys.executable)} "$@"')


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the script reads, in a folder without .venv, and beside it a `bin` with no Python in it."""
    folder = tmp_path / "clone"
    (folder / "scripts").mkdir(parents=True)
    (folder / "fluxdit_jax" / "device").mkdir(parents=True)
    for name in ("scripts/install.sh", "requirements.txt", "pyproject.toml", "fluxdit_jax/__init__.py",
                 "fluxdit_jax/device/cuda_stack.py"):  # fmt: skip
        shutil.copy(REPOSITORY / name, folder / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "cat", "sed", "cksum", "cut", "uname", "dirname", "du", "grep", "rm"):
        (tools / name).symlink_to(shutil.which(name))
    return folder


def install(clone: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(clone.parent / "bin"), "HOME": str(clone.parent), **variables}
    command = ["bash", "scripts/install.sh", *options, "--dry-run"]
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)


def told(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return re.search(r"fluxdit_jax(\[.*?\])?", done.stderr)[1] or ""


def test_the_first_python_that_fits_is_taken(clone):
    tools = clone.parent / "bin"
    program(tools, "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    interpreter(tools, "python3.13", as_version="3.10.1")
    interpreter(tools, "python3.14")
    interpreter(tools, "python3")
    (tools / "python3.14").write_text((tools / "python3.14").read_text().replace("exec", "touch taken; exec"))
    (tools / "touch").symlink_to(shutil.which("touch"))
    assert told(install(clone)) == ""
    assert (clone / "taken").exists() and not (clone / ".venv").exists()


@pytest.mark.parametrize("version", ["3.10.9", "3.15.0"])
def test_no_python_that_fits_ends_with_the_three_ways(clone, version):
    interpreter(clone.parent / "bin", "python3", as_version=version)
    done = install(clone)
    assert done.returncode == 1
    assert all(way in done.stderr for way in ("3.11 to 3.14", "apt install", "uv", "PYTHON="))


def test_a_python_that_cannot_make_environments_does_not_fit(clone):
    body = f'case "$2" in *ensurepip*) exit 1;; esac; exec {shlex.quote(sys.executable)} "$@"'
    program(clone.parent / "bin", "python3", body)
    done = install(clone)
    assert done.returncode == 1 and "python3-venv" in done.stderr


def test_without_python_uv_finds_one(clone):
    elsewhere = clone.parent / "uv-pythons"
    interpreter(elsewhere, "python")
    program(clone.parent / "bin", "uv", f"[ \"$1 $2\" = 'python find' ] && echo {elsewhere / 'python'}")
    assert told(install(clone)) == ""


def test_a_python_that_is_asked_for_and_does_not_fit_is_refused(clone):
    interpreter(clone.parent / "bin", "old", as_version="3.9.1")
    interpreter(clone.parent / "bin", "python3")
    done = install(clone, PYTHON="old")
    assert done.returncode == 1 and "PYTHON=old" in done.stderr


def test_an_environment_whose_python_is_gone_is_named(clone):
    interpreter(clone.parent / "bin", "python3")
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to("/nowhere/python3.11")
    done = install(clone)
    assert done.returncode == 1 and "rm -r .venv" in done.stderr


@pytest.mark.parametrize(
    ("options", "extras"),
    [([], ""), (["--train"], ""), (["--encoders"], "[encoders]"), (["--all"], "[encoders,dev]")],
)
def test_the_extras_of_an_option(clone, options, extras):
    interpreter(clone.parent / "bin", "python3")
    assert told(install(clone, *options)) == extras


def test_an_unknown_option_prints_the_usage(clone):
    interpreter(clone.parent / "bin", "python3")
    done = install(clone, "--cuda")
    assert done.returncode == 2 and "--encoders" in done.stderr


@pytest.mark.parametrize(
    ("said", "options", "extras"),
    [
        ("580.65.06, 8.9", [], "[cuda13]"),
        ("580.65.06, 8.9", ["--encoders"], "[encoders,cuda13]"),
        ("610.1, 12.0", ["--all"], "[encoders,dev,cuda13]"),
        ("579.99, 8.9", [], "[cuda12]"),
        ("525.60.13, 8.9", [], "[cuda12]"),
        ("590.1, 7.0", [], "[cuda12]"),  # Volta: CUDA 13 needs capability 7.5
        ("470.1, 8.6", ["--cpu"], ""),
    ],
)
def test_the_driver_decides_the_cuda_build(clone, said, options, extras):
    interpreter(clone.parent / "bin", "python3")
    program(clone.parent / "bin", "nvidia-smi", f"echo '{said}'")
    assert told(install(clone, *options)) == extras


@pytest.mark.parametrize(("driver", "options"), [("524.9", []), ("470.223.02", ["--encoders"]), ("550.54", ["--all"])])
def test_a_driver_that_is_too_old_stops_with_its_number(clone, driver, options):
    interpreter(clone.parent / "bin", "python3")
    program(clone.parent / "bin", "nvidia-smi", f"echo '{driver}, 8.9'")
    done = install(clone, *options)
    assert done.returncode == 1
    assert driver in done.stderr and "580" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_broken_driver_counts_as_no_card(clone):
    interpreter(clone.parent / "bin", "python3")
    program(clone.parent / "bin", "nvidia-smi", "echo 'NVIDIA-SMI has failed because 123.45'; exit 9")
    assert told(install(clone)) == ""


def test_what_is_installed_is_not_installed_again_and_never_less(clone):
    """The second run does nothing; `--train` after `--encoders` keeps the encoders; a new pin installs again."""
    (clone / ".venv").mkdir()
    interpreter(clone / ".venv" / "bin", "python")
    (clone / ".venv" / "installed").write_text("0 0 old encoders\n")
    first = install(clone, "--train")
    assert told(first) == "[encoders]"
    sums = subprocess.run(
        "cat requirements.txt pyproject.toml scripts/install.sh | cksum", shell=True, cwd=clone, capture_output=True
    )
    (clone / ".venv" / "installed").write_text(f"{sums.stdout.decode().strip()}  encoders\n")
    for option in ("--train", "--encoders"):
        done = install(clone, option)
        assert done.returncode == 0 and "nothing" in done.stderr
    assert told(install(clone, "--all")) == "[encoders,dev]"
    with (clone / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert told(install(clone, "--train")) == "[encoders]"


@pytest.mark.parametrize(
    ("driver", "torch", "encoders", "extra"),
    [
        ("580.1", None, True, "cuda13"),
        ("580.1", PYPI, False, "cuda13"),
        ("580.1", ROCM, True, "cuda13"),
        ("580.1", CU126, True, "cuda12"),  # one stack: torch's
        ("550.1", CU126, True, "cuda12"),
        ("550.1", CPU, True, "cuda12"),
        ("550.1", None, False, "cuda12"),
        ("580.1", Torch("2.5.1+cu121", 12), True, "cuda13"),  # too old, so PyPI's is installed
    ],
)
def test_jax_follows_a_torch_that_is_kept(driver, torch, encoders, extra):
    assert cuda_stack.choose(Card(driver, (8, 9)), torch, encoders) == extra


@pytest.mark.parametrize(("torch", "encoders"), [(PYPI, False), (None, True), (Torch("2.5.1+cu121", 12), True)])
def test_a_torch_that_the_driver_does_not_run_is_refused(torch, encoders):
    with pytest.raises(StackError, match=r"550\.1.*580"):
        cuda_stack.choose(Card("550.1", None), torch, encoders)


@pytest.mark.parametrize(
    ("version", "needs", "found"),
    [
        ("2.13.0", ["nvidia-cudnn-cu13==9.2", "numpy"], PYPI),
        ("2.13.0+cu126", [], CU126),
        ("2.14.1+rocm7.0", ["pytorch-triton-rocm"], ROCM),
        ("2.13.0+cpu", [], CPU),
    ],
)
def test_the_torch_that_is_there_is_recognised_without_importing_it(tmp_path, version, needs, found):
    site = tmp_path / "site"
    installed = site / f"torch-{version}.dist-info"
    installed.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", "Name: torch", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    (installed / "METADATA").write_text("\n".join(lines) + "\n")
    code = "from fluxdit_jax.device.cuda_stack import find_torch; print(tuple(find_torch()))"
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{REPOSITORY}"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(tuple(found))
    assert found.satisfies


def test_the_least_torch_is_that_of_the_extra():
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert f'"torch>={".".join(map(str, cuda_stack.TORCH_AT_LEAST))}"' in text
