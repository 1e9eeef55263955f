"""Freed memory is kept for the next operation."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource
import torch
from relion_cryofilter.nn.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        maps = [torch.empty(2**20).fill_(1) for _ in range(3)]  # 4 MiB each
        del maps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_serves_the_next_operation() -> None:
    assert int(subprocess.check_output([sys.executable, "-c", COUNT])) < 100
