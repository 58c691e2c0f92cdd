"""Muon for the matrices inside the blocks, Nesterov's Adam for all else: optax's, told what is a matrix here.

Sources: Jordan et al. 2024 (github.com/KellerJordan/Muon); the size of its updates: Liu et al. 2025 (arXiv:2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

# Kernels [..., in, parts * out] that are several matrices beside each other.
FUSED = {"qkv": 3, "kv": 2, "gate_up": 2}
# Updates as large as AdamW's, so that its learning rate carries over (2502.16982).
UPDATE_RMS = 0.2

Path = tuple[Any, ...]


def muon(
    lr: optax.Schedule,
    adam_lr: optax.Schedule,
    is_hidden_matrix: Callable[[Path], bool],
    *,
    split: bool,
    weight_decay: float,
    decayed: Callable[[Any], Any],
    b1: float,
    b2: float,
) -> optax.GradientTransformation:
    """Muon for kernels [depth, in, out] of the blocks, each layer a matrix of its own; momentum in f32.

    On a GPU the Newton-Schulz iteration multiplies in bfloat16 and adds in f32, as it is commonly run: its result
    needs to be orthogonal to a tenth only. CPUs multiply in f32.

    Args:
      lr: of the matrices. adam_lr: of the rest.
      split: orthogonalise the parts of fused kernels (`FUSED`) each by itself.
      weight_decay: of the matrices inside the blocks alone: optax decays nothing that it leaves to Adam.
      decayed: parameters to a tree of booleans; it changes nothing, and checkpoints have its place.
    """

    def axes_of(params: Any) -> Any:
        def axes(path: Path, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
            if not is_hidden_matrix(path):
                return None
            # Axes that are neither are a batch: depth, and the parts of a kernel that is split.
            fused = split and _parts(path) > 1
            return optax.contrib.MuonDimensionNumbers(reduction_axis=-3 if fused else -2, output_axis=-1)

        return jax.tree_util.tree_map_with_path(axes, params)

    rule = optax.contrib.muon(
        lr,
        weight_decay=weight_decay,
        weight_decay_mask=decayed,
        adam_b1=b1,
        adam_b2=b2,
        adam_learning_rate=adam_lr,
        muon_weight_dimension_numbers=axes_of,
        consistent_rms=UPDATE_RMS,
    )

    def apart(tree: Any) -> Any:
        """Fused kernels of the blocks as [..., in, parts, out]."""

        def one(path: Path, leaf: jax.Array) -> jax.Array:
            if not (split and is_hidden_matrix(path) and _parts(path) > 1):
                return leaf
            return leaf.reshape(*leaf.shape[:-1], _parts(path), -1)

        return jax.tree_util.tree_map_with_path(one, tree)

    def init(params: Any) -> Any:
        return rule.init(apart(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.default_matmul_precision(_precision()):
            made, state = rule.update(apart(updates), state, apart(params))
        return jax.tree.map(lambda new, old: new.reshape(old.shape), made, updates), state

    return optax.GradientTransformation(init, update)


def _precision() -> str:
    """Of the iteration's products. XLA has no bfloat16 for NVIDIA's cards before Ampere."""
    capability = getattr(jax.devices()[0], "compute_capability", "") if jax.default_backend() == "gpu" else ""
    return "default" if capability and float(capability) < 8 else "BF16_BF16_F32"


def _parts(path: Path) -> int:
    """How many matrices a kernel is."""
    return FUSED.get(str(path[-2].key), 1)
