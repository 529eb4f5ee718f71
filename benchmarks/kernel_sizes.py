"""``python -m benchmarks.kernel_sizes``: bytes of the CPU kernels' machine code by function, for each instruction set.

It reads the objects of the last build (``build/objects-*/SET/target.o``) with ``nm``. All instances of a template are
one row: what compiling it for several widths, formats and scales costs. A function that was inlined counts where it
went.
"""

import argparse
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

SETS = ["amx", "avx512", "avx2", "portable"]
ROOT = Path(__file__).resolve().parents[1]


def function_of(symbol: str) -> str:
    """``RowMeta::from_codes`` of ``void hqqtensor::(anonymous namespace)::RowMeta::from_codes<true, false>(...)``."""
    name = symbol.replace("hqqtensor::", "").replace("(anonymous namespace)::", "")
    return re.split(r"[<(\[]", name)[0].split()[-1]


def sizes(target: Path) -> tuple[Counter[str], Counter[str]]:
    """Bytes and instances of each function in an object file."""
    text = subprocess.run(["nm", "-S", "-C", str(target)], capture_output=True, text=True, check=True).stdout
    nbytes: Counter[str] = Counter()
    instances: Counter[str] = Counter()
    for line in text.splitlines():
        match = re.fullmatch(r"[0-9a-f]+ ([0-9a-f]+) [tTwW] (.+)", line)
        if match is None:
            continue
        function = function_of(match[2])
        nbytes[function] += int(match[1], 16)
        instances[function] += " [clone " not in match[2]  # parts that were split off are no instances
    return nbytes, instances


def main(argv: list[str] | None = None) -> dict[str, dict[str, list[int]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=Path, default=ROOT / "build" / "objects-c++", metavar="DIR")
    parser.add_argument("--rows", type=int, default=20, help="functions to show of each set (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="all functions: {set: {function: [bytes, instances]}}")
    args = parser.parse_args(argv)
    targets = {name: args.objects / name / "target.o" for name in SETS}
    missing = [str(path) for path in targets.values() if not path.exists()]
    if missing:
        parser.error(f"no {missing[0]}: build the kernels first (python setup.py build_kernels)")
    found = {}
    for name, target in targets.items():
        nbytes, instances = sizes(target)
        found[name] = {function: [size, instances[function]] for function, size in nbytes.most_common()}
        print(f"{name}: {sum(nbytes.values()):,} bytes")
        for function, size in nbytes.most_common(args.rows):
            print(f"  {size:>9,} {instances[function]:>4} x {function}")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
