"""One configuration of the GPU benchmark, in a process of its own: see `benchmarks/gpu.py`.

    python -m benchmarks.gpu_sides '{"target": "toy", "side": "jax", "batch": 2, "remat": "block", "attention": "auto"}'

Prints one JSON line last. Memory that does not suffice is a result ({"status": "out of memory"}), not a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

TEXT_TOKENS = 120
PROGRAM = "program.hlo.txt.gz"  # the compiled program's text, beside a trace of it
WARM_UP = 3  # micro-batches before the clock starts


@dataclasses.dataclass(frozen=True)
class Target:
    """What is trained: a configuration file at a resolution. `width`, `depth` and `heads` are what the file says."""

    config: str
    resolution: int
    width: int
    depth: int
    heads: int
    global_batch_size: int
    text_width: int = 1024
    vision_width: int = 1024

    @property
    def side(self) -> int:
        """Image tokens are side x side: 8 pixels a latent, 2 latents a patch."""
        return self.resolution // 16


TARGETS = {
    "prod-1024": Target("prod", 1024, 1152, 24, 18, 256),
    "prod-512": Target("prod", 512, 1152, 24, 18, 256),
    "prod-256": Target("prod", 256, 1152, 24, 18, 256),
    "nano-512": Target("nano", 512, 384, 12, 6, 8),
    "toy": Target("nano", 64, 64, 2, 2, 4, 32, 16),  # for --smoke
}
# (micro-batch, remat), most promising first; a larger micro-batch is not tried where a smaller one did not fit.
OURS = {
    "prod-1024": [(4, "attention"), (4, "block"), (8, "block"), (2, "dots"), (8, "attention"), (1, "none"),
                  (16, "block"), (4, "dots"), (2, "none")],
    "prod-512": [(16, "block"), (16, "attention"), (8, "dots"), (32, "block"), (32, "attention"), (4, "none"),
                 (16, "dots"), (8, "none")],
    "prod-256": [(64, "block"), (64, "attention"), (32, "dots"), (128, "attention"), (16, "none"), (64, "dots")],
    "nano-512": [(8, "none"), (8, "block"), (8, "attention"), (8, "dots"), (32, "none"), (32, "attention")],
    "toy": [(2, "block"), (4, "none")],
}  # fmt: skip
THEIRS = {
    "prod-1024": [(4, "block"), (2, "none"), (8, "block")],
    "prod-512": [(16, "block"), (8, "none"), (32, "block")],
    "prod-256": [(64, "block"), (32, "none")],
    "nano-512": [(8, "none"), (32, "none")],
    "toy": [(2, "none")],
}


def configuration_of(target: Target) -> Any:
    """The `ConfigDict` of a target's file in configs/, of its stage of that size. Raises `ImportError` without
    ml_collections."""
    from configs import nano, prod
    from fluxdit_jax.stages import stages_of

    config = {"nano": nano, "prod": prod}[target.config].get_config()
    config.workdir = config.data.path = "."
    found = [stage.config for stage in stages_of(config) if stage.config.data.resolution in (None, target.resolution)]
    return found[0]


def network(target: Target) -> Any:
    """The `ModelConfig` of a target, without ml_collections or a data set."""
    from fluxdit_jax.model.conditions import Condition
    from fluxdit_jax.model.dit import ModelConfig

    conditions = (Condition("text", target.text_width, sequence=True), Condition("vision", target.vision_width))
    return ModelConfig(
        target.width, target.depth, target.heads, 2, 16, conditions, "bfloat16", remat="none", attention="xla"
    )


def flops_per_image(target: Target) -> int:
    """Forward and backward, recomputation not counted: three times the forward products."""
    from fluxdit_jax.model.cost import flops_per_sample

    return 3 * flops_per_sample(network(target), target.side**2, {"text": TEXT_TOKENS})


def settings(target: Target, spec: dict[str, Any]) -> tuple[Any, tuple[np.ndarray, np.ndarray]]:
    """(`Settings` as a run with this micro-batch, remat and attention would get them, latent statistics)."""
    from fluxdit_jax.dataset.manifest import EncoderIdentity, Manifest
    from fluxdit_jax.objective import patch_statistics
    from fluxdit_jax.settings import resolve

    c = configuration_of(target)
    if spec["target"] == "toy":
        for key in ("width", "depth", "heads"):
            c.model[key] = getattr(target, key)
        c.optim.global_batch_size = target.global_batch_size
    c.data.micro_batch_size, c.model.remat, c.model.attention = spec["batch"], spec["remat"], spec["attention"]
    found = (c.model.width, c.model.depth, c.model.heads, c.optim.global_batch_size)
    expected = (target.width, target.depth, target.heads, target.global_batch_size)
    if found != expected:
        raise ValueError(
            f"configs/{target.config}.py has width, depth, heads, global batch {found}, TARGETS in "
            f"benchmarks/gpu_sides.py {expected}: make them the same"
        )
    c.optim.global_batch_size = max(c.optim.global_batch_size, spec["batch"])
    c.update_from_flattened_dict(spec.get("changes", {}))

    def encoder(width: int, **options: Any) -> EncoderIdentity:
        return EncoderIdentity("random numbers", "", "00", "float32", width, options)

    encoders = {
        "vae": encoder(16, factor=8),
        "text": encoder(target.text_width),
        "vision": encoder(target.vision_width),
    }
    size, zeros, ones = (target.resolution,) * 2, (0.0,) * 16, (1.0,) * 16
    lengths = {"text": TEXT_TOKENS}
    manifest = Manifest("random", target.resolution, 64, "resize", encoders, (size,), zeros, ones, 1, lengths, {})
    return resolve(c, manifest), patch_statistics(zeros, ones, c.model.patch)


def random_batch(shapes: dict[str, Any], side: int) -> dict[str, np.ndarray]:
    """Normal numbers in the shapes and dtypes of `Program.batch_shapes`; every token and text token is valid."""
    rng = np.random.default_rng(0)
    vision = rng.normal(size=shapes["vision"].shape)
    values = {
        "latent": rng.normal(size=shapes["latent"].shape),
        "grid": np.full(shapes["grid"].shape, side),
        "text": rng.normal(size=shapes["text"].shape),
        "text_length": np.full(shapes["text_length"].shape, shapes["text"].shape[1]),
        "vision": vision / np.linalg.norm(vision, axis=1, keepdims=True),
        "index": np.arange(len(vision)),
        "replaced": np.zeros(len(vision)),
    }
    return {name: value.astype(shapes[name].dtype) for name, value in values.items()}


def intervals(ended_at: list[float]) -> list[float]:
    """Seconds from one micro-batch's end to the next; the last, which no dispatch follows, is left out."""
    return np.diff(ended_at)[:-1].tolist()


def run_jax(spec: dict[str, Any], a: argparse.Namespace, result: dict[str, Any]) -> None:
    """The step that `fluxdit_jax.train` runs, called as its loop does. Fills `result` as it goes."""
    import jax

    from fluxdit_jax.device import devices, sharding
    from fluxdit_jax.program import Program

    if jax.default_backend() != "gpu" and not a.cpu:
        raise RuntimeError(f"JAX {jax.__version__} sees no GPU but {jax.devices()}: is its CUDA plugin installed?")
    target = TARGETS[spec["target"]]
    resolved, statistics = settings(target, spec)
    if spec.get("changes"):
        from fluxdit_jax.plan import training_flops

        result["flops_per_image"] = training_flops(resolved)
    result["device"], result["versions"] = jax.devices()[0].device_kind, {"jax": jax.__version__}
    with contextlib.suppress(AttributeError):
        result["versions"]["cuda"] = jax.devices()[0].client.platform_version
    result["attention"] = resolved.model.attention
    mesh = sharding.make_mesh(1, 1, spec["batch"])
    program = Program(resolved, mesh, statistics)
    start = time.perf_counter()
    compiled = program.compile()
    result["compile_s"] = time.perf_counter() - start
    planned = program.memory(compiled)
    result["plan_gb"], result["plan"] = planned.total / 1e9, str(planned)
    state, host = program.create(), random_batch(program.batch_shapes(), target.side)
    jax.block_until_ready(state)
    memory = jax.local_devices()[0].memory_stats() or {}
    result["limit_gb"] = memory["bytes_limit"] / 1e9 if "bytes_limit" in memory else None
    result["peak_before_steps_gb"] = devices.peak_memory_gb()  # compiling tries kernels, creating draws weights
    drawn = 0

    def put():
        nonlocal drawn
        drawn += spec["batch"]
        return sharding.put_batch(mesh, host | {"index": host["index"] + np.uint32(drawn)})

    batch = put()

    def turns(count: int) -> list[float]:
        """`count` micro-batches; when each one's metrics had been read, which is after the next is dispatched."""
        nonlocal state, batch
        read_at, unread = [], None
        for _ in range(count):
            state, values = compiled.accumulate(state, batch)
            if drawn % target.global_batch_size == 0:
                state, _ = compiled.update(state)
            batch = put()
            if unread is not None:
                np.asarray(unread)
                read_at.append(time.perf_counter())
            unread = values
        np.asarray(unread)
        return [*read_at, time.perf_counter()]

    def updates(count: int) -> list[float]:
        """Seconds of the optimizer's part of a step, by itself."""
        nonlocal state
        taken = []
        for _ in range(count + 1):  # the first is not counted
            jax.block_until_ready(state)
            start = time.perf_counter()
            state, _ = compiled.update(state)
            jax.block_until_ready(state)
            taken.append(time.perf_counter() - start)
        return taken[1:]

    turns(WARM_UP)
    if a.trace:
        from benchmarks.gpu_trace import summary

        with jax.profiler.trace(a.trace):
            turns(a.repeats)
        text = compiled.accumulate.as_text()
        with gzip.open(Path(a.trace) / PROGRAM, "wt", encoding="utf-8") as file:
            file.write(text)
        result["profile"] = summary(Path(a.trace), text, a.repeats)
    else:
        result["seconds"] = intervals(turns(a.repeats + 2))
        result["update_seconds"] = updates(3)
    result["peak_gb"] = devices.peak_memory_gb()


def run_torch(spec: dict[str, Any], a: argparse.Namespace, result: dict[str, Any]) -> None:
    """The same network in PyTorch: bf16 autocast, fused AdamW on f32 weights, gradients accumulated as ours are.

    No EMA and no metrics. One optimizer step is made before the clock starts, so that its memory is counted.
    """
    import torch

    from fluxdit_jax.exporting.torch_names import torch_arguments
    from fluxdit_jax.portable.modeling_fluxdit import FluxDiT

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not a.cpu:
        raise RuntimeError(f"PyTorch {torch.__version__} sees no GPU (built for CUDA {torch.version.cuda})")
    result["versions"] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if device == "cuda":
        result["device"] = torch.cuda.get_device_name()
        total = torch.cuda.get_device_properties(0).total_memory
        if a.memory_gb:
            torch.cuda.set_per_process_memory_fraction(min(1.0, a.memory_gb * 1e9 / total))
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    target = TARGETS[spec["target"]]
    accumulate = max(1, target.global_batch_size // spec["batch"])
    module = FluxDiT(**torch_arguments(network(target)))
    if spec["remat"] == "block":
        module.blocks = torch.nn.ModuleList(checkpointed(block) for block in module.blocks)
    module.to(device)
    called = module if a.eager else torch.compile(module, dynamic=False)
    rate = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(module.parameters(), fused=True, **rate)
    B, N, T = spec["batch"], target.side**2, TEXT_TOKENS
    half = {"dtype": torch.bfloat16, "device": device}
    latent, text = torch.randn(B, N, 64, **half), torch.randn(B, T, target.text_width, **half)
    lengths = torch.full((B,), T, device=device)
    vision = torch.nn.functional.normalize(torch.randn(B, target.vision_width, device=device), dim=-1)
    given = {"text": text, "text_length": lengths, "vision": vision}

    def micro_batch():
        x0 = latent.float()
        t, noise = torch.rand(B, device=device), torch.randn_like(x0)
        mixed = torch.lerp(x0, noise, t[:, None, None])
        with torch.autocast(device, torch.bfloat16):
            prediction = called(mixed, t, (target.side, target.side), given)
        loss = (prediction - (noise - x0)).square().mean()
        (loss / accumulate).backward()
        return loss.detach()

    def update():
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def done():
        """Something to wait on for all that is dispatched so far; reading the loss would also wait for later work."""
        event = torch.cuda.Event() if device == "cuda" else None
        if event is not None:
            event.record()
        return event

    def turns(count: int) -> list[float]:
        ended_at, unread = [], None
        for number in range(count):
            micro_batch()
            if (number + 1) % accumulate == 0:
                update()
            event = done()
            if number and unread is not None:
                unread.synchronize()
            if number:
                ended_at.append(time.perf_counter())
            unread = event
        if unread is not None:
            unread.synchronize()
        return [*ended_at, time.perf_counter()]

    start = time.perf_counter()
    first = micro_batch()
    update()
    if not math.isfinite(first.item()):
        raise RuntimeError(f"the loss of the first micro-batch is {first.item()}")
    result["compile_s"] = time.perf_counter() - start
    turns(WARM_UP)
    result["seconds"] = intervals(turns(a.repeats + 2))
    result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None


def checkpointed(block: Any) -> Any:
    """A module that keeps the block's input only and computes it again in the backward pass."""
    import torch
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, *arguments):
            return checkpoint(self.block, *arguments, use_reentrant=False)

    return Checkpointed()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether JAX's, PyTorch's or the CUDA driver's error says that the device's memory did not suffice."""
    text = f"{type(error).__name__}: {error}".lower()
    return any(words in text for words in ("resource_exhausted", "out of memory", "outofmemory"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=json.loads, help="target, side, batch, remat, attention")
    parser.add_argument("--repeats", type=int, default=10, help="timed micro-batches")
    parser.add_argument("--memory-gb", type=float, default=0.0, help="of PyTorch; JAX's is set by environment")
    parser.add_argument("--trace", help="write a profile here instead of timing (JAX)")
    parser.add_argument("--cpu", action="store_true", help="a CPU will do")
    parser.add_argument("--eager", action="store_true", help="PyTorch without torch.compile")
    a = parser.parse_args()
    result: dict[str, Any] = {"status": "ok", "flops_per_image": flops_per_image(TARGETS[a.spec["target"]])}
    try:
        (run_jax if a.spec["side"] == "jax" else run_torch)(a.spec, a, result)
    except Exception as error:  # noqa: BLE001  each library raises its own, and one of them is a result
        if not is_out_of_memory(error):
            raise
        result |= {"status": "out of memory", "error": str(error).splitlines()[0][:300]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
