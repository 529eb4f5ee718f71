"""Timings that mean something on a noisy machine: everything in one run, interleaved, quoted as ratios."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int = 15, seconds: float = 3.0) -> dict[str, float]:
    """Median seconds of each entry. The entries take turns, ``rounds`` times or until ``seconds`` have passed."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(t) for name, t in times.items()}


class ReadLoop:
    """Sums a buffer larger than the caches; ``bandwidth(seconds)`` is what such a run reached, in bytes a second."""

    def __init__(self, nbytes: int = 256 << 20) -> None:
        self.buffer = torch.ones(nbytes // 4)

    def __call__(self) -> None:
        self.buffer.sum()

    def bandwidth(self, seconds: float) -> float:
        return self.buffer.nbytes / seconds


def machine() -> dict[str, Any]:
    """Processor, threads and versions, for the record."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        flags = next((line for line in lines if line.startswith("flags")), "").split()
    except OSError:
        names, flags = [], []
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "processor": names[0] if names else platform.processor(),
        "flags": [f for f in wanted if f in flags],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "HQQTENSOR_CPU": os.environ.get("HQQTENSOR_CPU"),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_json(path: str | None, results: Any) -> None:
    """Results with the machine beside them; nothing where ``path`` is None."""
    if path:
        Path(path).write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
