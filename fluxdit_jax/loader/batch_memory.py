"""The memory of micro-batches, used again when nothing refers to it any more.

Fresh memory costs a page fault for each 4 KiB, which took longer than all the rest of a batch. It cannot simply be
overwritten: a batch may still be on its way to the device, and on a CPU `jax.device_put` keeps no copy of its own.
But whoever still needs an array holds a reference to it, JAX too. So memory comes back when the last array in it is
freed, and only then.
"""

from __future__ import annotations

import collections
import mmap
from typing import Any

import numpy as np

_ALIGNMENT = 4096  # JAX takes an array on a CPU without a copy if it starts at a multiple of 64
_HUGE = 4 * 2**20  # from this size on the kernel is asked for huge pages


class _Slot:
    """Memory of one batch, and how much of each row is not zero.

    Attributes:
      filled: int64 [B, padded]: in each row, the tokens of each padded array that may hold values.
    """

    def __init__(self, size: int, rows: int, padded: int):
        self.memory = mmap.mmap(-1, size)
        if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.filled = np.zeros((rows, padded), np.int64)


class _Loan:
    """What the arrays of a batch have as their base: gives the slot back when the last of them is gone."""

    def __init__(self, slot: _Slot, free: collections.deque[_Slot]):
        self._slot, self._free = slot, free
        whole = np.frombuffer(slot.memory, np.uint8)
        self.__array_interface__: dict[str, Any] = whole.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._slot)


class BatchMemory:
    """Makes the arrays of batches that all have the same shapes. Thread-safe."""

    def __init__(self, rows: int, shapes: dict[str, tuple[tuple[int, ...], np.dtype]], padded: int):
        """
        Args:
          rows: samples of a batch. shapes: of each array, (shape, dtype).
          padded: how many of the arrays are padded: the latent and the sequences.
        """
        self._rows, self._padded = rows, padded
        self._free: collections.deque[_Slot] = collections.deque()
        self._layout, self._size = [], 0
        for name, (shape, dtype) in shapes.items():
            bytes_of = int(np.prod(shape)) * dtype.itemsize
            self._layout.append((name, self._size, bytes_of, shape, dtype))
            self._size += -(-bytes_of // _ALIGNMENT) * _ALIGNMENT

    def take(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Arrays with whatever was last written to them, and `filled`, which tells where; to be kept right."""
        try:
            slot = self._free.popleft()
        except IndexError:
            slot = _Slot(self._size, self._rows, self._padded)
        whole = np.asarray(_Loan(slot, self._free))
        arrays = {
            name: whole[start : start + size].view(dtype).reshape(shape)
            for name, start, size, shape, dtype in self._layout
        }
        return arrays, slot.filled
