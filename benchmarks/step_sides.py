"""One side of the training step benchmark, in a process of its own: see `benchmarks/step.py`.

Reads nothing, prints one JSON line: seconds per step, peak memory, seconds to compile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Size:
    """What is trained: the network's shape and the micro-batch."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    side: int = 32  # image tokens are side x side
    text_tokens: int = 120
    batch: int = 4
    text_width: int = 1024
    vision_width: int = 1024

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def lengths(self) -> dict[str, int]:
        return {"text": self.text_tokens}


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def settings(size: Size, dtype: str, remat: str, attention: str = "xla", routed: float = 0.0):
    """The real `Settings` of fluxdit_jax for AdamW on this size, no conditions dropped."""
    from fluxdit_jax import flow, optimizer
    from fluxdit_jax.loader.reader import BatchLayout
    from fluxdit_jax.model import dit
    from fluxdit_jax.model.conditions import Condition
    from fluxdit_jax.model.routing import Routing
    from fluxdit_jax.settings import Settings

    network = dit.ModelConfig(
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        patch=2,
        channels=16,
        conditions=(Condition("text", size.text_width, sequence=True), Condition("vision", size.vision_width)),
        dtype=dtype,
        remat=remat,
        attention=attention,
    )
    return Settings(
        model=network,
        flow=flow.FlowConfig(
            mean=0.0,
            std=1.0,
            uniform_share=0.0,
            shift=1.0,
            stratified=True,
            drop=(),
        ),
        optimizer=optimizer.OptimizerConfig(
            name="adamw",
            lr=1e-4,
            adam_lr=1e-4,
            schedule="constant",
            warmup_steps=0,
            total_steps=1000,
            final_fraction=0.0,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.01,
            grad_clip_norm=1.0,
            grad_accum_steps=1,
        ),
        routing=Routing(routed) if routed else None,
        alignment=None,
        batch=BatchLayout(
            2, size.tokens, network.token_width, {each.name: each.width for each in network.conditions}, size.lengths
        ),
        text_limit=None,
        micro_batch_size=size.batch,
        global_batch_size=size.batch,
        ema_decay=0.9999,
        short_ema_decay=None,
        seed=0,
    )


def inputs(size: Size) -> dict[str, np.ndarray]:
    """One micro-batch of normal numbers, f32, the same for every side."""
    rng = np.random.default_rng(0)
    vision = rng.normal(size=(size.batch, size.vision_width))
    return {
        "latent": rng.normal(size=(size.batch, size.tokens, 64)).astype(np.float32),
        "grid": np.full((size.batch, 2), size.side, np.int32),
        "text": rng.normal(size=(size.batch, size.text_tokens, size.text_width)).astype(np.float32),
        "text_length": np.full(size.batch, size.text_tokens, np.int32),
        "vision": (vision / np.linalg.norm(vision, axis=1, keepdims=True)).astype(np.float32),
        "index": np.arange(size.batch, dtype=np.uint32),
    }


def program(size: Size, dtype: str, remat: str, attention: str = "xla", routed: float = 0.0):
    from fluxdit_jax.device import sharding
    from fluxdit_jax.program import Program

    statistics = (np.zeros(64, np.float32), np.ones(64, np.float32))
    whole = settings(size, dtype, remat, attention, routed)
    return Program(whole, sharding.make_mesh(-1, 1, size.batch), statistics)


def timed(step, repeats: int) -> list[float]:
    """Seconds of each call but the first."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def run_jax(size: Size, dtype: str, remat: str, repeats: int, attention: str = "xla", routed: float = 0.0) -> dict:
    """The step of `fluxdit_jax.train`: AdamW, EMA, norms, metrics; buffers donated. `routed`: `Routing.share`."""
    import jax

    from fluxdit_jax.shared.host_memory import keep_freed_memory

    if jax.default_backend() == "cpu":
        keep_freed_memory(large_too=True)
    whole = program(size, dtype, remat, attention, routed)
    start = time.perf_counter()
    accumulate, update, _ = whole.compile()
    compile_s = time.perf_counter() - start
    state, arrays = whole.create(), inputs(size)
    batch = {
        name: jax.numpy.asarray(arrays.get(name, np.zeros(shape.shape)), shape.dtype)
        for name, shape in whole.batch_shapes().items()
    }

    def once():
        nonlocal state
        state, metrics = update(accumulate(state, batch)[0])
        jax.block_until_ready(metrics)

    return {"seconds": timed(once, repeats), "compile_s": compile_s}


def torch_network(side: str, size: Size):
    """(module, function of the module and the noisy latent, time, batch) of a PyTorch side."""
    if side == "pixart":
        from diffusers import PixArtTransformer2DModel

        network = PixArtTransformer2DModel(
            num_attention_heads=size.heads,
            attention_head_dim=size.width // size.heads,
            in_channels=16,
            out_channels=16,
            num_layers=size.depth,
            cross_attention_dim=size.width,
            sample_size=2 * size.side,
            patch_size=2,
            caption_channels=size.text_width,
            use_additional_conditions=False,
        )

        def forward(network, x, t, b):
            picture = x.reshape(size.batch, 2 * size.side, 2 * size.side, 16).permute(0, 3, 1, 2)
            y = network(picture, encoder_hidden_states=b["text"], timestep=1000 * t).sample
            return y.permute(0, 2, 3, 1).reshape(x.shape).float()

        return network, forward
    from fluxdit_jax.exporting.torch_names import torch_arguments
    from fluxdit_jax.portable.modeling_fluxdit import FluxDiT

    network = FluxDiT(**torch_arguments(settings(size, "float32", "none").model))

    def forward(network, x, t, b):
        return network(x, t, (size.side, size.side), {name: b[name] for name in ("text", "text_length", "vision")})

    return network, forward


def run_torch(side: str, size: Size, dtype: str, compiled: bool, repeats: int, device: str = "cpu") -> dict:
    """Forward, backward, clip and fused AdamW on f32 weights; bfloat16 by autocast. No EMA, no metrics."""
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    network, forward = torch_network(side, size)
    network.to(device)
    called = torch.compile(network) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    batch = {
        name: torch.from_numpy(value.astype(np.int64) if value.dtype == np.uint32 else value).to(device)
        for name, value in inputs(size).items()
    }
    x0 = batch["latent"]

    def once():
        t, noise = torch.rand(size.batch, device=device), torch.randn_like(x0)
        mixed = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
        cast = torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
        with cast:
            prediction = forward(called, mixed, t, batch)
        loss = (prediction - (noise - x0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    start = time.perf_counter()
    once()
    first_s = time.perf_counter() - start
    return {"seconds": timed(once, repeats), "compile_s": first_s}


def agree(size: Size) -> dict[str, float]:
    """Loss and gradient of both networks with the same lively weights, f32, on the same input."""
    import jax
    import torch

    from fluxdit_jax.exporting.torch_names import torch_arguments, torch_weights
    from fluxdit_jax.model import dit
    from fluxdit_jax.model.conditions import given
    from fluxdit_jax.portable.modeling_fluxdit import FluxDiT
    from fluxdit_jax.sampling.exported import flatten

    config = settings(size, "float32", "none").model
    graph, shapes = dit.build(config)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    b = inputs(size)
    b["text_length"] = 1 + np.arange(size.batch, dtype=np.int32) % size.text_tokens
    t = rng.uniform(0.1, 0.9, size.batch).astype(np.float32)
    keep = np.ones(size.batch, bool)
    conditions = given(config.conditions, b, {"text": keep, "vision": keep})

    def loss(params):
        return jax.numpy.mean(dit.apply(graph, params, b["latent"], t, b["grid"], conditions) ** 2)

    ours, gradient = jax.jit(jax.value_and_grad(loss))(params)
    network = FluxDiT(**torch_arguments(config))
    weights = torch_weights(flatten(params), config.conditions)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    parts = {name: torch.from_numpy(b[name]) for name in ("text", "text_length", "vision")}
    theirs = network(torch.from_numpy(b["latent"]), torch.from_numpy(t), (size.side, size.side), parts)
    theirs = theirs.square().mean()
    theirs.backward()
    a = np.asarray(gradient["blocks"]["attention"]["qkv"]["kernel"])
    g = np.stack([block.attention.qkv.weight.grad.numpy().T for block in network.blocks])
    return {
        "loss_jax": float(ours),
        "loss_torch": float(theirs.detach()),
        "gradient_error": float(np.linalg.norm(a - g) / np.linalg.norm(g)),
    }
