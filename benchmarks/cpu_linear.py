"""``python -m benchmarks.cpu_linear``: y = x W^T, ours against dense products and against every peer installed.

All contenders of a shape and a number of tokens M run interleaved in one run, with loops beside them that read memory
as fast as they can. Each answer is checked against the dense product of the contender's own weight before it is timed.
Copies of each weight take turns, so that no cache holds the next one. Shares of the read bandwidth count packed codes,
scales and zero points. Peers that are not installed are left out and named. ``HQQTENSOR_CPU=avx2`` forces our AVX2
kernels.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import aims, ours
from benchmarks.bandwidth import ReadLoops
from benchmarks.contender import Contender, NotHere, bound_and_checked
from benchmarks.linear_verdict import overhead, verdict
from benchmarks.peers import all_peers, aten
from benchmarks.timing import interleaved, machine, write_json
from hqqtensor.diagnostics.table import text_table

SHAPES = ["11008x4096", "4096x4096", "4096x11008"]
TOKENS = [1, 4, 16, 64, 128]
BITS = [8, 7, 6, 5, 4, 3, 2, 1]
Variant = tuple[int, list[str], dict[str, Any]]  # bits, dtypes of the activations, other settings


def variants(bits: list[int], quick: bool) -> list[Variant]:
    """Every setting of ours that is compared."""
    both = ["fp32", "bf16"]
    out: list[Variant] = [(nbits, both, {}) for nbits in bits]
    out += [(nbits, both, {"activation": "int8"}) for nbits in (8, 4, 2) if nbits in bits]
    if 4 not in bits:
        return out
    out += [(4, both, {"format": name}) for name in ("fp4", "nf4")]
    out += [(4, both, {"axis": 0})]
    if not quick:
        out += [(4, both, {"group_size": size}) for size in (32, 128)]
        out += [(4, both, {"group_size": size, "axis": 0}) for size in (32, 128)]
        meta = {"quant_scale": True, "quant_zero": True}
        out += [(4, both, meta), (4, both, {"group_size": 20, "meta_nbits": 4, **meta})]
    if not quick and 2 in bits:
        out += [(2, both, {"group_size": 16, "meta_nbits": 4, "quant_scale": True, "quant_zero": True})]
    return out


def make_contenders(w: torch.Tensor, bits: list[int], quick: bool) -> tuple[list[Contender], dict[str, str]]:
    """Dense products, peers, ours; and what is left out, with the reason."""
    found, missing = all_peers(w)
    found = [aten.dense(w, torch.float32), aten.dense(w, torch.bfloat16), *found]
    for nbits, dtypes, options in variants(bits, quick):
        try:
            found += ours.contenders(w, nbits, dtypes, **options)
        except NotHere as error:
            missing[ours.label(nbits, "/".join(dtypes), options)] = str(error)
    return found, missing


def run_shape(
    N: int, K: int, tokens: list[int], contenders: list[Contender], seconds: float, show: Callable[[dict], None]
) -> list[dict[str, Any]]:
    """A cell for each M: median milliseconds of every contender, and its share of the read bandwidth."""
    x = torch.randn(max(tokens), K)
    inputs = {M: x[:M].contiguous() for M in tokens}
    runs = {c.name: bound_and_checked(c, inputs) for c in contenders}
    loops = ReadLoops()
    cells = []
    for M in tokens:
        here = {**loops.runs, **{name: by_tokens[M] for name, by_tokens in runs.items()}}
        times = interleaved(here, rounds=41, seconds=seconds)
        bandwidth, loop = loops.bandwidth(times)
        rows = [
            {
                "name": c.name, "kind": c.kind, "bits": c.nbits, "computes in": c.precision, "bytes": c.nbytes,
                "ms": 1e3 * times[c.name], "of read bandwidth": c.nbytes / times[c.name] / bandwidth, "note": c.note,
            }
            for c in contenders
        ]  # fmt: skip
        cell = {"shape": [N, K], "M": M, "read GB/s": bandwidth / 1e9, "read loop": loop, "rows": rows}
        show(cell)
        cells.append(cell)
    return cells


def show_cell(cell: dict[str, Any]) -> None:
    """A table: ours first, each with its time, its ratio to ours at 4 bits, and its share of the read bandwidth."""
    N, K = cell["shape"]
    rows = sorted(cell["rows"], key=lambda r: ["ours", "peer", "dense"].index(r["kind"]))
    by_name = {r["name"]: r["ms"] for r in rows}
    unit = by_name.get("4-bit fp32", rows[0]["ms"])
    lines = [
        (
            r["name"],
            r["computes in"],
            f"{r['ms']:.3f}",
            f"{r['ms'] / unit:.2f}",
            f"{r['of read bandwidth']:.0%}",
            r["note"],
        )
        for r in rows
    ]
    print(f"\n{N}x{K}, M={cell['M']}, reading {cell['read GB/s']:.1f} GB/s ({cell['read loop']})")
    unit_name = "4-bit fp32" if "4-bit fp32" in by_name else rows[0]["name"]
    print(text_table(("", "computes in", "ms", f"x of {unit_name}", "of read bandwidth", ""), lines), flush=True)


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """Every shape in turn, then what it says about the aims."""
    cells: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for shape in args.shapes:
        N, K = map(int, shape.split("x"))
        w = torch.randn(N, K, generator=torch.manual_seed(0)) * 0.02
        contenders, missing = make_contenders(w, args.bits, args.quick)
        cells += run_shape(N, K, args.tokens, contenders, args.seconds, show_cell)
    for name, why in missing.items():
        print(f"left out: {name} ({why})")
    lines = [*verdict(cells), *overhead(min(3, args.seconds))]
    aims.show(lines)
    return {"cells": cells, "verdict": lines, "missing": missing}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE.png", help="needs matplotlib")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="M")
    parser.add_argument("--bits", nargs="+", type=int, default=BITS)
    parser.add_argument("--seconds", type=float, default=20, help="for each shape and M, at least three turns each")
    parser.add_argument("--quick", action="store_true", help="one shape, M = 1, 4 and 16, bits 8, 4 and 2, short turns")
    parser.add_argument("--full", action="store_true", help="M = 512 as well")
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) != parser.get_default(name) for name in ("shapes", "tokens", "bits", "seconds")}
    if args.quick:
        for name, value in (("shapes", SHAPES[:1]), ("tokens", [1, 4, 16]), ("bits", [8, 4, 2]), ("seconds", 5.0)):
            if not given[name]:
                setattr(args, name, value)
    if args.full and not given["tokens"]:
        args.tokens = [*TOKENS, 512]
    print(machine())
    with torch.no_grad():
        results = run_all(args)
    write_json(args.json, results)
    if args.plot:
        from benchmarks import plot

        plot.linear(results["cells"], args.plot)
    return results


if __name__ == "__main__":
    main()
