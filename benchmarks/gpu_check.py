"""Correctness and speed on a GPU, into one report: ``python -m benchmarks.gpu_check`` (``make gpu-check``).

Every operator is compared with the plain reference on the same device: all widths and formats, both axes, few and many
rows, ragged ends, experts, embeddings, and the solvers. Then ``benchmarks.gpu_linear`` times products. The report is
written in any case; the status is 1 where a result is out of bounds, 2 where there is no GPU.

Not yet run on a GPU: the project's machine has none. Its tests run the comparisons by Triton's interpreter.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hqqtensor.formats import get_format
from hqqtensor.ops import PackedWeight, reference
from hqqtensor.packing import pack, unpack

BOUNDS = {torch.float32: 2**-18, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of sum |x| span, a weight's span being its size before the zero point is taken off: the rounding of results and of
weights to 16 bits; for float32 three tf32 products and their sums."""


@dataclass(frozen=True)
class Case:
    """``error()`` gives the largest error as a share of its bound."""

    name: str
    error: Callable[[], float]


def weight(device: str, shape: tuple[int, ...], nbits: int, size: int, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, scales and zero points: packed ``[..., N, row_bytes]``."""
    generator = torch.Generator().manual_seed(nbits + shape[-1])
    *lead, N, K = shape
    groups = (*lead, N, -(-K // size)) if axis == 1 else (*lead, -(-N // size), K)
    codes = torch.randint(0, 2**nbits, shape, generator=generator, dtype=torch.uint8)
    scale = torch.rand(groups, generator=generator) + 0.1
    zero = torch.rand(groups, generator=generator) * (2**nbits - 1)
    return pack(codes, nbits).to(device), scale.half().to(device), zero.half().to(device)


def share(got: Tensor, x: Tensor, dense: Tensor, span: Tensor) -> float:
    want = x.double() @ dense.double().mT
    size = (x.double().abs() @ span.double().mT).clamp(min=1e-30)
    return ((got.double() - want).abs() / size).max().item() / BOUNDS[x.dtype]


def product(device: str, nbits: int, format: str, size: int, axis: int, M: int, K: int, dtype: torch.dtype) -> float:
    from hqqtensor.kernels.triton import launch

    q, scale, zero = weight(device, (96, K), nbits, size, axis)
    has_zero = get_format(format).has_zero_point
    w = PackedWeight(q, scale, zero if has_zero else None, None, nbits, format, size, axis, K)
    dense = reference.dequantize(w, torch.float32)
    span = dense.abs()
    if has_zero:
        span = span + reference.expand_groups((scale * zero).float(), 96, K, size, axis)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype).to(device)
    got = launch.linear(x, w, None, None, "float")
    return share(got, x, dense, span)


def experts(device: str, nbits: int, grouped: bool) -> float:
    from hqqtensor.kernels.triton import launch

    w = PackedWeight(*weight(device, (3, 96, 256), nbits, 64, 1), None, nbits, "int", 64, 1, 256)
    x = torch.randn(3, 20, 256, generator=torch.Generator().manual_seed(1)).half().to(device)
    if grouped:
        ends = torch.tensor([7, 7, 52], dtype=torch.int32, device=device)
        args = (x.flatten(0, 1), ends, w, None, "float")
        got, want = launch.grouped_linear(*args), reference.grouped_linear(*args)
    else:
        args = (x, w, None, "float")
        got, want = launch.batched_linear(*args), reference.batched_linear(*args)
    return ((got - want).abs().max() / want.abs().max()).item() / BOUNDS[torch.float16]


def dense(device: str, nbits: int, axis: int, K: int, rows: bool) -> float:
    """0 where every number is the reference's to the bit, else infinity."""
    from hqqtensor.kernels.triton import launch

    args = (PackedWeight(*weight(device, (37, K), nbits, 8, axis), None, nbits, "int", 8, axis, K), torch.float16)
    if rows:
        indices = torch.tensor([[3, 36], [0, 3]], device=device)
        got = launch.embedding(indices, *args)
        want = reference.embedding(indices, *args)
    else:
        got, want = launch.dequantize(*args), reference.dequantize(*args)
    return 0.0 if torch.equal(got, want) else float("inf")


def quantized(device: str, nbits: int, axis: int, solver: str) -> float:
    """Square error beyond that of the plain solver, as a share of 1 %; packed codes must be the nearest."""
    from hqqtensor.config import HqqConfig
    from hqqtensor.encode import solve_matrix
    from hqqtensor.kernels.triton import launch
    from hqqtensor.ops import backend

    N, K, size = 40, 136, 32
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(5)).to(device)
    with backend("reference"):
        plain = solve_matrix(w, size, HqqConfig(nbits, size, axis=axis, solver=solver))
    assert plain.zero_point is not None
    errors = []
    for inverse, zero in (launch.solve(w, nbits, size, axis, solver), (plain.inverse_scale, plain.zero_point)):
        inv, z = (reference.expand_groups(t, N, K, size, axis) for t in (inverse, zero))
        codes = (w * inv + z).round().clamp(0, 2**nbits - 1)
        errors.append(((codes - z) / inv - w).double().square().sum().item())
        out = pack(torch.zeros_like(codes, dtype=torch.uint8), nbits)
        launch.assign(out, w, inverse, zero, nbits, size, axis)
        if (unpack(out, nbits, K) != codes).double().mean() > 0.001:  # weights between two codes
            return float("inf")
    return max(0.0, errors[0] / errors[1] - 1) / 0.01


def cases(device: str) -> Iterator[Case]:
    for nbits in range(1, 9):
        for dtype in BOUNDS:
            for M, K, size, axis in ((1, 512, 64, 1), (12, 512, 128, 1), (70, 512, 32, 1), (300, 328, 64, 1),
                                     (3, 328, 48, 1), (5, 256, 32, 0), (130, 256, 32, 0)):  # fmt: skip
                about = (nbits, "int", size, axis, M, K, dtype)
                name = f"linear int{nbits} g{size} axis{axis} M={M} K={K} {str(dtype)[6:]}"
                yield Case(name, lambda about=about: product(device, *about))
        for grouped in (False, True):
            yield Case(f"experts int{nbits} grouped={grouped}", lambda n=nbits, g=grouped: experts(device, n, g))
        for axis in (0, 1):
            for K in (128, 200):
                for rows in (False, True):
                    about = (nbits, axis, K, rows)
                    name = f"{'embedding' if rows else 'dequantize'} int{nbits} axis{axis} K={K}"
                    yield Case(name, lambda about=about: dense(device, *about))
            for solver in ("rtn", "hqq_joint"):
                about = (nbits, axis, solver)
                yield Case(f"{solver} int{nbits} axis{axis}", lambda about=about: quantized(device, *about))
    for name, nbits in (("fp4", 4), ("fp6", 6), ("nf4", 4)):
        for M in (1, 130):
            about = (nbits, name, 64, 1, M, 512, torch.bfloat16)
            yield Case(f"linear {name} M={M}", lambda about=about: product(device, *about))


def correctness(found: Iterator[Case]) -> tuple[list[str], bool]:
    """Lines of the report, and whether every result is within bounds; a kernel that fails is out of them."""
    bad, count, worst = [], 0, 0.0
    for case in found:
        count += 1
        try:
            error = case.error()
        except Exception as problem:  # one kernel that does not compile must not hide the others
            bad.append(f"- {case.name}: {type(problem).__name__}: {str(problem)[:200]}")
            continue
        worst = max(worst, error)
        if not error <= 1:
            bad.append(f"- {case.name}: {error:.2f} of its bound")
    lines = [
        "# Correctness",
        "",
        f"{count} comparisons with the plain reference, {len(bad)} out of bounds; the largest",
    ]
    lines += [f"error of those that ran is {worst:.2f} of its bound.", "", *bad, ""]
    return lines, not bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("gpu-report.md"), help="where the report goes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu_check needs a CUDA or HIP device; there is none here, so nothing was run", file=sys.stderr
        )
        return 2
    from benchmarks import gpu_linear

    lines, good = correctness(cases("cuda"))
    args.report.write_text("\n".join(lines) + "\n")
    timed, within = gpu_linear.measure(gpu_linear.ROWS)
    text = "\n".join([*lines, *timed]) + "\n"
    args.report.write_text(text)
    print(text)
    return 0 if good and within else 1


if __name__ == "__main__":
    sys.exit(main())
