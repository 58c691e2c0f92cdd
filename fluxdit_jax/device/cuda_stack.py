"""Which CUDA build of JAX belongs on this machine: one stack, which JAX and PyTorch share.

    python -m fluxdit_jax.device.cuda_stack [--encoders]    # "cuda13", "cuda12" or "" (no card), or stops with a reason
    python -m fluxdit_jax.device.cuda_stack --kept          # the version of a torch that is there and new enough, or ""

JAX and PyTorch both install NVIDIA's libraries as packages. Those of CUDA 12 and of CUDA 13 own the same files
(`nvidia/nccl/lib/libnccl.so.2`, cuDNN's): in one environment the last one written decides for both. PyTorch's build on
PyPI is for CUDA 13. Imports the standard library only: `scripts/install.sh` asks it before anything is installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from typing import NamedTuple

CUDA12_DRIVER = 525  # the first driver that runs CUDA 12's and 13's libraries
CUDA13_DRIVER = 580
CUDA13_CAPABILITY = (7, 5)
TORCH_AT_LEAST = (2, 9)  # as pyproject.toml's [encoders]


class StackError(Exception):
    """No build of JAX fits the driver or the packages that are there; the message says what to do."""


class Card(NamedTuple):
    """The NVIDIA driver's version, and the lowest compute capability of the cards; None where nvidia-smi omits it."""

    driver: str
    capability: tuple[int, int] | None

    @property
    def major(self) -> int:
        return int(self.driver.partition(".")[0])

    @property
    def limit(self) -> str:
        """Why CUDA 13's libraries do not run here; "" if they do."""
        if self.capability is not None and self.capability < CUDA13_CAPABILITY:
            return f"the card's compute capability {self.capability[0]}.{self.capability[1]}"
        return f"the NVIDIA driver {self.driver}" if self.major < CUDA13_DRIVER else ""


class Torch(NamedTuple):
    """The PyTorch of this environment: its version, and its CUDA's major version; None for ROCm and CPU builds."""

    version: str
    cuda: int | None

    @property
    def satisfies(self) -> bool:
        """It is new enough for the encoders, whatever its build."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return found is not None and (int(found[1]), int(found[2])) >= TORCH_AT_LEAST


def find_card() -> Card | None:
    """The NVIDIA cards of this machine, as nvidia-smi tells; None where there is none."""
    said = _nvidia_smi("driver_version,compute_cap") or _nvidia_smi("driver_version")
    driver = re.search(r"(?<![\d.])(\d{3,4}(?:\.\d+)+)", said)
    if driver is None:
        return None
    capabilities = [(int(a), int(b)) for a, b in re.findall(r",\s*(\d{1,2})\.(\d)\s*$", said, re.MULTILINE)]
    return Card(driver[1], min(capabilities, default=None))


def _nvidia_smi(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def version(package: str) -> str | None:
    """Of a package of this environment; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def find_torch() -> Torch | None:
    """The PyTorch that is installed here, without importing it; None for none."""
    try:
        installed = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return None
    found = re.search(r"\+cu(\d\d)", installed.version)
    if "+" not in installed.version:  # PyPI's build: its requirements tell
        found = re.search(r"nvidia-\w+-cu(\d\d)", " ".join(installed.requires or []))
    return Torch(installed.version, int(found[1]) if found else None)


def installed_jax_cuda() -> int | None:
    """The CUDA major version of the JAX plugin that is installed here; None for none."""
    return next((major for major in (13, 12) if version(f"jax-cuda{major}-plugin")), None)


def choose(card: Card | None, torch: Torch | None, encoders: bool) -> str:
    """The extra of this project that installs JAX for the card: "cuda13", "cuda12", or "" without a card.

    Args:
      card: of this machine.
      torch: what is installed already.
      encoders: PyTorch is to be installed as well, unless a fitting one is there.

    Raises:
      StackError: the driver is too old, or PyTorch would bring another CUDA than the one that the driver runs.
    """
    if card is None:
        return ""
    if card.major < CUDA12_DRIVER:
        raise StackError(
            f"the NVIDIA driver is {card.driver}; CUDA builds of JAX need {CUDA12_DRIVER} or later, of PyTorch "
            f"{CUDA13_DRIVER}. Update the driver, or install for the CPU: bash scripts/install.sh --cpu"
        )
    torch = torch if torch is not None and torch.satisfies else None
    brings = torch.cuda if torch else 13 if encoders else None
    if not card.limit:
        return "cuda12" if brings == 12 else "cuda13"
    if brings == 13:
        there = f"torch {torch.version}, which is installed, needs" if torch else "PyPI's torch needs"
        raise StackError(
            f"{card.limit} allows CUDA 12 only; {there} CUDA 13 (driver {CUDA13_DRIVER} or later, capability 7.5). "
            "Update the driver; or first put torch's build for CUDA 12 there (bash scripts/install.sh; .venv/bin/pip "
            "install torch --index-url https://download.pytorch.org/whl/cu126) and give this command again; or install "
            "--train here and encode on another machine"
        )
    return "cuda12"


def main(arguments: list[str]) -> int:
    torch = find_torch()
    if "--kept" in arguments:
        print(torch.version if torch and torch.satisfies else "")
        return 0
    try:
        extra = choose(find_card(), torch, "--encoders" in arguments)
        installed = installed_jax_cuda()
        if installed is not None and extra not in ("", f"cuda{installed}"):
            raise StackError(
                f"JAX is installed for CUDA {installed}, and this driver and PyTorch want {extra}: two CUDA stacks "
                "would overwrite each other. Remove the environment (rm -r .venv), then install again"
            )
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(extra)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
