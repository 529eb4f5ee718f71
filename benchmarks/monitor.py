"""What watching costs: ``python -m benchmarks.monitor DIR``, for a directory that ``hqqtensor quantize`` wrote.

Passes of one token with and without a monitor take turns; prepared for generation and not. The cost of the counting
alone is measured on a call that does nothing else.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch

import hqqtensor
from benchmarks.timing import machine
from hqqtensor.diagnostics import monitor_quantization_performance


def passes(model: Any, count: int) -> list[float]:
    """Seconds of ``count`` passes of one token behind a few in a cache."""
    times = []
    with torch.no_grad():
        ids = torch.arange(1, 17)[None]
        cache = model(ids, use_cache=True).past_key_values
        for _ in range(count):
            began = time.perf_counter()
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - began)
    return times


def measure(model: Any, rounds: int, count: int) -> dict[str, float]:
    """Median milliseconds of a pass without and with a monitor, and the median difference in microseconds."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for watched in (False, True):
            context = monitor_quantization_performance(model, memory_bandwidth=1e10) if watched else nullcontext()
            with context:
                times[watched].append(statistics.median(passes(model, count)))
    added = [b - a for a, b in zip(times[False], times[True], strict=True)]
    plain, watched = (1e3 * statistics.median(times[w]) for w in (False, True))
    return {"plain_ms": plain, "watched_ms": watched, "added_us": 1e6 * statistics.median(added)}


def of_a_product(calls: int = 20_000) -> float:
    """Microseconds that the counting adds to a product of 8 x 8 weights, whose own time is taken off."""
    layer = torch.nn.Linear(8, 8, bias=False)
    hqqtensor.quantize_(layer, hqqtensor.hqq_weight_only(4, 8))
    x, best = torch.ones(1, 8), {}

    def run() -> None:
        for _ in range(calls):
            torch.nn.functional.linear(x, layer.weight)

    class Loop(torch.nn.Module):
        def forward(self) -> None:
            run()

    loop = Loop()
    for watched in (False, True) * 3:
        context = monitor_quantization_performance(loop, memory_bandwidth=1e10) if watched else nullcontext()
        with torch.no_grad(), context:
            began = time.perf_counter()
            loop()
            best[watched] = min(best.get(watched, float("inf")), time.perf_counter() - began)
    return 1e6 * (best[True] - best[False]) / calls


def main(argv: list[str] | None = None) -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description="the cost of monitor_quantization_performance")
    parser.add_argument("directory", metavar="DIR", help="quantized transformers directory")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default: 15)")
    parser.add_argument("--passes", type=int, default=40, help="passes of a turn (default: 40)")
    args = parser.parse_args(argv)
    model = hqqtensor.load(args.directory)
    result: dict[str, Any] = {"product_us": of_a_product(), "modules": measure(model, args.rounds, args.passes)}
    hqqtensor.prepare_for_generation_(model)
    result["prepared"] = measure(model, args.rounds, args.passes)
    print(json.dumps({"machine": machine(), **result}, indent=1))


if __name__ == "__main__":
    main()
