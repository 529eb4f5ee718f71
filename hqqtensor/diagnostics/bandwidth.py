"""How fast this machine reads memory: the bound of products with one token."""

import time

import torch

BUFFER_BYTES = 256 << 20  # larger than the caches of most processors


def read_bandwidth(runs: int = 5, nbytes: int = BUFFER_BYTES) -> float:
    """Bytes a second that torch reads from memory with the threads that it has now: the fastest of some sums.

    A loop written for the processor may read some per cent faster (``benchmarks/bandwidth.py``).
    """
    buffer = torch.ones(nbytes // 4)
    fastest = float("inf")
    for _ in range(runs + 1):  # the first run maps the pages
        started = time.perf_counter()
        buffer.sum()
        fastest = min(fastest, time.perf_counter() - started)
    return buffer.nbytes / fastest
