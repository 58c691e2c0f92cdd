"""glibc keeps what is freed: counted in the page faults of a process that allocates and frees the same sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource
from fluxdit_jax.allocator import keep_freed_memory
{call}
def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        b"x" * size
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(700_000), faults(40 * 2**20))
"""
RECORD, LARGE = 20 * 700_000 // 4096, 20 * 40 * 2**20 // 4096  # pages


def counted(call: str) -> list[int]:
    code = FAULTS.format(call=call)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert result.returncode == 0, result.stderr
    return [int(word) for word in result.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_records_are_kept_and_large_blocks_where_asked():
    record, large = counted("assert keep_freed_memory(large_too=False)")
    assert record < RECORD / 5 and large > LARGE / 2
    record, large = counted("assert keep_freed_memory(large_too=True)")
    assert record < RECORD / 5 and large < LARGE / 5
