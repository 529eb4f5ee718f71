"""Turns, read loops and memory: the yardsticks of every benchmark."""

import functools
import operator
import time

import pytest
import torch

from benchmarks import bandwidth
from benchmarks.memory import peak_over
from benchmarks.timing import interleaved


def test_a_slow_entry_has_its_turns_and_leaves_the_others_theirs() -> None:
    counts = {"slow": 0, "fast": 0}

    def run(name: str, seconds: float) -> None:
        counts[name] += 1
        time.sleep(seconds)

    runs = {"slow": lambda: run("slow", 0.03), "fast": lambda: run("fast", 0.001)}
    times = interleaved(runs, rounds=100, seconds=0.5)
    assert 0.03 <= times["slow"] < 0.06
    assert 0.001 <= times["fast"] < 0.01
    assert counts["slow"] >= 10 and counts["fast"] > counts["slow"]


def test_the_compiled_read_loop_reads_every_word() -> None:
    library = bandwidth._compiled()
    if library is None:
        pytest.skip("no C compiler")
    words = torch.randint(-(2**62), 2**62, (8 * 3 * 4 * 100,))
    want = functools.reduce(operator.xor, words.tolist()) % 2**64
    for threads in (1, 3):
        for streams in (1, 4):
            assert library.read_loop(words.data_ptr(), words.nbytes, threads, streams) == want


def test_bandwidth_is_that_of_the_fastest_loop() -> None:
    loops = bandwidth.ReadLoops(1 << 20)
    times = {name: 1e-3 * (i + 1) for i, name in enumerate(loops.runs)} | {"4-bit fp32": 1e-9}
    speed, name = loops.bandwidth(times)
    assert speed == pytest.approx(2**20 / 1e-3)
    assert bandwidth.PREFIX + name == next(iter(loops.runs))


def test_peak_memory_counts_what_is_freed_again() -> None:
    def run() -> torch.Tensor:
        torch.ones(32 << 20, dtype=torch.uint8)
        return torch.ones(1 << 20, dtype=torch.uint8)

    peak = peak_over(run)
    if peak is None:
        pytest.skip("the peak of memory cannot be reset here")
    assert 31 << 20 < peak < 48 << 20
