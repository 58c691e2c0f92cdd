"""`python -m fluxdit_jax.environment`: what this machine and environment are, and what is wrong with them.

For bug reports, and after installing. The exit status is 0, or 1 with what to do.
"""

from __future__ import annotations

import csv
import os
import platform
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import fluxdit_jax
from fluxdit_jax.device import cuda_stack
from fluxdit_jax.shared.arguments import Parser

NAME = "fluxdit_jax"
INSTALL = "bash scripts/install.sh"
_CUDA = ("cuda-runtime", "cudnn", "nccl", "cublas")


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns 1 if something is wrong with the environment."""
    parser = Parser(prog="python -m fluxdit_jax.environment", description=__doc__)
    parser.parse_args(arguments)
    problems: list[str] = []
    card = cuda_stack.find_card()
    print(f"{NAME} {fluxdit_jax.__version__}, {Path(fluxdit_jax.__file__).parent}")
    print(f"Python   {platform.python_version()}, {sys.executable}")
    print(f"system   {platform.platform()}, {os.cpu_count()} cores, {_memory()}")
    print(f"disk     {shutil.disk_usage('.').free / 1e9:.0f} GB free here ({Path.cwd()})")
    print("\npackages")
    problems += _packages()
    print(f"\nNVIDIA   {f'driver {card.driver}' if card else 'nvidia-smi finds no card'}")
    if os.environ.get("LD_LIBRARY_PATH"):
        print(f"         LD_LIBRARY_PATH={os.environ['LD_LIBRARY_PATH']}: libraries there come before the packages'")
    # Ray adds a folder of what it brings along to the path when it is imported.
    folders = [path for path in sys.path if Path(path).name != "thirdparty_files"]
    installed = list(metadata.distributions(path=folders))
    problems += stacks(installed, card)
    problems += _devices(card)
    owned = owned_twice(installed)
    print(f"files    owned by two packages: {len(owned) or 'none'}")
    problems += _told(owned)
    for problem in problems:
        print(f"\nproblem: {problem}")
    print("" if problems else "\nno problem found")
    return 1 if problems else 0


def requirements(extra: str = "") -> list[tuple[str, str]]:
    """(package, version range) that this project's metadata asks for, of its base or of one extra."""
    from packaging.requirements import Requirement

    try:
        needs = [Requirement(text) for text in metadata.requires(NAME) or []]
    except metadata.PackageNotFoundError:
        return []
    of = [one for one in needs if (one.marker is None) == (not extra)]
    return [(one.name, str(one.specifier)) for one in of if one.marker is None or one.marker.evaluate({"extra": extra})]


def _packages() -> list[str]:
    """Prints each package with its version; returns what is missing or too old."""
    try:
        base, encoders = requirements(), requirements("encoders")
    except ImportError as error:
        return [f"{error}: {INSTALL}"]
    if not base:
        print("  this project is not installed here: ranges are not checked")
        base = [(name, "") for name in ("jax", "flax", "optax", "numpy")]
        encoders = [(name, "") for name in ("torch", "transformers", "diffusers", "sentencepiece")]
    problems = []
    brought_by_others = ("sentencepiece", "protobuf")  # TensorBoard needs the second: they say nothing of the extra
    with_encoders = any(cuda_stack.version(name) for name, _ in encoders if name not in brought_by_others)
    asked = [(name, wanted, "") for name, wanted in [*base, ("jaxlib", "")]]
    asked += [(name, wanted, " --encoders") for name, wanted in encoders]
    for name, wanted, flag in asked:
        found = cuda_stack.version(name)
        optional = bool(flag) and not with_encoders
        print(f"  {name:20} {found or ('not installed ([encoders])' if optional else 'MISSING'):16} {wanted}".rstrip())
        if found is None and not optional:
            problems.append(f"{name} is not installed; {wanted or 'any version'} is needed: {INSTALL}{flag}")
        elif found is not None and wanted and not _within(found, wanted):
            problems.append(f"{name} is {found}; {wanted} is needed: {INSTALL}")
    return problems


def _within(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def stacks(installed: Iterable[metadata.Distribution], card: cuda_stack.Card | None) -> list[str]:
    """Prints NVIDIA's libraries that are installed as packages; returns what does not go together.

    Args:
      installed: distributions to look through.
      card: of this machine.
    """
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for one in installed:
        name = (one.name or "").lower().replace("_", "-")
        if not name.startswith("nvidia-"):
            continue
        stem = name.removeprefix("nvidia-")
        if stem.endswith(("-cu12", "-cu13")):
            found[int(stem[-2:])][stem[:-5]] = one.version
        elif stem in _CUDA:  # from CUDA 13 on, most have no suffix; the runtime's version is CUDA's
            found[13][stem] = one.version
    for major, versions in sorted(found.items()):
        shown = [f"{name} {versions[name]}" for name in _CUDA if name in versions]
        print(f"CUDA {major}  {', '.join(shown) or ', '.join(sorted(versions))}")
    problems = []
    if len(found) > 1:
        problems.append(
            "two CUDA stacks are installed, 12 and 13; they overwrite each other's files. Install again into an empty "
            f"environment: rm -r .venv; {INSTALL} (with --encoders for PyTorch)"
        )
    if card and 13 in found and card.limit:
        problems.append(
            f"CUDA 13's libraries are installed, and {card.limit} does not run them (driver {cuda_stack.CUDA13_DRIVER} "
            f"or later, capability 7.5): update the driver, or rm -r .venv; {INSTALL}"
        )
    return problems


def _devices(card: cuda_stack.Card | None) -> list[str]:
    """Prints the devices of JAX and of PyTorch; returns why a card is not used."""
    try:
        import jax

        devices = jax.devices()
        print(f"JAX      {', '.join(f'{d.platform}:{d.id} {d.device_kind}{_device_memory(d)}' for d in devices)}")
        print(f"cache    of compiled programs: {_cache(jax)}")
    except Exception as error:  # noqa: BLE001  whatever a broken CUDA installation raises
        return [f"JAX does not start ({type(error).__name__}: {str(error).splitlines()[0]}): {INSTALL}"]
    problems = []
    if card and all(device.platform == "cpu" for device in devices):
        told = os.environ.get("JAX_PLATFORMS")
        if told:
            print(f"         JAX_PLATFORMS={told} keeps it from the card")
        else:
            problems.append(f"there is an NVIDIA card, and JAX computes on the CPU: {INSTALL}")
    torch = cuda_stack.find_torch()
    if torch:
        print(f"PyTorch  {torch.version}, built for {f'CUDA {torch.cuda}' if torch.cuda else 'the CPU or ROCm'}")
    ours = cuda_stack.installed_jax_cuda()
    if torch and torch.cuda and ours and torch.cuda != ours:
        problems.append(
            f"JAX is built for CUDA {ours}, torch {torch.version} for CUDA {torch.cuda}: rm -r .venv; {INSTALL}"
        )
    return problems


def _device_memory(device: Any) -> str:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f", {limit / 1e9:.1f} GB" if limit else ""


def owned_twice(installed: Iterable[metadata.Distribution]) -> dict[str, list[str]]:
    """{path: packages} of the files that the RECORDs of two or more packages name.

    An `__init__.py` that is the same in each is left out: packages that share a folder write it alike.
    """
    owners: dict[str, dict[str, str | None]] = defaultdict(dict)
    for one in installed:
        name = one.name or "?"
        folder = str(one.locate_file(""))
        rows = csv.reader((one.read_text("RECORD") or "").splitlines())  # `files` leaves out what is not on the disk
        for file, digest, *_ in (row for row in rows if len(row) > 1 and "__pycache__" not in row[0]):
            owners[os.path.normpath(os.path.join(folder, file))][name] = digest or None  # noqa: PTH118  fast
    return {
        path: sorted(hashes)
        for path, hashes in owners.items()
        if len(hashes) > 1 and not (path.endswith("__init__.py") and len({*hashes.values()} - {None}) == 1)
    }


def _told(owned: dict[str, list[str]]) -> list[str]:
    pairs: dict[str, list[str]] = defaultdict(list)
    for path, names in sorted(owned.items()):
        pairs[" and ".join(names)].append(path)
    return [
        f"{names} own the same {len(paths)} files ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}); the one "
        f"installed last decides. Keep one of them, or install again into an empty environment: rm -r .venv; {INSTALL}"
        for names, paths in pairs.items()
    ]


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB of memory"
    except (ValueError, OSError):
        return "memory not known"


def _cache(jax: ModuleType) -> str:
    from fluxdit_jax.device.devices import use_compilation_cache

    use_compilation_cache()
    folder = Path(jax.config.jax_compilation_cache_dir)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    return f"{folder}, {size / 1e6:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
