"""Checkpoints: what a save costs the training loop, and how fast state is written and read against the disk.

    python -m benchmarks.checkpoint                          # demo and nano: 0.06 and 0.63 GB of state
    python -m benchmarks.checkpoint --sizes large --repeats 2   # 2.2 GB

For each size, in turn and `--repeats` times: the same number of bytes to a flat file with fsync; the state by
`Checkpoints.save`, to its end and flushed to the disk; both read back with the page cache dropped for them. The
state is random where a run's is (weights, moments, EMA) and zero where a run's is (the accumulator at a step's end),
as both compress differently.

The stall is the time until `Checkpoints.save` returns, in which a run does not train, and what the steps of
`configs/demo.py` take longer while the rest is written in the background. On a CPU the writer and the steps share
the cores; with a GPU only the first part stands in the way.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging
from tqdm import tqdm

from benchmarks.environment import table, write
from configs import demo, nano, prod
from fluxdit_jax.config import default_config
from fluxdit_jax.flow import FlowConfig, parse_drop
from fluxdit_jax.model import dit
from fluxdit_jax.objective import Objective
from fluxdit_jax.optimizer import OptimizerConfig, build_optimizer
from fluxdit_jax.run.checkpoint import Checkpoints
from fluxdit_jax.run.digest import tree_digest
from fluxdit_jax.shared.paths import given_path
from fluxdit_jax.state import TrainState, create_state
from fluxdit_jax.train_step import make_train_step

INTERVAL = 60 * default_config().checkpoint.minutes  # s between saves
CHUNK = 64 * 2**20
TEXT_TOKENS, TOKENS, BATCH = 32, 64, 16  # of the demonstration run


def model_config(config: Any, **changes: Any) -> dit.ModelConfig:
    """The network of a configuration, f32, as on a CPU."""
    names = ("width", "depth", "heads", "patch", "remat")  # channels and conditions stay the defaults
    values = {name: config.model[name] for name in names} | changes
    return dit.ModelConfig(**values, dtype="float32", attention="xla")


SIZES: dict[str, dit.ModelConfig] = {
    "demo": model_config(demo.get_config()),
    "nano": model_config(nano.get_config()),
    "large": model_config(prod.get_config(), depth=4),
    "prod": model_config(prod.get_config()),  # 10.5 GB: three times that of memory and disk
}
OPTIMIZER = OptimizerConfig(total_steps=1000, warmup_steps=100)


def make_state(config: dit.ModelConfig) -> TrainState:
    """A state as after a step: random numbers everywhere but in the accumulator."""
    optimizer = build_optimizer(OPTIMIZER)
    state = create_state(dit.initialize(config, jax.random.key(0)), optimizer)
    rng = np.random.default_rng(0)

    def fill(leaf):
        if leaf.dtype != jnp.float32:
            return leaf
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32)) * 0.02

    zeros = state.opt_state.acc_grads
    state = jax.tree.map(fill, state)
    return state._replace(opt_state=state.opt_state._replace(acc_grads=zeros))


def make_steps() -> Callable[[], float]:
    """Runs one training step of the demo on random data; returns its seconds."""
    config = SIZES["demo"]
    optimizer = build_optimizer(OPTIMIZER)
    widths = {condition.name: condition.width for condition in config.conditions}
    flow = FlowConfig(0.0, 1.0, 1.0, 3.0, True, parse_drop("all 0.05, text 0.05, vision 0.1", list(widths)))
    width = config.token_width
    moments = np.zeros(width, np.float32), np.ones(width, np.float32)
    graph = dit.build(config)[0]
    whole = make_train_step(
        Objective(graph, config, flow, moments, seed=0, global_batch_size=BATCH), optimizer, ema_target=0.9999
    )
    accumulate, update = (jax.jit(part, donate_argnums=0) for part in whole[:2])
    batch = {
        "latent": jnp.ones((BATCH, TOKENS, width), jnp.bfloat16),
        "grid": jnp.full((BATCH, 2), 8, jnp.int32),
        "text": jnp.ones((BATCH, TEXT_TOKENS, widths["text"]), jnp.bfloat16),
        "text_length": jnp.full((BATCH,), TEXT_TOKENS, jnp.int32),
        "vision": jnp.full((BATCH, widths["vision"]), widths["vision"] ** -0.5, jnp.float32),
        "index": jnp.arange(BATCH, dtype=jnp.uint32),
        "replaced": jnp.zeros((BATCH,), bool),
    }
    state = create_state(dit.initialize(config, jax.random.key(0)), optimizer)

    def run() -> float:
        nonlocal state
        started = time.perf_counter()
        state, metrics = update(accumulate(state, batch)[0])
        jax.block_until_ready(metrics)
        return time.perf_counter() - started

    run()
    return run


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def flush(paths: list[Path]) -> None:
    """Waits until the files are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def forget(paths: list[Path]) -> None:
    """Drops the files from the page cache, so that they are read from the disk."""
    flush(paths)
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_flat(path: Path, size: int) -> float:
    """Seconds to write so many random bytes to one file, fsync included."""
    chunk = np.random.default_rng(0).bytes(CHUNK)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, CHUNK):
            file.write(chunk[: min(CHUNK, size - start)])
        os.fsync(file.fileno())
    return time.perf_counter() - started


def read_flat(path: Path) -> float:
    """Seconds to read a file that is not in the page cache into one buffer."""
    forget([path])
    buffer = bytearray(CHUNK)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def measure(name: str, work: Path, repeats: int) -> dict[str, Any]:
    """All that is measured of one size."""
    state = make_state(SIZES[name])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state)
    run_step = make_steps()
    row: dict[str, Any] = {"name": name, "parameters": dit.count_parameters(SIZES[name]), "bytes": size}
    before = [run_step() for _ in range(20)]
    row["step_s"] = statistics.median(before)
    measures: dict[str, list[float]] = {}

    def add(what: str, value: float) -> None:
        measures.setdefault(what, []).append(value)

    started = time.perf_counter()
    tree_digest(state, {})
    row["digest_compile_s"] = time.perf_counter() - started  # once in a run
    run, flat = work / "run", work / "flat"
    for repeat in tqdm(range(repeats), desc=name, unit="round"):
        shutil.rmtree(run, ignore_errors=True)
        with Checkpoints(run, keep=2) as checkpoints:
            started = time.perf_counter()
            tree_digest(state, {})
            add("digest_s", time.perf_counter() - started)

            started = time.perf_counter()
            if not checkpoints.save(1, state, {"samples": 0}):
                raise RuntimeError(f"could not save under {run}")
            add("save_returns_s", time.perf_counter() - started)
            checkpoints.poll(wait=True)
            add("save_s", time.perf_counter() - started)
            flush(files(run / "checkpoints" / "1"))
            add("save_flushed_s", time.perf_counter() - started)
            written = files(run / "checkpoints" / "1")
            row["files"], row["disk_bytes"] = len(written), sum(path.stat().st_size for path in written)

            # once more while the loop trains
            before = resident()
            reset_peak()
            checkpoints.save(2, state, {"samples": 0})
            slowed = []
            while checkpoints._pending:  # what `poll` has not collected yet
                slowed.append(run_step())
                checkpoints.poll()
            add("save_memory_gb", peak() - before)
            add("slowed_s", sum(slowed) - row["step_s"] * len(slowed))
            add("slowed_steps", len(slowed))
            shutil.rmtree(run / "checkpoints" / "2")

            add("flat_write_s", write_flat(flat, row["disk_bytes"]))
            add("flat_read_s", read_flat(flat))
            flat.unlink()
        with Checkpoints(run, keep=2) as checkpoints:
            forget(files(run / "checkpoints"))
            started = time.perf_counter()
            restored = checkpoints.restore(abstract)
            jax.block_until_ready(restored[0])
            add("restore_s", time.perf_counter() - started)
            if repeat == 0 and tree_digest(restored[0], {}) != tree_digest(state, {}):
                raise RuntimeError("the state that was restored is not the one that was saved")
            del restored
    shutil.rmtree(run)
    stall = [a + b for a, b in zip(measures["save_returns_s"], measures["slowed_s"])]
    row |= {
        "measures": measures,
        "stall_share": statistics.median(measures["save_returns_s"]) / INTERVAL,
        "stall_share_with_slowed_steps": statistics.median(stall) / INTERVAL,
        "save_to_disk_ratio": _ratios(measures["flat_write_s"], measures["save_flushed_s"]),
        "restore_to_disk_ratio": _ratios(measures["flat_read_s"], measures["restore_s"]),
    }
    return row


def _ratios(disk: list[float], ours: list[float]) -> dict[str, float]:
    """Our speed as a share of the disk's, round by round: median, least, most."""
    shares = [a / b for a, b in zip(disk, ours)]
    return {"median": statistics.median(shares), "least": min(shares), "most": max(shares)}


def resident() -> float:
    """GB of memory that this process holds, after giving back what it freed."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def reset_peak() -> None:
    """Forgets the largest memory so far; see proc(5), clear_refs."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """GB of memory that this process held at most since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def show(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        m = {what: statistics.median(values) for what, values in row["measures"].items()}
        disk = row["disk_bytes"] / 1e6
        lines.append(
            [row["name"], f"{row['bytes'] / 1e9:.2f}", f"{disk / 1e3:.2f}", f"{m['digest_s']:.2f}",
             f"{m['save_returns_s']:.2f}", f"{m['slowed_s']:.2f}", f"{row['stall_share']:.3%}",
             f"{row['stall_share_with_slowed_steps']:.3%}", f"{m['save_memory_gb']:.2f}", f"{m['save_s']:.1f}",
             f"{disk / m['save_flushed_s']:.0f}", f"{disk / m['flat_write_s']:.0f}", _spread(row["save_to_disk_ratio"]),
             f"{disk / m['restore_s']:.0f}", f"{disk / m['flat_read_s']:.0f}", _spread(row["restore_to_disk_ratio"])]
        )  # fmt: skip
    header = ["state", "GB", "GB on disk", "digest s", "save returns s", "slowed steps s", "stall", "stall with slowed",
              "memory GB", "written after s", "save MB/s", "disk MB/s", "ratio", "restore MB/s", "disk MB/s",
              "ratio"]  # fmt: skip
    return table(header, lines)


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["demo", "nano"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=given_path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--name", default="checkpoint", help="of the result")
    arguments = parser.parse_args()
    absl_logging.set_verbosity(absl_logging.WARNING)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=arguments.work) as work:
        for name in arguments.sizes:
            rows.append(measure(name, Path(work), arguments.repeats))
            write(arguments.name, rows)
    print(show(rows))


if __name__ == "__main__":
    main()
