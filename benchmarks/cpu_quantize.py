"""``python -m benchmarks.cpu_quantize``: weights a second of each solver, packing included, error, memory.

The solvers of one matrix run interleaved. Before anything is timed each result is checked: its error must be that of
the plain torch path, and its bits must not depend on the number of threads. The hqq library, the plain path and
whatever is as slow quantize a slice, and their speed is scaled.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import aims
from benchmarks.contender import NotHere, WrongAnswer
from benchmarks.memory import peak_over
from benchmarks.peers import hqq_solver
from benchmarks.timing import interleaved, machine, write_json
from hqqtensor import HqqConfig, HQQTensor, backend
from hqqtensor.diagnostics.table import text_table

GROUP = 64
SOLVERS = ["rtn", "hqq", "hqq_joint"]
FORMATS = {"fp4": 4, "nf4": 4, "fp6": 6, "fp8": 8, "codebook": 4}  # solved by hqq_joint, on the first matrix
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SLICE = 256  # rows for the plain path and the hqq library
SLOW = 8e6  # weights a second; what is slower is timed on the slice as well
SLACK = 1.002  # errors of two ways to compute the same solver may differ by this


def relative_error(dequantized: Tensor, w: Tensor) -> float:
    """Squared error in units of the weights' own squares."""
    return ((dequantized.float() - w.float()).square().sum() / w.float().square().sum()).item()


def check(w: Tensor, config: HqqConfig) -> tuple[float, float]:
    """Relative squared error of ``w``, ours and the plain path's. WrongAnswer if ours is off or depends on threads."""
    q = HQQTensor.from_hp(w, config)
    with backend("reference"):
        plain = relative_error(HQQTensor.from_hp(w, config).dequantize(torch.float32), w)
        error = relative_error(q.dequantize(torch.float32), w)
    if not error <= plain * SLACK:
        raise WrongAnswer(f"{_name(config)}: error {error:.6f}, the plain path has {plain:.6f}")
    threads = torch.get_num_threads()
    try:
        for other in {1, 2, 3} - {threads}:
            torch.set_num_threads(other)
            again = HQQTensor.from_hp(w, config)
            if not torch.equal(q, again):
                raise WrongAnswer(f"{_name(config)}: {threads} and {other} threads differ")
    finally:
        torch.set_num_threads(threads)
    return error, plain


def _name(config: HqqConfig) -> str:
    return f"{config.solver}, {config.format}, {config.nbits} bits"


def measure(
    N: int, K: int, nbits: int, dtype: str, formats: dict[str, int], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each solver and each of ``formats`` on one matrix, and one for the hqq library."""
    w = (torch.randn(N, K, generator=torch.manual_seed(0)) * 0.02).to(DTYPES[dtype])
    small = w[: min(SLICE, N)]
    configs = {solver: HqqConfig(nbits, GROUP, solver=solver) for solver in args.solvers}
    configs |= {f"hqq_joint {name}": HqqConfig(width, GROUP, format=name) for name, width in formats.items()}
    checked = {solver: check(small, config) for solver, config in configs.items()}
    taken = {solver: w if _rate(small, config) > SLOW else small for solver, config in configs.items()}
    runs = {solver: lambda t=taken[solver], c=config: HQQTensor.from_hp(t, c) for solver, config in configs.items()}
    plain = dtype == "fp32" and args.plain
    if plain:
        runs |= {f"plain {solver}": lambda c=config: _plain(small, c) for solver, config in configs.items()}
    base: dict[str, Any] = {"shape": [N, K], "bits": nbits, "dtype": dtype}
    library_error = float("nan")
    try:
        library, dequantized = hqq_solver.solver(small, nbits, GROUP)
        library_error = relative_error(dequantized(), small)
        runs["hqq library"] = library
    except (NotHere, AssertionError, KeyError) as why:  # the library has no 7 or 5 bits
        print(f"left out: the hqq library at {nbits} bits, {dtype} ({why!r})")
    times = interleaved(runs, rounds=15, seconds=args.seconds)
    rows = []
    for solver, seconds in times.items():
        name = solver.removeprefix("plain ")
        error = library_error if solver == "hqq library" else checked[name][solver != name]
        row = {**base, "solver": solver, "error": error}
        if name in configs:
            row["bits"] = configs[name].nbits
        row["M weights/s"] = taken.get(solver, small).numel() / seconds / 1e6
        row["peak MiB over weights and output"] = None
        if taken.get(solver) is w and (over := peak_over(runs[solver])) is not None:
            row["peak MiB over weights and output"] = (over - HQQTensor.from_hp(w, configs[solver]).nbytes) / 2**20
        rows.append(row)
    return rows


def _rate(w: Tensor, config: HqqConfig) -> float:
    """Weights a second, roughly."""
    started = time.perf_counter()
    HQQTensor.from_hp(w, config)
    return w.numel() / (time.perf_counter() - started)


def _plain(w: Tensor, config: HqqConfig) -> HQQTensor:
    with backend("reference"):
        return HQQTensor.from_hp(w, config)


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The aims for solvers at 4 bits, groups of 64, on every dtype and shape; and for their memory."""
    lines = []
    library = {str((r["shape"], r["dtype"], r["bits"])): r["error"] for r in rows if r["solver"] == "hqq library"}
    for row in rows:
        theirs = library.get(str((row["shape"], row["dtype"], row["bits"])))
        where = f"{row['shape'][0]}x{row['shape'][1]} {row['dtype']}, {row['bits']} bits"
        table = row["solver"].startswith("hqq_joint ")
        wanted = 50 if table else {"rtn": 1000, "hqq_joint": 100}.get(row["solver"])
        if wanted and (table or row["bits"] == 4):
            speed = row["M weights/s"]
            text = f"{row['solver']}, {where}: >= {wanted} M weights a second"
            lines.append(aims.aim(text, f"{speed:.0f}", speed >= wanted))
        if row["solver"] == "hqq" and theirs:
            text = f"hqq, {where}: the hqq library's error within 1 %"
            lines.append(aims.aim(text, f"{row['error'] / theirs:.4f} x", abs(row["error"] / theirs - 1) <= 0.01))
        peak = row["peak MiB over weights and output"]
        if peak is not None:
            text = f"{row['solver']}, {where}: peak <= weights + output + 64 MiB"
            lines.append(aims.aim(text, f"{peak:.0f} MiB", peak <= 64))
    return lines


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE.png", help="needs matplotlib")
    parser.add_argument("--shapes", nargs="+", default=["11008x4096", "4096x4096"], metavar="NxK")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--solvers", nargs="+", default=SOLVERS, choices=SOLVERS)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--seconds", type=float, default=6, help="for each matrix, at least three runs of every solver")
    parser.add_argument("--no-plain", dest="plain", action="store_false", help="leave out the plain torch path")
    args = parser.parse_args(argv)
    print(machine())
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        N, K = map(int, shape.split("x"))
        for dtype in args.dtypes:
            # Other widths than 4 on the first shape and dtype alone: they take the same code.
            first = shape == args.shapes[0] and dtype == args.dtypes[0]
            for nbits in args.bits if first else [b for b in args.bits if b == 4]:
                formats = {name: FORMATS[name] for name in args.formats} if first and nbits == 4 else {}
                rows += measure(N, K, nbits, dtype, formats, args)
    cells = []
    for row in rows:
        peak = row["peak MiB over weights and output"]
        N, K = row["shape"]
        cells.append(
            (
                row["solver"],
                f"{N}x{K}",
                row["dtype"],
                str(row["bits"]),
                f"{row['M weights/s']:.1f}",
                f"{row['error']:.5f}",
                "" if peak is None else f"{peak:.0f}",
            )
        )
    print(
        text_table(("solver", "shape", "dtype", "bits", "M weights/s", "error", "MiB over weights and output"), cells)
    )
    lines = verdict(rows)
    aims.show(lines)
    results = {"rows": rows, "verdict": lines}
    write_json(args.json, results)
    if args.plot:
        from benchmarks import plot

        plot.quantize(rows, args.plot)
    return results


if __name__ == "__main__":
    main()
