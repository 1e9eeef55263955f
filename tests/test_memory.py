"""Freed memory is kept for the next operation."""

import platform
import subprocess
import sys

import pytest

HELD_AFTER_USE = """
from pathlib import Path
import torch
from relion_cryofilter.images.batches import keep_freed_memory

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

keep_freed_memory()
keep_freed_memory()
before = held()
maps = [torch.empty(2**20).fill_(1) for _ in range(30)]  # 4 MiB each
del maps
print(round(held() - before))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_there_for_the_next_operation() -> None:
    assert int(subprocess.check_output([sys.executable, "-c", HELD_AFTER_USE])) > 100
