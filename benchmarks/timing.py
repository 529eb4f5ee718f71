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

SETTLE = 12e-3
"""Seconds of untimed runs at the start of a turn, at least one. Idle threads of the last contender's OpenMP spin that
long (GNU OpenMP: 300,000 rounds, milliseconds) and would take a core from the next."""
TURN = 3e-3  # seconds of timed runs in a turn, at least two runs


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int = 15, seconds: float = 3.0) -> dict[str, float]:
    """Median seconds of each entry. The entries take turns, ``rounds`` times or until ``seconds`` have passed.

    Every entry has at least three turns. After those, one that has used more than its share of the time so far
    sits a round out, so that a slow entry does not keep the others from their turns.
    """
    clock = time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    for run in runs.values():
        run()
    begin = clock()
    for done in range(rounds):
        if done >= 3 and clock() - begin > seconds:
            break
        for name, run in runs.items():
            started = clock()
            if done >= 3 and spent[name] > max(started - begin, 1e-9) / len(runs) * 3:
                continue
            run()
            while clock() - started < SETTLE:
                run()
            turn, runs_timed = clock(), 0
            while runs_timed < 2 or clock() - turn < TURN:
                t0 = clock()
                run()
                times[name].append(clock() - t0)
                runs_timed += 1
            spent[name] += clock() - started
    return {name: statistics.median(t) for name, t in times.items()}


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
