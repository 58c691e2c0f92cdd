"""Fixtures shared by every test: tiny random encoders of the real classes, and drawn photographs."""

from __future__ import annotations

import collections
import gc
import os
import signal
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import fork_server
import numpy as np
import pytest
import tiny_models
from fork_server import Commands

# Without a GPU, programs are compiled with little optimisation and each by one thread, in this process and in those it
# starts: most of the time of the tests is XLA's compiler, and every part of a program that is compiled apart costs
# more. Set before JAX is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if metadata.version("jaxlib").startswith("0.10."):  # an unknown flag ends the process
        wanted = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {wanted}".strip()

# A test run under `nohup` or in the background of a script has these ignored, and our programs respect that.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)
_HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: a worker that gets one last would go on alone (`--no-loadscope-reorder`)."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """The collector of cycles passes over what stays: modules and tests; tracing makes many objects and few cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_runtest_teardown() -> None:
    """A command that a test runs in this process handles signals as its own process would; the next test does not."""
    for number, handler in _HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_vae_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AutoencoderKL in the Flux layout; see `tiny_models.save_tiny_vae`."""
    pytest.importorskip("torch")
    return tiny_models.save_tiny_vae(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_tiny_vae_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AutoencoderTiny; see `tiny_models.save_tiny_tiny_vae`."""
    pytest.importorskip("torch")
    return tiny_models.save_tiny_tiny_vae(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_t5_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5 encoder and tokenizer, width 64; see `tiny_models.save_tiny_t5`."""
    pytest.importorskip("torch")
    return tiny_models.save_tiny_t5(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_dino_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINOv3 ViT, width 32, patch 16; see `tiny_models.save_tiny_dino`."""
    pytest.importorskip("torch")
    return tiny_models.save_tiny_dino(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny_dino2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINOv2 ViT, width 32, patch 14; see `tiny_models.save_tiny_dino2`."""
    pytest.importorskip("torch")
    return tiny_models.save_tiny_dino2(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """Starts commands that use JAX, on the CPU."""
    with Commands(fork_server.JAX, {"JAX_PLATFORMS": "cpu"}) as commands:
        yield commands


@pytest.fixture(scope="session")
def encoder_commands() -> Iterator[Commands]:
    """Starts commands that use PyTorch's encoders, and JAX if any on the CPU."""
    pytest.importorskip("torch")
    with Commands(fork_server.ENCODERS, {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}) as commands:
        yield commands


@pytest.fixture(scope="session")
def draw_photo() -> Callable[..., np.ndarray]:
    """`draw_photo(height, width, seed) -> uint8 [H, W, 3]`: smooth colour with some texture, never flat."""

    def draw(height: int, width: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        y = np.linspace(0, 1, height)[:, None, None]
        x = np.linspace(0, 1, width)[None, :, None]
        phase, speed = rng.uniform(0, 6.3, 3), rng.uniform(2, 12, (2, 3))
        waves = np.sin(phase + speed[0] * x + speed[1] * y)
        noise = rng.normal(0, 0.05, (height, width, 3))
        return np.clip(127.5 + 100 * waves + 127.5 * noise, 0, 255).astype(np.uint8)

    return draw
