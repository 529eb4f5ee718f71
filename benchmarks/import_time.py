"""Seconds that ``import hqqtensor`` and the command's help take: ``python -m benchmarks.import_time``.

Every run is a fresh process, and the programs take turns, so that a busy machine slows all of them alike.
"""

import argparse
import statistics
import subprocess
import sys
import time

PROGRAMS = {
    "import torch, torchao": ("-c", "import torch, torchao"),
    "import torch, torchao, hqqtensor": ("-c", "import torch, torchao, hqqtensor"),
    "hqqtensor --help": ("-m", "hqqtensor", "--help"),
    "hqqtensor --version": ("-m", "hqqtensor", "--version"),
}


def seconds(arguments: tuple[str, ...]) -> float:
    """Wall time of one process from its start to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def measure(rounds: int) -> dict[str, list[float]]:
    """The times of each program, ``rounds`` of each. The medians of a few rounds leave out the first, slow one."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(rounds):
        for name, arguments in PROGRAMS.items():
            times[name].append(seconds(arguments))
    return times


def main(argv: list[str] | None = None) -> None:
    """Measure and print medians, and what hqqtensor adds to torch and torchao."""
    parser = argparse.ArgumentParser(description="time to import hqqtensor and to show the command's help")
    parser.add_argument("--rounds", type=int, default=10, help="processes of each program (default: 10)")
    times = measure(parser.parse_args(argv).rounds)
    for name, taken in times.items():
        print(f"{name:<34}{statistics.median(taken):7.3f} s")
    without, with_ours = (times[name] for name in list(PROGRAMS)[:2])
    added = statistics.median(b - a for a, b in zip(without, with_ours, strict=True))
    print(f"{'added by hqqtensor':<34}{added:7.3f} s ({100 * added / statistics.median(without):.1f} %)")


if __name__ == "__main__":
    main()
