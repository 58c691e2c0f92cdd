"""The training step on a GPU: images/s, MFU and memory for micro-batches and remat policies, against PyTorch.

    python -m benchmarks.gpu && python -m pytest tests/model/test_attention.py      # with a GPU, this one line
    python -m benchmarks.gpu --targets prod-1024 nano-512 --profile                      # 9 minutes
    python -m benchmarks.gpu --targets prod-512 prod-256 --append                        # 9 more, into the same table
    python -m benchmarks.gpu --smoke                        # on a CPU: every part of it at a toy size, 2 to 4 minutes

(The test of cuDNN's attention skips itself without a GPU. Run on an H200 on Python 3.12 with JAX 0.11, and on CPUs with
both that and Python 3.11 with JAX 0.10; not yet on a 24 GB card.)

configs/prod.py at 1024, 512 and 256 px and configs/nano.py at 512 px. Each configuration runs in a process of its own
that may use 24 GB (`--memory-gb`, 0: all), so that a larger card stands in for a 24 GB one in memory, though not in
speed. Ours is the step of `fluxdit_jax.train` (accumulation, EMA, norms, metrics; random batches put on the device as
the loop does it). The other side is the same network in PyTorch (`portable`): bf16 autocast, `torch.compile`,
scaled dot product attention by PyTorch's choice, fused AdamW, accumulation, no EMA or metrics. For each target: our
configurations and PyTorch's in turn, the best of ours without cuDNN's attention, then rounds of the two best in turn,
which give the ratio. MFU counts 3 forward passes, no recomputation, against `fluxdit_jax.device.devices.PEAK_TFLOPS`.

Out of memory is a row. So is what fails, with its error. After `--minutes` nothing is started any more and what was
left out is listed; `--append` goes on from results/gpu.json, which is written after each row, into $OUT too if set.
A package that is missing is named, and the sides that need it are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import environment
from benchmarks.gpu_sides import OURS, PROGRAM, TARGETS, THEIRS
from fluxdit_jax.device import cuda_stack
from fluxdit_jax.environment import stacks

NAME = "gpu"
NEEDED = {
    "jax": {"jax": "jax", "flax": "flax", "optax": "optax", "ml_collections": "ml-collections",
            "grain": "grain", "array_record": "array-record", "tensorflow_datasets": "tensorflow-datasets",
            "tensorboard": "tensorboard", "PIL": "pillow"},
    "torch": {"torch": "torch", "jax": "jax", "flax": "flax"},  # of JAX only the sizes and FLOPs of the network
}  # fmt: skip
SEARCH_SHARE = 0.6  # of a target's time; the rest is for the rounds


def missing(side: str) -> list[str]:
    """The packages a side needs that this Python lacks, by their names in the registry; JAX for this driver's CUDA.

    Raises:
      cuda_stack.StackError: no build fits the driver.
    """
    lacking = [package for module, package in NEEDED[side].items() if importlib.util.find_spec(module) is None]
    if side == "jax" and (extra := cuda_stack.choose(cuda_stack.find_card(), cuda_stack.find_torch(), encoders=True)):
        lacking = [f"jax[{extra}]" if package == "jax" else package for package in lacking]
    return lacking


def agreement() -> dict[str, Any]:
    """`step_sides.agree` at a toy size on the CPU: the same weights in both networks, loss and gradient compared."""
    code = "import json; from benchmarks.step import TOY; from benchmarks.step_sides import agree; "
    code += "print(json.dumps(agree(TOY)))"
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=environment.ROOT, env=variables)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        return {"error": repr(error)}


# Measured with the best configuration of ours, beside it.
CHANGES: list[dict[str, Any]] = [{"routing.share": 0.5}, {"optim.name": "muon"}]


def make(target: str, side: str, batch: int, remat: str, attention: str = "auto") -> dict[str, Any]:
    return {"target": target, "side": side, "batch": batch, "remat": remat, "attention": attention}


def first_gpu() -> tuple[str, float] | None:
    """(name, memory in GB) of the first NVIDIA GPU; None where nvidia-smi finds none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        name, mebibytes = out.splitlines()[0].rsplit(",", 1)
        return name.strip(), float(mebibytes) * 2**20 / 1e9
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device by its name; None if it is not known, or without JAX."""
    try:
        from fluxdit_jax.device.devices import peak_tflops_of
    except ImportError:
        return None
    return peak_tflops_of(name)


class Bench:
    """The rows so far, the clock, and where they are written."""

    def __init__(self, a: argparse.Namespace, gpu: tuple[str, float] | None, directories: list[Path]):
        self.a, self.gpu, self._directories = a, gpu, directories
        self.device = gpu[0] if gpu else "cpu"
        self.peak = a.peak_tflops or peak_tflops(self.device)
        self.run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.ends = time.monotonic() + 60 * a.minutes
        self.same: dict[str, Any] | None = None
        self.earlier: list[dict[str, str]] = []  # the calls that an --append goes on from
        self.rows: list[dict[str, Any]] = []
        self.left: list[str] = []
        self._longest = {"jax": 40.0, "torch": 60.0} if gpu else {"jax": 0.0, "torch": 0.0}
        self._cache = tempfile.TemporaryDirectory(prefix="fluxdit_jax_gpu_")
        self.shown = tqdm(desc="configurations", disable=None, unit="")

    def append_to(self, path: Path) -> None:
        """Goes on from an earlier run's rows.

        Raises:
          SystemExit: they are not there or of another device.
        """
        try:
            made, earlier = (json.loads(path.read_text())[part] for part in ("environment", "rows"))
            device, rows = earlier["device"], earlier["configurations"]
            call = {name: made[name] for name in ("command", "made", "commit")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"error: --append: {path} holds no earlier rows ({error!r}); run once without --append")
        if device != self.device:
            sys.exit(f"error: --append: {path} is of {device!r}, this is {self.device!r}; do not mix cards")
        self.rows = [row for row in rows if row["status"] in ("ok", "out of memory")]
        self.same, self.earlier = earlier.get("agreement"), [*earlier.get("earlier", []), call]

    def done(self, spec: dict[str, Any]) -> bool:
        return any(row["spec"] == spec for row in self.rows)

    def hopeless(self, spec: dict[str, Any]) -> bool:
        """Whether a micro-batch no larger was out of memory with the same side, remat and attention."""
        same = ("target", "side", "remat", "attention")
        return any(
            row["status"] == "out of memory"
            and row["spec"]["batch"] <= spec["batch"]
            and all(row["spec"][name] == spec[name] for name in same)
            for row in self.rows
        )

    def broken(self, side: str) -> bool:
        """Whether a side failed twice and never ran: then the rest would only cost time."""
        found = [row["status"] for row in self.rows if row["spec"]["side"] == side and row["run"] == self.run]
        return found.count("failed") > 1 and "ok" not in found

    def _expected(self, spec: dict[str, Any]) -> float:
        """Seconds a configuration may take: as the longest of its side, or as before without compiling."""
        before = [row for row in self.rows if row["spec"] == spec and row["run"] == self.run and "seconds" in row]
        if before:
            return before[0]["wall_s"] - 0.7 * before[0]["compile_s"]
        return 0.8 * self._longest[spec["side"]]

    def measure(self, spec: dict[str, Any], turn: str, until: float, trace: Path | None = None) -> bool:
        """Runs one configuration and adds its row; False if there is no time for it before `until`."""
        what = " ".join(str(value) for value in spec.values())
        if self.broken(spec["side"]) or time.monotonic() + self._expected(spec) > until:
            self.left.append(f"{what} ({'profile' if trace else 'turn ' + turn})")
            return False
        self.shown.set_postfix_str(what)
        start = time.monotonic()
        row = {"spec": spec, "run": self.run, "turn": f"{self.run}/{turn}", **self._child(spec, trace)}
        row["wall_s"] = time.monotonic() - start
        if row["status"] != "timed out":
            self._longest[spec["side"]] = max(self._longest[spec["side"]], row["wall_s"])
        if "seconds" in row:
            row["images_s"] = spec["batch"] / statistics.median(row["seconds"])
            rate = row["images_s"] * row["flops_per_image"] / 1e12
            row["tflops"], row["mfu"] = rate, rate / self.peak if self.peak else None
        self.rows.append(row)
        self.shown.update()
        rate = f"{row['images_s']:.4g} images/s" if "images_s" in row else row.get("error", "")
        tqdm.write(f"{what}: {row['status']} {rate} ({row['wall_s']:.0f} s)")
        self.save()
        return True

    def _child(self, spec: dict[str, Any], trace: Path | None) -> dict[str, Any]:
        a = self.a
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu_sides",
            json.dumps(spec),
            "--repeats",
            str(a.repeats),
        ]
        command += ["--memory-gb", str(a.memory_gb)]
        command += ["--cpu"] if a.smoke else []
        command += ["--eager"] if a.eager else []
        command += ["--trace", str(trace)] if trace else []
        variables = {"JAX_COMPILATION_CACHE_DIR": self._cache.name} | os.environ | {"PYTHONUNBUFFERED": "1"}
        variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
        variables.setdefault("CUDA_VISIBLE_DEVICES", "0")
        variables.pop("XLA_CLIENT_MEM_FRACTION", None)  # JAX refuses to start with both names of it
        if self.gpu:
            share = a.memory_gb / self.gpu[1] if a.memory_gb else 1.0
            variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{min(share, 0.93):.4f}"
        if trace and self.gpu:  # kernels in a CUDA graph do not say which operation they are
            flags = variables.get("XLA_FLAGS", "")
            variables["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=".strip()
        # a session of its own: PyTorch's compiler has workers, and they go with it
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(
                command,
                stdout=out,
                stderr=errors,
                cwd=environment.ROOT,
                env=variables,
                start_new_session=True,
            )
            try:
                code = child.wait(max(20.0, min(a.limit, self.ends + 25 - time.monotonic())))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            out.seek(0)
            errors.seek(0)
            lines, said = out.read().splitlines(), errors.read().strip().splitlines()
        if code is None:
            return {"status": "timed out", "error": " | ".join(said[-2:])[:300]}
        if code or not lines:
            text = " | ".join(said[-3:])[:500]
            # a process that the allocator or the driver ends says so in what it prints, not in a result
            full = any("RESOURCE_EXHAUSTED" in line or "out of memory" in line.lower() for line in said)
            status = "out of memory" if full else "failed"
            return {"status": status, "error": f"exit code {code}: {text}"}
        return json.loads(lines[-1])

    def save(self) -> None:
        """Writes everything so far, whole, into each of the directories."""
        rows = {"device": self.device, "memory_gb": self.a.memory_gb, "peak_tflops": self.peak}
        rows |= {
            "earlier": self.earlier,
            "agreement": self.same,
            "left": self.left,
            "configurations": self.rows,
        }
        text = json.dumps({"environment": environment.describe(), "rows": rows}, indent=1) + "\n"
        for directory in self._directories:
            temporary = directory / f"{NAME}.tmp"
            temporary.write_text(text)
            temporary.replace(directory / f"{NAME}.json")


def configurations(target: str, sides: list[str], only: list[str] | None) -> list[dict[str, Any]]:
    """What is measured of a target, in this order; with `only` what that names as target:micro-batch:remat."""

    def chosen(side: str, choices: list[tuple[int, str]]) -> list[dict[str, Any]]:
        specs = [make(target, side, *choice) for choice in choices] if side in sides else []
        return [spec for spec in specs if not only or f"{target}:{spec['batch']}:{spec['remat']}" in only]

    ours, theirs = chosen("jax", OURS[target]), chosen("torch", THEIRS[target])
    # PyTorch's first after our first, then one for every two of ours, so that a short time has both
    queue = []
    for position, spec in enumerate(ours or [None] * (2 * len(theirs))):
        queue += [spec] if spec else []
        if position % 2 == 0 and position // 2 < len(theirs):
            queue.append(theirs[position // 2])
    return queue + theirs[(len(ours) + 1) // 2 :] if ours else queue


def run_target(bench: Bench, target: str, sides: list[str], share_s: float) -> None:
    """All of a target: configurations, the best without cuDNN, rounds of the best in turn, a profile."""
    from benchmarks.gpu_report import best, pairs

    a, ends = bench.a, min(bench.ends, time.monotonic() + share_s)
    search_ends = time.monotonic() + SEARCH_SHARE * (ends - time.monotonic())
    for spec in configurations(target, sides, a.only):
        if not bench.done(spec) and not bench.hopeless(spec):
            bench.measure(spec, "0", search_ends)
    champion = best(bench.rows, target, "jax", a.memory_gb)
    rival = best(bench.rows, target, "torch")
    if champion and champion["attention"] == "cudnn" and not a.only:
        plain = champion["spec"] | {"attention": "xla"}
        if not bench.done(plain):
            bench.measure(plain, "0", ends)
    for changes in CHANGES if champion and a.changes else []:
        if not bench.done(changed := champion["spec"] | {"changes": changes}):
            bench.measure(changed, "0", ends)
    if champion and rival:
        for number in range(len(pairs(bench.rows, champion["spec"], rival["spec"])), a.rounds):
            if not all(bench.measure(row["spec"], str(number + 1), ends) for row in (champion, rival)):
                break
    if champion and a.profile:
        directory = Path(tempfile.mkdtemp(prefix="fluxdit_jax_trace_"))
        if bench.measure(champion["spec"], "profile", bench.ends, directory):
            keep_trace(directory, bench.rows[-1].get("profile", {}), target)
        shutil.rmtree(directory, ignore_errors=True)


def keep_trace(directory: Path, profile: dict[str, Any], target: str) -> None:
    """Copies a trace and the text of its program into $OUT, if that is set; not what has more than 15 MB."""
    if not os.environ.get("OUT"):
        return
    out = Path(os.environ["OUT"])
    out.mkdir(parents=True, exist_ok=True)
    found = {"trace.json.gz": Path(profile.get("file", "")), "hlo.txt.gz": directory / PROGRAM}
    for name, source in found.items():
        if source.is_file() and source.stat().st_size < 15e6:
            shutil.copyfile(source, out / f"{target}.{name}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = [name for name in TARGETS if name != "toy"]
    order = ["prod-1024", "nano-512", "prod-512", "prod-256"]
    parser.add_argument("--targets", nargs="+", choices=real, default=order)
    parser.add_argument("--sides", nargs="+", choices=list(NEEDED), default=list(NEEDED))
    parser.add_argument("--only", nargs="+", metavar="TARGET:MICRO-BATCH:REMAT", help="these and no other")
    parser.add_argument("--changes", action="store_true", help=f"the best of each target also with {CHANGES}")
    parser.add_argument("--rounds", type=int, default=3, help="of the two best in turn, for the ratio")
    parser.add_argument("--repeats", type=int, default=10, help="timed micro-batches of a process")
    parser.add_argument("--memory-gb", type=float, default=24.0, help="of the device (1e9 bytes); 0: all")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing is started after this")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of one configuration")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16, where the card's name is not known")
    parser.add_argument("--profile", action="store_true", help="trace the best of each target and group it")
    parser.add_argument("--append", action="store_true", help="go on from results/gpu.json")
    parser.add_argument("--eager", action="store_true", help="PyTorch without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="toy size on a CPU; results to a temporary folder")
    a = parser.parse_args()
    if a.smoke:
        a.targets, a.repeats, a.rounds, a.memory_gb = ["toy"], min(a.repeats, 3), min(a.rounds, 2), 0.0
    return a


def main() -> None:
    a = parse()
    # what is stopped at a time limit has still said what it found
    sys.stdout.reconfigure(line_buffering=True)
    gpu = None if a.smoke else first_gpu()
    if gpu is None and not a.smoke:
        sys.exit("error: nvidia-smi finds no NVIDIA GPU; --smoke tries this script on a CPU")
    if problems := stacks(importlib.metadata.distributions(), cuda_stack.find_card()):
        sys.exit(f"error: {'; '.join(problems)}")
    sides = []
    for side in a.sides:
        lacking = missing(side)
        if lacking:
            print(f"the {side} side is left out, this Python lacks: pip install {' '.join(lacking)}")
        else:
            sides.append(side)
    if not sides:
        sys.exit("error: no side is left to run")
    out = os.environ.get("OUT")
    directories = [Path(tempfile.mkdtemp(prefix="fluxdit_jax_gpu_")) if a.smoke else environment.RESULTS]
    directories += [Path(out)] if out and not a.smoke else []
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
    made = environment.describe()
    print(f"{made['made']}, commit {made['commit']}, {', '.join(made['gpu']) or 'no GPU'}, Python {made['python']}")
    print(", ".join(f"{name} {version}" for name, version in made["packages"].items()))
    bench = Bench(a, gpu, directories)
    if a.append:
        bench.append_to(environment.RESULTS / f"{NAME}.json")
    if len(sides) == 2:
        bench.same = agreement()
        print("both networks with the same weights, on the CPU:", bench.same)
    for number, target in enumerate(a.targets):
        run_target(bench, target, sides, (bench.ends - time.monotonic()) / (len(a.targets) - number))
    bench.shown.close()
    bench.save()
    from benchmarks.gpu_report import report

    print(report(bench.rows, a.memory_gb, bench.left))
    print("written:", ", ".join(str(directory / f"{NAME}.json") for directory in directories))


if __name__ == "__main__":
    main()
