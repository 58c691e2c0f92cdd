"""The memory plan: what a step needs, before the first one runs."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

log = logging.getLogger(__name__)
GB = 1e9


class OutOfMemory(Exception):
    """The step cannot fit the device."""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
      parts: of the state, by what they are for.
      batch: inputs of the step.
      temporary: what XLA's own plan of the largest program needs besides: activations, gradients, scratch.
    """

    parts: dict[str, int]
    batch: int
    temporary: int

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + self.batch + self.temporary

    def __str__(self) -> str:
        listed = [f"{name} {size / GB:.2f}" for name, size in self.parts.items()]
        return ", ".join(
            [*listed, f"batch {self.batch / GB:.2f}", f"activations and scratch {self.temporary / GB:.2f}"]
        )


def plan(programs: Iterable[jax.stages.Compiled], state: Any, batch: Any) -> MemoryPlan:
    """The plan of a step of compiled programs over (state, batch), arrays or `ShapeDtypeStruct` with shardings."""
    inner = state.opt_state
    parts = {
        "f32 weights": _bytes(state.params),
        "moments": _bytes(inner.inner_opt_state),
        "gradient accumulator": _bytes(inner.acc_grads),
        "EMA": _bytes((state.ema, state.short_ema)),
    }
    analyses = [program.memory_analysis() for program in programs]
    temporary = [analysis.temp_size_in_bytes for analysis in analyses if analysis is not None]
    if len(temporary) < len(analyses):
        log.warning("this device's compiler does not say what a step needs: activations and scratch are not counted")
        return MemoryPlan(parts, _bytes(batch), 0)
    return MemoryPlan(parts, _bytes(batch), max(temporary))


def require_fit(
    found: MemoryPlan,
    limit_gb: float,
    allowed_gb: float | None,
    alternatives: list[tuple[str, Callable[[], MemoryPlan]]],
) -> None:
    """Refuses a plan larger than either limit, naming the first of the alternatives that fits.

    Args:
      limit_gb: config.device_memory_gb. allowed_gb: what JAX may take (`devices.memory_limit_gb`); None: no limit.
      alternatives: (what to set, how to plan it), tried in order; planning one means compiling it.

    Raises:
      OutOfMemory: it does not fit.
    """
    limit, which = limit_gb, f"config.device_memory_gb is {limit_gb:g}"
    if allowed_gb is not None and allowed_gb < limit_gb:
        limit, which = allowed_gb, f"JAX may take {allowed_gb:.2f} GB (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    if found.total <= limit * GB:
        return
    log.info("the step does not fit; looking for a setting that does")
    advice = "no smaller micro-batch or remat policy fits either: the model is too large for this device"
    for what, make in alternatives:
        candidate = make()
        if candidate.total <= limit * GB:
            advice = f"{what} fits, with {candidate.total / GB:.2f} GB"
            break
    raise OutOfMemory(f"a step needs {found.total / GB:.2f} GB a device ({found}), {which}. {advice}")


def _bytes(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total
