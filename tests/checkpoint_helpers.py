"""Helpers of the tests of checkpoints: reading one back, and damage."""

from __future__ import annotations

from training_helpers import abstract_state

from fluxdit_jax.run.checkpoint import Checkpoints


def restore(workdir, state):
    with Checkpoints(workdir, keep=2) as checkpoints:
        return checkpoints.restore(abstract_state(state))


def flip_in_the_largest_file(folder):
    """Flips a bit in the middle of the file that holds the numbers."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
