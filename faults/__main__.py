"""``python -m faults``: every fault at every call, and a table of what came of it; exit code 1 for a failure."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from faults.inject import build, run_preloaded

FILES = ("calls", "faults", "absorbed", "old", "new", "put_back", "continued")
MEMORY = ("calls", "faults", "absorbed", "old", "new")
HEADS = {
    "calls": "calls", "faults": "faults", "absorbed": "done nonetheless", "old": "old whole", "new": "new whole",
    "put_back": "old put back", "continued": "same call again", "failures": "failures",
}  # fmt: skip


def run(kind: str, names: list[str], seed: int, share: float) -> list[dict[str, Any]]:
    """The rows of ``faults.inside`` for a kind, "files" or "memory"; RuntimeError without a compiler."""
    with tempfile.TemporaryDirectory(prefix="hqqtensor-faults-") as folder:
        out = Path(folder, "rows.json")
        code = run_preloaded(build(Path(folder)), [kind, str(out), str(seed), str(share), *names])
        if code:
            raise RuntimeError(f"the process that injects faults ended with {code}")
        rows: list[dict[str, Any]] = json.loads(out.read_text())
        return rows


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Markdown, with a line of sums."""
    columns = (*columns, "failures")
    cells = [[row["name"], *(len(row[c]) if c == "failures" else row[c] for c in columns)] for row in rows]
    cells.append(["together", *(sum(row[place] for row in cells) for place in range(1, len(columns) + 1))])
    head = ["", *(HEADS[c] for c in columns)]
    return "\n".join(f"| {' | '.join(f'{c:,}' if isinstance(c, int) else c for c in row)} |".replace("|  |", "| |")
                     for row in (head, ["---"] * len(head), *cells))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--kind", choices=("files", "memory"), help="default: both")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a line of the table; repeatable")
    parser.add_argument("--share", type=float, default=1.0, help="of all faults, chosen by --seed (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    failed = False
    for kind, columns in (("files", FILES), ("memory", MEMORY)):
        if args.kind in (None, kind):
            rows = run(kind, args.only, args.seed, args.share)
            print(f"{table(rows, columns)}\n", flush=True)
            for row in rows:
                for failure in row["failures"]:
                    failed = True
                    print(f"{row['name']}: {failure}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
