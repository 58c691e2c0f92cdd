"""The weights of a run by the names and in the layouts of `portable/modeling_fluxdit.py`. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fluxdit_jax.model.conditions import Condition
from fluxdit_jax.model.dit import ModelConfig

_LEAVES = {"kernel": "weight", "bias": "bias"}


def torch_arguments(config: ModelConfig) -> dict[str, Any]:
    """What the PyTorch network is constructed with."""
    return {
        "width": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "patch": config.patch,
        "channels": config.channels,
        "conditions": [(c.name, c.width, "sequence" if c.sequence else "vector") for c in config.conditions],
        "positions": config.positions,
        "mlp_hidden": config.mlp_hidden,
    }


def torch_weights(tensors: dict[str, np.ndarray], conditions: Sequence[Condition]) -> dict[str, np.ndarray]:
    """`exported.flatten`'s tensors for the PyTorch network, contiguous, dtype as it is.

    Kernels [in, out] become weights [out, in]; what is stacked over depth becomes an entry for each block.

    Raises:
      KeyError: a tensor that the PyTorch network has no place for.
    """
    places: dict[str, str] = {}
    for condition in conditions:
        place = f"embed.of_{condition.name}"
        places |= {f"{condition.name}_embed": f"{place}.linear", f"null_{condition.name}": f"{place}.null"}
        places |= {f"{condition.name}_scale": f"{place}.scale"} if condition.sequence else {}
    for name in ("patch_embed", "time_in", "time_out", "modulation", "out"):
        places[name] = name
    found: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        head, *rest = name.split(".")
        if head == "blocks":
            *modules, leaf = rest
            for number, layer in enumerate(array):
                found[".".join(["blocks", str(number), *modules, _LEAVES.get(leaf, leaf)])] = _laid_out(layer, leaf)
        else:
            leaf = rest[-1] if rest else ""
            found[".".join([places[head], *([_LEAVES[leaf]] if rest else [])])] = _laid_out(array, leaf)
    return found


def _laid_out(array: np.ndarray, leaf: str) -> np.ndarray:
    return np.ascontiguousarray(array.T if leaf == "kernel" else array)
