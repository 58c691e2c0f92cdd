"""Where arrays live: a mesh with the axes `data` (splits the batch) and `fsdp` (splits batch and weights).

One device is the 1 x 1 mesh; nothing else in the package knows how many there are.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Smaller arrays are copied to every device: splitting a bias saves nothing and costs a collective.
_SMALLEST_SPLIT = 2**14


class MeshError(Exception):
    """The mesh asked for does not fit the devices or the batch."""


def make_mesh(data: int, fsdp: int, batch_size: int) -> Mesh:
    """A (data, fsdp) mesh over all devices of all processes; data = -1 takes what fsdp leaves.

    Raises:
      MeshError: the product is not the number of devices, or does not divide the micro-batch.
    """
    devices = jax.devices()
    if data == -1:
        data = max(1, len(devices) // fsdp)
    if data * fsdp != len(devices):
        raise MeshError(
            f"config.mesh is data={data} x fsdp={fsdp} = {data * fsdp} devices, but there are {len(devices)}"
        )
    if batch_size % len(devices):
        raise MeshError(
            f"config.data.micro_batch_size is {batch_size}; it must be a multiple of the {len(devices)} devices"
        )
    return Mesh(np.asarray(devices).reshape(data, fsdp), ("data", "fsdp"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over every device."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def tree_sharding(mesh: Mesh, tree: Any) -> Any:
    """A sharding per leaf: matrices split over `fsdp` on their largest axis that divides, the rest replicated.

    Decided by shape alone, so that masters, moments, accumulator and EMA of one parameter lie alike.
    """

    def leaf_sharding(leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        size = mesh.shape["fsdp"]
        axes = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % size == 0]
        if size == 1 or leaf.ndim < 2 or leaf.size < _SMALLEST_SPLIT or not axes:
            return replicated(mesh)
        split = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if axis == split else None for axis in range(leaf.ndim))))

    return jax.tree.map(leaf_sharding, tree)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Moves this process's part of a micro-batch to its devices as global arrays."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def gather(tree: Any) -> Any:
    """The tree as arrays that process 0 holds whole, of several devices on the host; None in place of each elsewhere.

    Every process of a run must call it. An array at a time crosses, so that the others never hold the whole tree.
    """
    if jax.device_count() == 1:
        return tree
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def whole(leaf: jax.Array) -> Any:
        gathered = multihost_utils.process_allgather(leaf, tiled=True)
        return None if jax.process_index() else gathered

    return jax.tree.map(whole, tree)
