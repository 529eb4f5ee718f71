"""``python -m benchmarks.docs``: tables, plots and the API reference of the documentation, made anew.

Tables and plots come from the figures in docs/data, docs/api.md from the docstrings. Plots need matplotlib and are left
out without it. ``--check`` writes nothing and ends with status 1 where something is out of date. ``--record KIND FILE``
first puts the result of a benchmark (its ``--json FILE``) into docs/data.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from benchmarks.docs import figures, pages, plots


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", nargs=2, metavar=("KIND", "FILE"), help=f"KIND: {', '.join(figures.KINDS)}")
    parser.add_argument("--id", help="for --record: which run to add or replace, e.g. intel")
    parser.add_argument("--machine", help="for --record: what to call the machine")
    args = parser.parse_args(argv)
    if args.record:
        if args.record[0] not in figures.KINDS or not args.id or not args.machine:
            parser.error(f"--record wants a KIND out of {figures.KINDS}, --id and --machine")
        figures.record(args.record[0], json.loads(Path(args.record[1]).read_text()), args.id, args.machine)
    if args.check:
        wrong = [str(page) for page in pages.stale()] + plots.stale()
        for name in wrong:
            print(f"out of date: {name}")
        return 1 if wrong else 0
    for page in pages.write():
        print(f"written: {page}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
    else:
        plots.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
