"""The training step against a plain PyTorch module of the same arithmetic and against diffusers' PixArt.

    python -m benchmarks.step                 # nano: 12/384/6, 1,024 + 120 tokens, batch 4; about 10 minutes
    python -m benchmarks.step --compile       # trace and compile time against depth, and from the cache
    python -m benchmarks.step --smoke         # seconds: every side at a toy size

Every side runs in a process of its own, in turn, several rounds; a round's ratio is to our f32 of that round.
Ours is the step that `fluxdit_jax.train` runs, with EMA, norms and metrics; the PyTorch sides have AdamW and
clipping alone. Memory is the process's VmHWM. Before anything is timed, the loss and a gradient of both networks with
the same weights are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import environment
from benchmarks.step_sides import Size, agree, peak_memory, program, run_jax, run_torch, settings

TOY = Size(width=64, depth=2, heads=2, side=4, text_tokens=6, batch=2, text_width=32, vision_width=16)
SIDES = (
    "jax float32 block",
    "torch float32 eager",
    "torch float32 compile",
    "pixart float32 eager",
    "jax bfloat16 block",
    "torch bfloat16 eager",
    "torch bfloat16 compile",
)


def run_side(side: str, size: Size, repeats: int) -> dict:
    """Runs one of `SIDES` in this process."""
    kind, dtype, how = side.split()
    if kind == "jax":
        result = run_jax(size, dtype, how, repeats)
    else:
        result = run_torch(kind, size, dtype, how == "compile", repeats)
    return result | {"peak": peak_memory()}


def child(*arguments: str, **variables: str) -> dict:
    """This script in a process of its own; returns the JSON line it prints last."""
    command = [sys.executable, "-m", "benchmarks.step", *arguments]
    variables = os.environ | {"OMP_NUM_THREADS": "2"} | variables
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables).stdout
    return json.loads(out.splitlines()[-1])


def compare(sides: list[str], smoke: bool, rounds: int, repeats: int) -> list[dict]:
    from fluxdit_jax import model

    size = TOY if smoke else Size()
    network = settings(size, "float32", "none").model
    flops = 3 * size.batch * model.flops_per_sample(network, size.tokens, size.text_tokens)
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            arguments = ["--side", side, "--repeats", str(repeats), *(["--smoke"] if smoke else [])]
            found[side].append(child(*arguments))
    rows = []
    for side, results in found.items():
        seconds = [statistics.median(result["seconds"]) for result in results]
        base = [statistics.median(result["seconds"]) for result in found[sides[0]]]
        ratios = [a / b for a, b in zip(seconds, base)]
        rows.append(
            {
                "side": side,
                "seconds": [result["seconds"] for result in results],
                "ratio_to_first": [min(ratios), statistics.median(ratios), max(ratios)],
                "gflops": flops / statistics.median(seconds) / 1e9,
                "peak_gb": max(result["peak"] for result in results) / 1e9,
                "compile_s": [result["compile_s"] for result in results],
                "flops": flops,
            }
        )
    return rows


def compile_once(depth: int, cache: str | None) -> dict:
    """Seconds to trace and to compile the step of `depth` blocks, f32, block remat."""
    import dataclasses

    import jax

    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    start = time.perf_counter()
    whole = program(dataclasses.replace(Size(), depth=depth), "float32", "block")
    whole.compile()
    return {"seconds": time.perf_counter() - start}


def compile_rows() -> list[dict]:
    """Depth 4 and 28 without a cache, then 28 twice with one."""
    rows = [{"depth": depth, "cache": "none", **child("--depth", str(depth))} for depth in (4, 28)]
    with tempfile.TemporaryDirectory() as cache:
        for state in ("filled", "read"):
            rows.append({"depth": 28, "cache": state, **child("--depth", "28", "--cache", cache)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps in a process, after one untimed")
    parser.add_argument("--smoke", action="store_true", help="toy size; writes nothing")
    parser.add_argument("--compile", action="store_true", help="measure compiling instead")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.side:
        print(json.dumps(run_side(a.side, TOY if a.smoke else Size(), a.repeats)))
    elif a.depth:
        print(json.dumps(compile_once(a.depth, a.cache)))
    elif a.compile:
        rows = compile_rows()
        print(
            environment.table(
                ["depth", "cache", "s"], [[r["depth"], r["cache"], f"{r['seconds']:.1f}"] for r in rows]
            )
        )
        print(f"28 against 4 blocks: {rows[1]['seconds'] / rows[0]['seconds']:.2f}x (target 1.3)")
        environment.write("compile", rows)
    else:
        same = agree(TOY)
        print(f"same weights: loss {same['loss_jax']:.7f} and {same['loss_torch']:.7f}")
        if abs(same["loss_jax"] / same["loss_torch"] - 1) > 1e-5 or same["gradient_error"] > 1e-4:
            sys.exit(f"the two networks do not compute the same: {same}")
        rows = compare(a.sides, a.smoke, a.rounds, a.repeats)
        cells = []
        for r in rows:
            low, middle, high = r["ratio_to_first"]
            median = statistics.median(s for part in r["seconds"] for s in part)
            cells.append(
                [
                    r["side"],
                    f"{median:.2f}",
                    f"{middle:.2f} ({low:.2f}-{high:.2f})",
                    f"{r['gflops']:.0f}",
                    f"{r['peak_gb']:.2f}",
                ]
            )
        print(environment.table(["side", "s a step", f"to {a.sides[0]}", "GFLOP/s", "peak GB"], cells))
        if not a.smoke:
            environment.write("step", {"agreement": same, "sides": rows})


if __name__ == "__main__":
    main()
