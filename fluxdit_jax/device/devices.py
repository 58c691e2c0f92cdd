"""The devices: their peak rate, their memory, the cache of what was compiled for them, several processes as one run."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp

_MEMORY_SHARES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")  # JAX refuses both at once
_MEMORY_SHARE = "0.92"  # 23.4 GB of an RTX 4090; the rest is for CUDA itself and a screen
# Dense bf16 TFLOP/s with f32 accumulation, by the start of the device's name (the makers' data sheets).
PEAK_TFLOPS = {
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA RTX 6000 Ada": 364.2,
    "NVIDIA L40S": 362.1,
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,  # before the one that its name begins with
    "NVIDIA H100": 989.4,
    "NVIDIA H200": 989.4,
}
_OTHER_CHIPS = {"Laptop", "Max-Q", "D", "Ti", "NVL"}  # behind such a name: slower or faster than it


def peak_tflops(override: float | None = None) -> float | None:
    """Peak dense bf16 TFLOP/s of one device of this run; None if it is not known."""
    if override is not None:
        return override
    return peak_tflops_of(jax.devices()[0].device_kind)


def peak_tflops_of(kind: str) -> float | None:
    """Peak dense bf16 TFLOP/s of a device by its name; None if it is not known."""
    for name, peak in PEAK_TFLOPS.items():
        if kind.startswith(name):
            return None if _OTHER_CHIPS & set(kind.removeprefix(name).split()) else peak
    return None


@functools.lru_cache
def measured_tflops(side: int = 1024, times: int = 5) -> float:
    """What an f32 product of square matrices reaches on one device, TFLOP/s; takes a fraction of a second."""
    a = jnp.ones((side, side), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds) / 1e12


def use_most_memory() -> None:
    """Lets JAX take 92 % of a GPU's memory, unless the environment says otherwise; its own default is 75 %.

    To be called before JAX first asks for its devices. A machine without a GPU does not notice.
    """
    if not any(name in os.environ for name in _MEMORY_SHARES):
        os.environ[_MEMORY_SHARES[0]] = _MEMORY_SHARE


def memory_limit_gb() -> float | None:
    """What JAX may take of the first device's memory, GB; None where the backend does not say."""
    return _memory_gb("bytes_limit")


def peak_memory_gb() -> float | None:
    """Largest memory in use on the first device so far, GB; None where the backend does not say."""
    return _memory_gb("peak_bytes_in_use")


def _memory_gb(what: str) -> float | None:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats[what] / 1e9 if what in stats else None


def join_processes(coordinator: str | None, processes: int, process: int) -> None:
    """Joins this process to the others of a run; does nothing for a run of one.

    Args:
      coordinator: "host:port" of process 0, or "auto" where a cluster (SLURM, Open MPI) says it all.
    """
    if coordinator == "auto":
        jax.distributed.initialize()
    elif coordinator is not None:
        jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, in $JAX_COMPILATION_CACHE_DIR if set: a second start skips the compiler."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fluxdit_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
