"""``python -m fuzz``: read damaged inputs and say what was found; the exit code is 1 where something was."""

import argparse
import json
import sys
import time
from pathlib import Path

from fuzz import tally
from fuzz.child import run_one
from fuzz.run import run_in_parallel, save_findings
from fuzz.targets import TARGETS

FOLDER = Path("build") / "fuzz"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="once for each; default: all")
    parser.add_argument("--seconds", type=float, default=600, help="for each target (default: %(default)s)")
    parser.add_argument("--count", type=int, default=2**62, help="inputs of each target, where they are done sooner")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: %(default)s)")
    parser.add_argument("--first", type=int, help="number of the first input; default: others in every run")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run this one input here, without a child process")
    parser.add_argument(
        "--coverage", action="store_true", help="let atheris choose damages by the code that they reach"
    )
    parser.add_argument("--tally", type=Path, metavar="FILE", help="add the counts to those in this file")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    names = args.target or list(TARGETS)
    if args.only is not None:
        return max(_run_here(name, args.only) for name in names)
    if args.coverage:
        from fuzz.coverage import run_guided

        return max(run_guided(name, args.seconds) for name in names)
    first = time.time_ns() % 2**40 if args.first is None else args.first
    counts, found = {}, 0
    for name in names:
        result = run_in_parallel(name, first, args.count, args.seconds, args.jobs)
        counts[name] = {"inputs": result.inputs, "taken": result.taken, "findings": len(result.findings)}
        if args.tally:
            tally.add(args.tally, name, result.inputs, result.taken, len(result.findings))
        if not args.json:
            print(
                f"{name}: {result.inputs} inputs from {first}, {result.taken} taken, {len(result.findings)} findings",
                flush=True,
            )
        for place in save_findings(name, result.findings, FOLDER):
            last = result.findings[int(place.name)].strip().splitlines()[-1]
            print(f"  {place}: {last[:300]}", file=sys.stderr, flush=True)
        found += len(result.findings)
    if args.json:
        print(json.dumps({"first": first, "targets": counts}))
    return int(found > 0)


def _run_here(name: str, number: int) -> int:
    kind, text = run_one(TARGETS[name], number, FOLDER / "here")
    print(f"{name} {number}: {kind}\n{text}")
    return int(kind == "finding")


if __name__ == "__main__":
    sys.exit(main())
