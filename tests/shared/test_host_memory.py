"""glibc keeps what is freed: counted in the page faults of a process that allocates and frees the same sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, threading
from fluxdit_jax.shared.host_memory import keep_freed_memory
{call}
def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        b"x" * size, b"y" * size, b"z" * size
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
for size in (700_000, 40 * 2**20):
    thread = threading.Thread(target=faults, args=(size,))
    thread.start()
    thread.join()
"""


def counted(call: str) -> list[int]:
    code = FAULTS.format(call=call)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    return [int(word) for word in result.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_records_are_kept_and_large_blocks_where_asked():
    plain, _ = counted("")
    record, large = counted("assert keep_freed_memory(large_too=False)")
    record_too, large_kept = counted("assert keep_freed_memory(large_too=True)")
    assert max(record, record_too) < plain / 5
    assert large_kept < large / 5
