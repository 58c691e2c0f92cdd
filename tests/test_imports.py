"""Which package imports which, read from the source, and what starting a command loads."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from training_helpers import REPOSITORY

from benchmarks.startup import UNWANTED

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    files = [*(REPOSITORY / "fluxdit_jax").rglob("*.py"), *(REPOSITORY / "preprocess").rglob("*.py")]
    return {
        ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
        if "configs" not in file.parts
    }


def imports(file: Path, known: dict[str, Path], lazy: bool) -> set[str]:
    """Modules of ours that a file imports: at its top, or anywhere."""
    tree = ast.parse(file.read_text())
    found: set[str] = set()
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in known else node.module)
    return found & known.keys()


def package(module: str, known: dict[str, Path]) -> str:
    """The sub-package that a module lies in; a module of the top level stands for itself."""
    parts = module.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 or known[module].name == "__init__.py" else module


def graph(lazy: bool = True) -> Graph:
    known, edges = modules(), {}
    for name, file in known.items():
        edges[name] = imports(file, known, lazy) - {name}
    return edges


def packages(edges: Graph) -> Graph:
    known, found = modules(), {}
    for name, others in edges.items():
        of = found.setdefault(package(name, known), set())
        of |= {package(other, known) for other in others} - {package(name, known)}
    return found


def test_packages_import_each_other_in_one_direction() -> None:
    """`static_order` raises CycleError, which names the cycle."""
    edges = packages(graph())
    assert set(graphlib.TopologicalSorter(edges).static_order()) == edges.keys()


def test_preprocess_imports_the_contract_and_what_is_shared() -> None:
    used = {
        target
        for source, targets in packages(graph()).items()
        for target in targets
        if source.startswith("preprocess") and target.startswith("fluxdit_jax")
    }
    assert used == {"fluxdit_jax", "fluxdit_jax.dataset", "fluxdit_jax.shared", "fluxdit_jax.portable"}


def test_only_sampling_and_decoding_use_encoders() -> None:
    known = modules()
    using = {
        package(source, known)
        for source, targets in graph().items()
        if source.startswith("fluxdit_jax") and any(target.startswith("preprocess.") for target in targets)
    }
    assert using == {
        "fluxdit_jax.exporting",
        "fluxdit_jax.quality",
        "fluxdit_jax.sampling",
        "fluxdit_jax.vae",
        "fluxdit_jax.validate",
    }
    assert not {
        source
        for source, targets in graph(lazy=False).items()
        if source.startswith("fluxdit_jax") and any(target.startswith("preprocess.") for target in targets)
    }


@pytest.mark.parametrize("of", ["dataset", "shared"])
def test_the_contract_and_what_is_shared_load_neither_jax_nor_torch(of: str) -> None:
    names = [name for name in modules() if name.startswith(f"fluxdit_jax.{of}.")]
    assert names
    code = f"import {', '.join(names)}, sys; print([name for name in ('jax', 'torch', 'flax') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert found.stdout.strip() == "[]"


def test_training_sampling_and_the_gate_start_without_the_encoders_libraries() -> None:
    code = (
        "import fluxdit_jax.train, fluxdit_jax.validate, fluxdit_jax.export, sys\n"
        f"print([name for name in {UNWANTED!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
