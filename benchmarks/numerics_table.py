"""``python -m benchmarks.numerics_table``: how much of its bound each path reaches, on each instruction set here.

The products are those of tests/kernels/numerics.py, all of them. ``--every 10`` takes a tenth of the weights. The
table is the one in docs/numerics.md.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.docs.markdown import table

SETS = ("amx", "avx512", "avx2", "portable")


def worst(every: int) -> dict[str, tuple[float, float]]:
    """By path: the largest share of the bound with numbers in the dtype's normal range, and with those below it."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))
    from numerics import LAYERS, shares

    by_path: dict[str, tuple[float, float]] = {}
    for layer in LAYERS[::every]:
        for path, kind, reached in shares(layer):
            normal, below = by_path.get(path, (0.0, 0.0))
            if kind.startswith(("smallest", "below")):
                by_path[path] = normal, max(below, reached)
            else:
                by_path[path] = max(normal, reached), below
    return by_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(worst(args.every)))
        return
    by_set: dict[str, dict[str, tuple[float, float]]] = {}
    for name in SETS:
        command = [sys.executable, "-m", "benchmarks.numerics_table", "--child", "--every", str(args.every)]
        done = subprocess.run(
            command, env={**os.environ, "HQQTENSOR_CPU": name}, capture_output=True, text=True, check=False
        )
        if "but this processor lacks it" in done.stderr:
            print(f"{name}: not on this processor")
        elif done.returncode:
            raise SystemExit(done.stderr)
        else:
            by_set[name] = json.loads(done.stdout)
    rows = [
        [path, *(f"{by_set[name][path][0]:.0%} ({by_set[name][path][1]:.0%})" for name in by_set)]
        for path in next(iter(by_set.values()))
    ]
    print(table(["path", *by_set], rows))


if __name__ == "__main__":
    main()
