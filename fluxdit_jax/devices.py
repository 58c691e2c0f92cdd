"""What is known of the devices: their peak rate, and how to join several processes into one run."""

from __future__ import annotations

import jax

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


def peak_tflops(override: float | None = None) -> float | None:
    """Peak dense bf16 TFLOP/s of one device of this run; None if it is not known."""
    if override is not None:
        return override
    return peak_tflops_of(jax.devices()[0].device_kind)


def peak_tflops_of(kind: str) -> float | None:
    """Peak dense bf16 TFLOP/s of a device by its name; None if it is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if kind.startswith(name)), None)


def peak_memory_gb() -> float | None:
    """Largest memory in use on the first device so far, GB; None where the backend does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None


def join_processes(coordinator: str | None, processes: int, process: int) -> None:
    """Joins this process to the others of a run; does nothing for a run of one.

    Args:
      coordinator: "host:port" of process 0, or "auto" where a cluster (SLURM, Open MPI) says it all.
    """
    if coordinator == "auto":
        jax.distributed.initialize()
    elif coordinator is not None:
        jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)
