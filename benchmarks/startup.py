"""First useful output: from `python -m fluxdit_jax.train` to the end of the first step, and what importing costs.

    python -m benchmarks.startup                        # configs/demo.py and configs/nano.py, cold and warm
    python -m benchmarks.startup --configs demo --repeats 5

Cold is an empty compilation cache, warm the second start of the same run. The time is taken from outside, to the
log line of the first step (`log.every` is 1). For nano the data set is random latents of 512 px: 1,024 tokens. The
files of Python's libraries are in the page cache in both.

The profile of the imports is Python's own (-X importtime) of the module that is started.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.environment import ROOT, table, write
from fluxdit_jax.shared.paths import given_path

UNWANTED = (
    "torch",
    "transformers",
    "diffusers",
    "tensorflow",
    "tensorboardX",
    "matplotlib",
    "pandas",
    "IPython",
)
SIDE = {"demo": 16, "nano": 64}  # latent pixels: 64 and 1,024 tokens
TEXT_TOKENS = {"demo": 32, "nano": 120}
STAGES = (  # marks in the log, in order
    ("configuration and data", "batch: "),
    ("compiling", "memory of a device"),
    ("state", "step 0 of"),
    ("first step", "step 1/"),
)


def profile(tree: Path) -> dict[str, Any]:
    """Seconds of importing `fluxdit_jax.train`, by top-level package, and whether what must not come comes."""
    code = f"import fluxdit_jax.train, sys; print([n for n in {UNWANTED!r} if n in sys.modules], len(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], cwd=tree, capture_output=True, text=True, check=True
    )
    seconds: collections.Counter[str] = collections.Counter()
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)$", found.stderr, re.MULTILINE):
        seconds[name.split(".")[0]] += int(own) / 1e6
    unwanted, modules = found.stdout.strip().rsplit(" ", 1)
    return {
        "seconds": round(sum(seconds.values()), 3),
        "modules": int(modules),
        "unwanted": unwanted,
        "by_package": {name: round(value, 3) for name, value in seconds.most_common(12)},
    }


def start(tree: Path, config: str, data: Path, work: Path, cache: Path) -> dict[str, float]:
    """Starts a run of one step in a process of its own; returns the seconds at which each stage ended."""
    subprocess.run(["rm", "-rf", str(work)], check=True)
    command = [
        sys.executable, "-m", "fluxdit_jax.train", f"--config=configs/{config}.py", f"--config.data.path={data}",
        f"--config.workdir={work}", "--config.train.steps=1", "--config.log.every=1", "--config.log.preview_every=0",
        "--config.optim.warmup_steps=0", f"--config.data.text_tokens={TEXT_TOKENS[config]}",
    ]  # fmt: skip
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}
    ended: dict[str, float] = {}
    log: list[str] = []
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for line in process.stdout:
            log.append(line)
            for stage, mark in STAGES:
                if stage not in ended and mark in line:
                    ended[stage] = time.perf_counter() - started
    if process.returncode or len(ended) != len(STAGES):
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(log)}")
    return ended


def random_dataset(folder: Path, side: int) -> Path:
    """A data set of 16 random records of square latents."""
    sys.path.insert(0, str(ROOT / "tests"))
    import training_helpers as helpers

    helpers.TEXT_WIDTH = helpers.VISION_WIDTH = 1024
    helpers.write_dataset(folder, train=16, holdout=0, sizes=((side, side),), shards=1, channels=16)
    return folder


def measure(trees: dict[str, Path], config: str, data: Path, work: Path, repeats: int) -> list[dict[str, Any]]:
    """A row for cold and a row for warm of each tree, which are started in turn."""
    kinds = [(label, cache) for label in trees for cache in ("cold", "warm")]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tqdm(total=repeats * len(kinds), desc=config, unit="start") as bar:
        for repeat in range(repeats):
            for label, cache in kinds:
                folder = work / f"cache-{config}-{label}-{repeat}"
                runs[label, cache].append(start(trees[label], config, data, work / "run", folder))
                bar.update()
    return [
        {
            "tree": label,
            "config": config,
            "cache": cache,
            "seconds": {stage: [round(run[stage], 2) for run in found] for stage in found[0]},
        }
        for (label, cache), found in runs.items()
    ]


def show(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        ends = [statistics.median(row["seconds"][stage]) for stage, _ in STAGES]
        parts = [end - before for end, before in zip(ends, [0.0, *ends])]
        runs = row["seconds"]["first step"]
        total = f"{ends[-1]:.1f} ({min(runs):.1f} to {max(runs):.1f})"
        lines.append([row["tree"], row["config"], row["cache"], total, *(f"{part:.1f}" for part in parts)])
    stages = [f"{stage} s" for stage, _ in STAGES]
    header = ["tree", "config", "cache", "first step after s", "imports, " + stages[0], *stages[1:]]
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=SIDE, default=["demo", "nano"])
    parser.add_argument("--against", type=given_path, help="another checkout, to be started in turn with this one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="startup", help="of the result")
    arguments = parser.parse_args()
    trees = {"this": ROOT} | ({"other": arguments.against.absolute()} if arguments.against else {})
    imports = {label: profile(tree) for label, tree in trees.items()}
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as folder:
        for config in arguments.configs:
            data = random_dataset(Path(folder) / f"data-{config}", SIDE[config])
            rows += measure(trees, config, data, Path(folder), arguments.repeats)
    write(arguments.name, {"imports": imports, "starts": rows})
    print(show(rows))
    for label, found in imports.items():
        print(f"\nimporting fluxdit_jax.train of {label}: {found['seconds']:.2f} s, {found['modules']} modules, "
              f"of {', '.join(UNWANTED)}: {found['unwanted']}")  # fmt: skip
        print(table(["package", "s"], [[name, f"{value:.2f}"] for name, value in found["by_package"].items()]))


if __name__ == "__main__":
    main()
