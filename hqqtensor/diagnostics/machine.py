"""What this machine reads of memory in a second, and what this process holds of it."""

import functools
import os
import time
from pathlib import Path

import torch

BUFFER = 256 << 20
"""Bytes that are read to measure, more than the caches of most processors hold."""
ROUNDS = 6
"""Of which the first maps the pages."""


@functools.cache
def memory_bandwidth() -> float:
    """Bytes a second that torch's threads read, the best of a few sums over a large buffer; measured once.

    A loop written for the processor may read some percent faster (``benchmarks/bandwidth.py``).
    """
    buffer = torch.ones(BUFFER // 4)
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - began)
    return BUFFER / best


def resident_bytes() -> int:
    """Resident memory of this process in bytes, mapped files among it; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
