"""``python -m benchmarks.cpu_quantize``: weights a second of each solver, packed codes included, and their error."""

import argparse
from typing import Any

import torch

from benchmarks.timing import interleaved, machine, write_json
from hqqtensor import HqqConfig, HQQTensor, backend
from hqqtensor.diagnostics.table import text_table


def measure(nbits: int, dtype: torch.dtype, with_plain: bool) -> list[dict[str, Any]]:
    """rtn and hqq_joint in C++ on a 4096x4096 matrix, and the plain solvers beside them."""
    w = (torch.randn(4096, 4096, generator=torch.manual_seed(0)) * 0.02).to(dtype)
    small = w[:512]
    power = w.float().square().sum().item()
    rows, runs = [], {}
    for solver in ("rtn", "hqq_joint"):
        config = HqqConfig(nbits, 64, solver=solver)
        runs[solver] = lambda config=config: HQQTensor.from_hp(w, config)
    times = interleaved(runs, rounds=9, seconds=8)
    for solver, seconds in times.items():
        q = HQQTensor.from_hp(w, HqqConfig(nbits, 64, solver=solver))
        error = (q.dequantize(torch.float32) - w.float()).square().sum().item() / power
        row: dict[str, Any] = {"solver": solver, "bits": nbits, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"M weights/s": w.numel() / seconds / 1e6, "error": error, "plain M weights/s": float("nan")}
        row["plain error"] = float("nan")
        if with_plain:
            with backend("dequantize"):
                plain = {"plain": lambda s=solver: HQQTensor.from_hp(small, HqqConfig(nbits, 64, solver=s))}
                row["plain M weights/s"] = small.numel() / interleaved(plain, rounds=3)["plain"] / 1e6
                p = HQQTensor.from_hp(w, HqqConfig(nbits, 64, solver=solver)).dequantize(torch.float32)
            row["plain error"] = (p - w.float()).square().sum().item() / power
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2])
    args = parser.parse_args()
    print(machine())
    rows = [r for nbits in args.bits for r in measure(nbits, torch.float32, True)]
    rows += measure(4, torch.bfloat16, False)
    print(
        text_table(list(rows[0]), [[f"{v:.5g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows])
    )
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
