"""``python -m benchmarks.quality``: every method on both models; ``--json`` writes what docs/quality.md is made from.

Results are kept one file each under ``--cache``; only what is not there is computed. Peers that are not installed are
named and left out.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.quality import ours, peers, report
from benchmarks.quality.run import cached, result_of
from benchmarks.quality.task import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".quality"), help="folder of results (default .quality)")
    parser.add_argument("--half", choices=("report", "tune"), default="report", help="half of the text to measure on")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--only", default="", help="only methods whose name contains this")
    parser.add_argument("--fresh", action="store_true", help="compute what --only names again")
    parser.add_argument("--cached", action="store_true", help="compute nothing: report what the cache holds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="e.g. docs/data/quality.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours.CACHE = args.cache
    methods, missing = peers.methods()
    methods += ours.methods()
    for name, reason in missing.items():
        print(f"left out: {name} ({reason})")
    results = []
    if args.cached:
        results = [r for r in cached(args.cache, args.half) if r["task"] in args.tasks and args.only in r["method"]]
        args.tasks = []
    for task_name in args.tasks:
        task = TASKS[task_name]()
        for method in methods:
            if args.only in method.name and task.name in (method.models or TASKS):
                result = result_of(method, task, args.half, args.cache, args.fresh)
                results.append(result)
                first = next(iter(result["windows"].values()))
                print(
                    f"{task.name:7} {method.name:36} {result['bits']:.3f} bits  {sum(first) / len(first):.5f}  "
                    f"{result['seconds']:.1f} s",
                    flush=True,
                )
    table = report.rows(results)
    report.show(table)
    if args.json:
        report.write(table, args.json)


if __name__ == "__main__":
    main()
