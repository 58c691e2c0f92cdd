"""Fixtures of the training tests. A test module asks for them with `pytest_plugins = ("training_fixtures",)`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from fork_server import Commands
from grain._src.python.dataset.transformations import shuffle
from training_helpers import TrainCommand, write_dataset

import fluxdit_jax.prepared
from fluxdit_jax.device.memory_plan import MemoryPlan
from fluxdit_jax.program import CompiledStep, Program
from fluxdit_jax.settings import Settings


@pytest.fixture(scope="session")
def xla_cache(pytestconfig: pytest.Config) -> Path:
    """Compiled programs, kept between sessions: most of the time of these tests is XLA's compiler."""
    return pytestconfig.cache.mkdir("xla")


@pytest.fixture(scope="module")
def quick_compile(xla_cache: Path) -> Iterator[None]:
    """Keeps the module's compiled programs.

    On a GPU f32 products are f32: TF32, the default there, has a mantissa of 10 bits, and the tests compare closer than
    that.
    """
    wanted = {
        "jax_compilation_cache_dir": str(xla_cache),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
    }
    if jax.default_backend() == "gpu":
        wanted["jax_default_matmul_precision"] = "highest"
    before = {name: jax.config.values[name] for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fluxdit_jax.prepared, "Program", _traced_once)
        patch.setattr(shuffle, "index_shuffle", _SHUFFLED_ONCE)
        yield
    for name, value in before.items():
        jax.config.update(name, value)


# For each record of a small set Grain goes through 65,536/N numbers: milliseconds. Runs share their seeds.
_SHUFFLED_ONCE = types.SimpleNamespace(
    index_shuffle=functools.lru_cache(100_000)(shuffle.index_shuffle.index_shuffle),
)


class _TracedOnce(Program):
    """A program that keeps what it has compiled, and what that needs, which XLA takes long to say."""

    def compile(self) -> CompiledStep:
        if not hasattr(self, "_compiled"):
            self._compiled = super().compile()
        return self._compiled

    def memory(self, step: CompiledStep) -> MemoryPlan:
        if step is not getattr(self, "_compiled", None):
            return super().memory(step)
        if not hasattr(self, "_memory"):
            self._memory = super().memory(step)
        return self._memory


_PROGRAMS: dict[tuple, Program] = {}
_KEPT = 8  # a compiled program takes about 1,100 memory mappings, of which Linux grants a process 65,530


def _traced_once(settings: Settings, mesh: jax.sharding.Mesh, statistics: tuple) -> Program:
    """The program of these very settings, which runs of one process share: most of a small run is tracing.

    A constant rate does not read the number of steps.
    """
    optimizer = settings.optimizer
    if optimizer.schedule == "constant":
        optimizer = dataclasses.replace(optimizer, total_steps=0)
    key = (dataclasses.replace(settings, optimizer=optimizer), mesh, *(part.tobytes() for part in statistics))
    if key not in _PROGRAMS:
        while len(_PROGRAMS) >= _KEPT:
            del _PROGRAMS[next(iter(_PROGRAMS))]
        _PROGRAMS[key] = _TracedOnce(settings, mesh, statistics)
    return _PROGRAMS[key]


@pytest.fixture
def package_log() -> Iterator[list[str]]:
    """What the package logs, as "LEVEL message"; unlike caplog it does not need propagation, which runs turn off."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")
    logger = logging.getLogger("fluxdit_jax")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 6 holdout records of 4x4, 2x6 and 6x2 latents with 4 channels; read only."""
    directory = tmp_path_factory.mktemp("data") / "tiny"
    write_dataset(directory)
    return directory


@pytest.fixture(scope="session")
def train_command(commands: Commands, xla_cache: Path) -> TrainCommand:
    return TrainCommand(commands, xla_cache)
