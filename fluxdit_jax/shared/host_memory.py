"""Host memory: keeps what is freed, so that it is not faulted in again for every record and step."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # malloc.h
_LARGEST_THRESHOLD = 32 * 2**20  # glibc takes no higher one


def keep_freed_memory(large_too: bool) -> bool:
    """Tells glibc not to return freed memory to the kernel; False where there is no glibc.

    By default glibc maps large blocks and unmaps them again, so that each record is paid for with page faults.

    Args:
      large_too: also blocks above 32 MiB, as XLA's CPU backend allocates for the temporaries of each step. Without it
        those go back at once, as the copy of the state that a save makes should.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    mapped = (_M_MMAP_MAX, 0) if large_too else (_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
    # An arena grows by so much at once, and a block that fits there is not mapped, however large.
    growth = (_M_TOP_PAD, (64 if large_too else 16) * 2**20)
    settings = (mapped, (_M_TRIM_THRESHOLD, 2**31 - 1), growth)
    return all(mallopt(option, value) == 1 for option, value in settings)
