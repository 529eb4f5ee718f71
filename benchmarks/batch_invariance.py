"""``python -m benchmarks.batch_invariance``: what HQQTENSOR_BATCH_INVARIANT=1 costs, as a ratio of times.

One layer with 4-bit weights in groups of 64. Processes with and without it take turns; the median of each counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from hqqtensor import HqqConfig, HQQTensor

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def measure(features: int, tokens: list[int], seconds: float) -> dict[str, float]:
    """Seconds of a product by dtype and tokens, the median over what fits in ``seconds``."""
    weight = HQQTensor.from_hp(
        torch.randn(features, features, generator=torch.manual_seed(0)), HqqConfig(4, 64, solver="rtn")
    )
    times = {}
    for name, dtype in DTYPES.items():
        w = weight.to(dtype)
        for count in tokens:
            x = torch.randn(count, features).to(dtype)
            torch.nn.functional.linear(x, w)
            taken, end = [], time.perf_counter() + seconds
            while not taken or time.perf_counter() < end:
                start = time.perf_counter()
                torch.nn.functional.linear(x, w)
                taken.append(time.perf_counter() - start)
            times[f"{name}, {count} tokens"] = statistics.median(taken)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each product in each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.features, args.tokens, args.seconds)))
        return
    results: dict[str, list[dict[str, float]]] = {"0": [], "1": []}
    for _ in range(args.rounds):
        for value, measured in results.items():
            env = {**os.environ, "HQQTENSOR_BATCH_INVARIANT": value}
            command = [sys.executable, "-m", "benchmarks.batch_invariance", "--child", *sys.argv[1:]]
            measured.append(json.loads(subprocess.check_output(command, env=env, text=True)))
    print("| product | as it is | batch-invariant | ratio |\n| --- | --- | --- | --- |")
    for name in results["0"][0]:
        plain, invariant = (statistics.median(one[name] for one in measured) * 1e3 for measured in results.values())
        print(f"| {name} | {plain:.3g} ms | {invariant:.3g} ms | {invariant / plain:.2f} x |")


if __name__ == "__main__":
    main()
