"""How this process's C library keeps memory between torch's operations."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 * 2**20
"""The most that glibc lets its heaps serve; larger blocks always come from the kernel."""


@cache
def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next operation; nothing to do on other systems.

    By default it gives blocks of some megabytes, such as the maps of one convolution, back to
    the kernel as soon as they are free, and each operation waits for zeroed pages again: a pass
    through a network of 2020 then takes up to twice as long.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
