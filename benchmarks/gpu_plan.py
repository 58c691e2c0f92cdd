"""What XLA plans for our step on a GPU that is not there: memory and errors, by compiling ahead of time.

    python -m benchmarks.gpu_plan                                   # an RTX 4090: as the configs say, and some others
    python -m benchmarks.gpu_plan --gpu h100 prod-1024:8:attention  # target:micro-batch:remat
    python -m benchmarks.gpu_plan --fsdp 2 prod-1024:8:attention    # the plan of each of two
    python -m benchmarks.gpu_plan prod-1024:8:attention:0.5         # half of the tokens routed past the middle blocks

For an environment of its own with the GPU's compiler, neither GPU nor driver needed (4 GB):

    python3 -m venv ENV; ENV/bin/pip install -c requirements.txt -e ".[cuda13]"

The whole step of `fluxdit_jax.train` is compiled, with cuDNN's attention, against a device described below. Nothing is
run, so there are no times. Products are cuBLAS's: without a device to tune on, XLA's Triton products fail at shapes
that tuning would skip. cuDNN's workspace is not in the plan (0.15 GB at prod-1024, micro-batch 4, by cuDNN itself).
JAX asks the device for its capability and for cuDNN's version; private functions of it are replaced to answer, which
is why this is a benchmark and not a test.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from typing import Any, NamedTuple


class Device(NamedTuple):
    """A GPU by its maker's public numbers; memory in bytes, a core is a streaming multiprocessor."""

    name: str
    capability: tuple[int, int]
    features: str
    cores: int
    threads_of_core: int
    shared_of_core: int
    shared_of_block: int
    bytes_per_s: int
    l2: int
    ghz: float
    memory: int


DEVICES = {
    "rtx_4090": Device(
        "NVIDIA GeForce RTX 4090", (8, 9), "NONE", 128, 1536, 102400, 101376, 1_008_096_000_000, 75497472, 2.52,
        25386352640,
    ),
    "h100": Device(
        "NVIDIA H100 80GB HBM3", (9, 0), "ACCELERATED_FEATURES", 132, 2048, 233472, 232448, 3_352_320_000_000, 52428800,
        1.98, 84942979072,
    ),
}  # fmt: skip
DEFAULT = ("prod-1024:4:attention", "prod-1024:4:block", "prod-1024:8:attention", "prod-1024:8:block",
           "prod-512:16:attention", "prod-256:64:attention", "nano-512:8:attention", "nano-512:8:block",
           "prod-1024:4:attention:0.5", "prod-512:16:attention:0.5", "prod-256:64:attention:0.5")  # fmt: skip
CUDNN = (9, 28, 0)


def target_config(gpu: str) -> str:
    """The device as XLA's `GpuTargetConfigProto`, in text form."""
    device = DEVICES[gpu]
    major, minor = device.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: {device.shared_of_core}  threads_per_core_limit: {device.threads_of_core}
  core_count: {device.cores}  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {device.bytes_per_s}
  l2_cache_size: {device.l2}  clock_rate_ghz: {device.ghz}  device_memory_size: {device.memory}
  shared_memory_per_block_optin: {device.shared_of_block}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {device.features} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"  device_address_bits: 64  name: "{device.name}"
  driver_version: "12.9.0"  runtime_version: "12.9.0"  compile_time_toolkit_version: "12.9.0"
  dnn_version: "{CUDNN[0]}.{CUDNN[1]}.{CUDNN[2]}"  pcie_bandwidth: 25769803776
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{device.name}"
"""


def pretend(gpu: str, count: int) -> list[Any]:
    """Devices that are not there; from here on JAX and our code take them for those in use."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    import jax
    from jax._src import xla_bridge
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    canonical = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda name: "cuda" if name == "gpu" else canonical(name)
    capability = DEVICES[gpu].capability
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="t", topology=f"1x1x{count}", target_config=target_config(gpu)
    )
    jax.devices()  # the CPU backend, for what is computed on the host
    jax.default_backend = lambda: "gpu"  # what our code asks
    cudnn.check_compute_capability = lambda least: capability >= tuple(int(x) for x in least.split("."))
    cudnn.is_cuda_compute_capability_equal = lambda other: capability == tuple(int(x) for x in other.split("."))
    cudnn.check_cudnn_version = lambda: 10_000 * CUDNN[0] + 100 * CUDNN[1] + CUDNN[2]
    return topology.devices


def compile_step(devices: list[Any], target: str, batch: int, remat: str, routed: float) -> dict[str, Any]:
    """The plan of a configuration's compiled step, GB."""
    import dataclasses

    import jax
    import numpy as np

    from benchmarks import gpu, gpu_sides
    from fluxdit_jax.model.routing import Routing
    from fluxdit_jax.program import Program

    settings, statistics = gpu_sides.settings(gpu_sides.TARGETS[target], gpu.make(target, "jax", batch, remat))
    settings = dataclasses.replace(settings, routing=Routing(routed) if routed else None)
    mesh = jax.sharding.Mesh(np.array([devices]), ("data", "fsdp"))
    program = Program(settings, mesh, statistics)
    compiled = program.compile()
    plan = program.memory(compiled)
    return {
        "attention": settings.model.attention,
        "plan_gb": round(plan.total / 1e9, 2),
        "parts": str(plan),
        "copied_gb": round(copied_bytes(compiled.accumulate.as_text()) / 1e9, 3),
    }


def copied_bytes(program: str) -> int:
    """Bytes that instructions of a compiled program copy which do nothing else, of arrays above 1 MB."""
    found = 0
    for kind, shape in re.findall(r"= \(?([a-z]+[0-9]+)\[([0-9,]+)\][^=]*? copy(?:-start)?\(", program):
        size = math.prod(map(int, shape.split(","))) * int(re.sub(r"\D", "", kind)) // 8
        found += size if size > 2**20 else 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configurations", nargs="*", metavar="TARGET:MICRO-BATCH:REMAT[:ROUTED]", default=DEFAULT)
    parser.add_argument("--gpu", choices=DEVICES, default="rtx_4090")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that the state is split over")
    a = parser.parse_args()
    devices = pretend(a.gpu, a.fsdp)

    from benchmarks.environment import table, write

    rows = []
    for name in a.configurations:
        target, batch, remat, routed = f"{name}:0".split(":")[:4]
        print(f"compiling {name} ...", file=sys.stderr)
        row = {"gpu": a.gpu, "target": target, "batch": int(batch), "remat": remat, "routed": float(routed)}
        try:
            row |= compile_step(devices, target, int(batch), remat, float(routed))
        except Exception as error:  # noqa: BLE001  whatever the compiler says is a result
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        write(f"gpu_plan_{a.gpu}" + (f"_fsdp_{a.fsdp}" if a.fsdp > 1 else ""), rows)
    header = ["target", "micro-batch", "remat", "routed", "attention", "plan, GB", "copied, GB", "parts"]
    keys = ("target", "batch", "remat", "routed", "attention", "plan_gb", "copied_gb")
    print(table(header, [[*(r.get(k, "-") for k in keys), r.get("parts", r.get("error"))] for r in rows]))


if __name__ == "__main__":
    main()
