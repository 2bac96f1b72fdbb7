"""Freed memory: kept inside the block, given back after it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from pathlib import Path
import torch
from resafe.allocator import LARGE, freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)  # 64 MiB, above what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) * 1024

torch.ones(2**24)
outside, before = faults(), held()
with freed_memory_kept(LARGE):
    faults()  # until small objects have found places beside the large ones
    inside, kept = faults(), held() - before
print(outside, inside, kept, held() - before, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's thresholds are set on Linux")
def test_buffers_are_used_again():
    """64 MiB are 16384 pages (or 32 huge ones): taken anew for every tensor outside, once inside."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    outside, inside, kept, after, again = map(int, done.stdout.split())
    if again < 20:
        pytest.skip("another C library than glibc")
    assert inside * 10 < outside and again > inside * 10
    assert kept > 2**25 and after < 2**25
