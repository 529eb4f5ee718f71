"""Counts of inputs by target, added up over runs in a file of JSON: ``python -m fuzz.tally FILE`` prints them."""

import argparse
import fcntl
import json
from pathlib import Path

COUNTS = ("inputs", "taken", "findings")


def add(file: Path, name: str, inputs: int, taken: int, findings: int) -> None:
    """Add to the counts of a target; several processes may add to one file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+", encoding="utf-8") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        out.seek(0)
        counts = json.loads(out.read() or "{}")
        before = counts.get(name, dict.fromkeys(COUNTS, 0))
        new = zip(COUNTS, (inputs, taken, findings), strict=True)
        counts[name] = {key: before[key] + count for key, count in new}
        out.truncate(0)
        out.write(json.dumps(counts, indent=1, sort_keys=True) + "\n")


def table(file: Path) -> str:
    """The rows of a Markdown table, and one of all together."""
    counts = json.loads(file.read_text(encoding="utf-8"))
    counts["together"] = {key: sum(one[key] for one in counts.values()) for key in COUNTS}
    rows = [f"| {name} | " + " | ".join(f"{one[key]:,}" for key in COUNTS) + " |" for name, one in counts.items()]
    return "\n".join(["| target | inputs | taken | findings |", "| --- | --- | --- | --- |", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz.tally", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--add", nargs=4, metavar=("NAME", "INPUTS", "TAKEN", "FINDINGS"), help="add these counts")
    args = parser.parse_args()
    if args.add:
        add(args.file, args.add[0], *map(int, args.add[1:]))
    else:
        print(table(args.file))


if __name__ == "__main__":
    main()
