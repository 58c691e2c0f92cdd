"""What a step sends between devices, and where that stops paying: counted in compiled programs, then arithmetic.

    python -m benchmarks.scaling                       # count on 4 devices made of this CPU, then the tables
    python -m benchmarks.scaling --devices 2 4 8 64 --parameters 0.5 1 3

Counted: the collectives of our compiled step (bfloat16, a network of width 256 and 4 blocks) for data parallel and
fsdp, in bytes per parameter. Computed from them: bytes on the wire of each device (rings: an all-reduce sends
2 (D - 1) / D of the array, a gather or scatter half of that), and the share of the time that is computing, if nothing
overlaps and if all that can does. Nothing of it was run on a network of GPUs.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
from typing import Any

from benchmarks import environment

LINKS = {"PCIe 4 x16": 25e9, "100 Gbit/s": 11e9, "10 Gbit/s": 1.1e9}  # bytes/s each way, of a device
RATE = 165e12 * 0.4  # FLOP/s that a 4090 is taken to reach
FLOPS = 6 * 1.25 * 4096  # of training on a picture of 4,096 tokens, a parameter: 6 a token, attention a quarter besides
BATCH = 256  # global
_SIZES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s8": 1, "u8": 1}
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COUNT = """
import dataclasses, json, sys, tempfile
from pathlib import Path
sys.path.insert(0, "tests")
import numpy as np, jax
from training_helpers import tiny_config, write_dataset
from fluxdit_jax.dataset.manifest import load_manifest
from fluxdit_jax.device.sharding import make_mesh
from fluxdit_jax.program import Program
from fluxdit_jax.settings import resolve
from fluxdit_jax.objective import patch_statistics
data, fsdp = map(int, sys.argv[1:])
root = Path(tempfile.mkdtemp())
write_dataset(root / "ds")
c = tiny_config(root / "ds", root / "run")
c.model.width, c.model.depth, c.model.heads, c.model.dtype = 256, 4, 4, "bfloat16"
c.data.micro_batch_size, c.optim.global_batch_size = 8, 16
manifest = load_manifest(root / "ds")
settings = resolve(c, manifest)
program = Program(settings, make_mesh(data, fsdp, 8), patch_statistics(manifest.latent_mean, manifest.latent_std, 2))
step = program.compile()
count = sum(x.size for x in jax.tree.leaves(program.abstract.params))
print(json.dumps({"parameters": count, "accumulate": step.accumulate.as_text(), "update": step.update.as_text()}))
"""


def collectives(text: str) -> collections.Counter[str]:
    """Bytes that a compiled program's collectives give, by kind; those in a loop as often as it runs."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = found[2]
            bodies[name] = []
            entry = name if found[1] else entry
        elif name:
            bodies[name].append(line)

    def of(name: str) -> collections.Counter[str]:
        total: collections.Counter[str] = collections.Counter()
        for line in bodies.get(name, ()):
            if kind := next((k for k in _KINDS if re.search(rf"[\s)]{k}(-start)?\(", line)), None):
                total[kind] += _bytes(line.partition("=")[2].partition(kind)[0])
            times = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:body|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
                for kind, size in of(called).items():
                    total[kind] += size * (int(times[1]) if times and "body=" in line else 1)
        return total

    return of(entry)


def _bytes(shapes: str) -> int:
    total = 0
    for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        size = _SIZES[dtype]
        for side in filter(None, sides.split(",")):
            size *= int(side)
        total += size
    return total


def counted(data: int, fsdp: int) -> dict[str, dict[str, float]]:
    """Bytes per parameter of each program's collectives on data x fsdp devices, by kind."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={data * fsdp}"}
    code = [sys.executable, "-c", _COUNT, str(data), str(fsdp)]
    done = subprocess.run(code, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    raw = json.loads(done.stdout.splitlines()[-1])
    return {
        part: {kind: round(size / raw["parameters"], 2) for kind, size in collectives(raw[part]).items()}
        for part in ("accumulate", "update")
    }


def wire(per_parameter: dict[str, float], parameters: float, devices: int) -> float:
    """Bytes that each device sends in rings."""
    share = (devices - 1) / devices
    return parameters * share * sum(size * (2 if kind == "all-reduce" else 1) for kind, size in per_parameter.items())


def rows(found: dict[str, Any], parameters: list[float], devices: list[int]) -> list[dict[str, Any]]:
    table = []
    for billions in parameters:
        P = billions * 1e9
        for count in devices:
            for layout, parts in found.items():
                micro = max(1, BATCH // (4 * count))  # micro-batches of a step, with 4 pictures on a device in each
                sent = micro * wire(parts["accumulate"], P, count) + wire(parts["update"], P, count)
                computing = FLOPS * P * BATCH / count / RATE
                row = {"parameters": billions, "devices": count, "layout": layout, "micro_batches": micro,
                       "gb_sent": round(sent / 1e9, 1), "computing_s": round(computing, 1),
                       "state_gb": round(20 * billions / (count if layout == "fsdp" else 1), 1)}  # fmt: skip
                for link, rate in LINKS.items():
                    waiting = sent / rate
                    row[link] = [round(computing / (computing + waiting), 2), round(min(1, computing / waiting), 2)]
                table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, nargs="+", default=[0.5, 1.0, 3.0], help="billions")
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8, 16, 64])
    arguments = parser.parse_args()
    found = {"data": counted(4, 1), "fsdp": counted(1, 4)}
    for layout, parts in found.items():
        print(f"{layout}: bytes per parameter {parts}")
    table = rows(found, arguments.parameters, arguments.devices)
    for row in table:
        links = "  ".join(f"{link} {row[link][0]:.2f} to {row[link][1]:.2f}" for link in LINKS)
        print(
            f"{row['parameters']:4} B  {row['devices']:3} x {row['layout']:4}  {row['micro_batches']:3} micro-batches"
            f"  sends {row['gb_sent']:7.1f} GB  computes {row['computing_s']:6.1f} s  state {row['state_gb']:5.1f} GB"
            f"  computing: {links}"
        )
    environment.write("scaling", {"counted": found, "rows": table})


if __name__ == "__main__":
    main()
