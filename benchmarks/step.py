"""The training step against a plain PyTorch module of the same arithmetic and against diffusers' PixArt.

    python -m benchmarks.step                 # nano: 12/384/6, 1,024 + 120 tokens, batch 4; about 10 minutes
    python -m benchmarks.step --compile       # trace and compile time against depth, and from the cache
    python -m benchmarks.step --smoke         # 2 minutes: every side at a toy size
    python -m benchmarks.step --rounds 1 --sides "torch float32 eager" --append   # one more round of one side

Every side runs in a process of its own, in turn, several rounds; a round's ratio is to our f32 (the first side, which
every round has) of that round.
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

from tqdm import tqdm

from benchmarks import environment
from benchmarks.step_sides import Size, agree, peak_memory, program, run_jax, run_torch, settings

TOY = Size(width=64, depth=2, heads=2, side=4, text_tokens=6, batch=2, text_width=32, vision_width=16)
ROUTED = 0.5  # share of the tokens that skip the middle blocks
SIDES = (
    "jax float32 attention",
    "torch float32 eager",
    "torch float32 compile",
    "pixart float32 eager",
    "routed float32 attention",
    "jax bfloat16 attention",
    "torch bfloat16 eager",
    "torch bfloat16 compile",
)


def run_side(side: str, size: Size, repeats: int) -> dict:
    """Runs one of `SIDES` in this process."""
    kind, dtype, how = side.split()
    if kind in ("jax", "routed"):
        result = run_jax(size, dtype, how, repeats, routed=ROUTED if kind == "routed" else 0.0)
    else:
        result = run_torch(kind, size, dtype, how == "compile", repeats)
    return result | {"peak": peak_memory()}


def child(*arguments: str, **variables: str) -> dict:
    """This script in a process of its own; returns the JSON line it prints last."""
    command = [sys.executable, "-m", "benchmarks.step", *arguments]
    variables = os.environ | {"OMP_NUM_THREADS": "2"} | variables
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables).stdout
    return json.loads(out.splitlines()[-1])


def run_round(sides: list[str], smoke: bool, repeats: int) -> dict:
    """Every side once, in turn, each in its own process; what was measured, by side, and on what."""
    found = {}
    for side in tqdm(sides, desc="sides", disable=None):
        arguments = ["--side", side, "--repeats", str(repeats), *(["--smoke"] if smoke else [])]
        found[side] = child(*arguments)
    made = environment.describe()
    return {"sides": found} | {name: made[name] for name in ("made", "commit", "changed", "load")}


def summary(rounds: list[dict], flops: int) -> list[dict]:
    """A row for each side of `SIDES` that any round has.

    The time of a round is the median of its steps; a ratio is to `SIDES[0]` in the same round.
    """
    rows = []
    for side in SIDES:
        having = [turn["sides"] for turn in rounds if side in turn["sides"]]
        if not having:
            continue
        seconds = [statistics.median(turn[side]["seconds"]) for turn in having]
        ratios = [a / statistics.median(turn[SIDES[0]]["seconds"]) for a, turn in zip(seconds, having)]
        row = {"side": side, "rounds": len(having), "seconds": statistics.median(seconds)}
        row |= {"fastest": min(min(turn[side]["seconds"]) for turn in having)}
        row |= {"ratio_to_first": [min(ratios), statistics.median(ratios), max(ratios)]}
        row |= {"gflops": flops / row["seconds"] / 1e9}
        row |= {"peak_gb": max(turn[side]["peak"] for turn in having) / 1e9}
        rows.append(row)
    return rows


def print_summary(rows: list[dict]) -> None:
    cells = []
    for r in rows:
        low, middle, high = r["ratio_to_first"]
        ratio = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        numbers = (f"{r['seconds']:.3g}", f"{r['fastest']:.3g}", ratio, f"{r['gflops']:.0f}")
        cells.append([r["side"], r["rounds"], *numbers, f"{r['peak_gb']:.2f}"])
    header = ["side", "rounds", "s a step", "fastest", f"to {SIDES[0]}", "GFLOP/s", "peak GB"]
    print(environment.table(header, cells))


def earlier_rounds() -> list[dict]:
    """The rounds in results/step.json, to which `--append` adds."""
    path = environment.RESULTS / "step.json"
    try:
        return json.loads(path.read_text())["rows"]["each_round"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"--append: {path} holds no earlier rounds ({error!r}); run once without --append")


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


def measure(a: argparse.Namespace) -> None:
    """Checks that the networks agree, runs the rounds, prints the table and writes results/step.json."""
    from fluxdit_jax.model import cost

    rounds = earlier_rounds() if a.append else []
    same = agree(TOY)
    print(f"same weights: loss {same['loss_jax']:.7f} and {same['loss_torch']:.7f}")
    if abs(same["loss_jax"] / same["loss_torch"] - 1) > 1e-5 or same["gradient_error"] > 1e-4:
        sys.exit(f"the two networks do not compute the same: {same}")
    size = TOY if a.smoke else Size()
    network = settings(size, "float32", "none").model
    flops = 3 * size.batch * cost.flops_per_sample(network, size.tokens, size.lengths)
    sides = [SIDES[0], *(side for side in a.sides if side != SIDES[0])]
    for _ in range(a.rounds):
        rounds.append(run_round(sides, a.smoke, a.repeats))
        if not a.smoke:  # after each, so that a stopped run leaves whole rounds
            rows = summary(rounds, flops)
            environment.write("step", {"agreement": same, "flops": flops, "sides": rows, "each_round": rounds})
    print_summary(summary(rounds, flops))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, help="3; with --smoke 1")
    parser.add_argument("--repeats", type=int, help="timed steps in a process, after one untimed: 3; with --smoke 1")
    parser.add_argument("--append", action="store_true", help="add rounds to those in results/step.json")
    parser.add_argument("--smoke", action="store_true", help="toy size; writes nothing")
    parser.add_argument("--compile", action="store_true", help="measure compiling instead")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.rounds = a.rounds or (1 if a.smoke else 3)
    a.repeats = a.repeats or (1 if a.smoke else 3)
    if a.smoke and a.append:
        parser.error("--smoke writes nothing, so there is nothing to append to")
    if a.side:
        print(json.dumps(run_side(a.side, TOY if a.smoke else Size(), a.repeats)))
    elif a.depth:
        print(json.dumps(compile_once(a.depth, a.cache)))
    elif a.compile:
        rows = compile_rows()
        print(
            environment.table(["depth", "cache", "s"], [[r["depth"], r["cache"], f"{r['seconds']:.1f}"] for r in rows])
        )
        print(f"28 against 4 blocks: {rows[1]['seconds'] / rows[0]['seconds']:.2f}x (target 1.3)")
        environment.write("step_compile", rows)
    else:
        measure(a)


if __name__ == "__main__":
    main()
