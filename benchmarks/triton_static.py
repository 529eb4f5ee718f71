"""What the Triton kernels compile to, for GPUs that are not there: ``python -m benchmarks.triton_static``.

For each architecture, width and tile that is shipped: registers, spills, shared memory, instructions per 16 weights of
the main loop, width of global loads, tensor-core instruction, occupancy, and the time that a roofline of memory,
instruction issue and tensor cores allows at M = 1, 16, 128 for an 11008 x 4096 weight. gemlite's kernels are compiled
the same way where it is installed. Results are kept by the hash of what was compiled (``--results``), so a run that was
cut off goes on where it was, and targets can be run one by one. Ends with status 1 where a kernel spills, loads packed
codes narrower than it can, multiplies without tensor cores, decodes at more instructions a weight than gemlite, or 3
bits at more than the mean of 2 and 4. These are the compiler's figures and estimates: nothing runs.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton.language as tl

from benchmarks import static_gemlite
from benchmarks.static_compile import LIMITS, Compiled, compile_kernel, keep_results
from hqqtensor.kernels.triton.config import (
    SOLVE_TILE,
    SUMS_UP_TO,
    TARGETS,
    Device,
    Plan,
    Problem,
    options,
    options_dense,
    plan,
    plan_dense,
    shipped,
)
from hqqtensor.kernels.triton.dequantize import dequantize_kernel
from hqqtensor.kernels.triton.launch import decoder_of, decoding_constants, pair_of, precision
from hqqtensor.kernels.triton.linear import linear_kernel
from hqqtensor.kernels.triton.solve import assign_kernel, solve_kernel
from hqqtensor.packing import PLANES, row_bytes

N, K, GROUP = 11008, 4096, 64
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DOTS = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}
KINDS = ("int", "float", "table")
MANTISSA = {4: 1, 6: 2, 8: 3}
"""Mantissa bits of the small floats by width."""
META = ("scale_scale", "scale_zero", "zero_scale", "zero_zero")


@dataclass(frozen=True)
class Variant:
    """A product kernel to compile: M rows of x of a dtype, and what the weight is like."""

    arch: str
    M: int
    nbits: int
    dtype: str = "fp16"
    kind: int = 0
    group: int = GROUP
    axis: int = 1
    meta: int = 0  # bits of quantized scales and zero points

    @property
    def problem(self) -> Problem:
        about = (self.nbits, self.group, self.axis, DTYPES[self.dtype].itemsize, self.kind == 2)
        return Problem(self.M, N, K, 1, *about, self.metas)

    @property
    def metas(self) -> tuple[int, int]:
        return self.meta, self.meta if self.kind == 0 else 0

    @property
    def plan(self) -> Plan:
        return plan(self.problem, Device(self.arch, LIMITS[self.arch].processors))

    def __str__(self) -> str:
        tile = self.plan.tile
        return (
            f"{self.arch:7s} {KINDS[self.kind]}{self.nbits} g{self.group} axis{self.axis} {self.dtype} "
            f"{f'meta{self.meta} ' if self.meta else ''}M={self.M:<4d}"
            f"{tile.block_n}x{tile.block_m} w{tile.warps} u{tile.unroll} s{tile.stages} k{tile.split_k}"
        )


def compile_linear(variant: Variant) -> Compiled:
    chosen, tile = variant.plan, variant.plan.tile
    device = Device(variant.arch, LIMITS[variant.arch].processors)
    about = (device, variant.kind, variant.nbits, DTYPES[variant.dtype], chosen)
    pair = pair_of(*about)
    constants = {
        "NBITS": variant.nbits, "KIND": variant.kind, "MANTISSA": MANTISSA.get(variant.nbits, 0),
        "PER_ROW": False, "GROUP": variant.group, "AXIS": variant.axis, "HAS_ZERO": variant.kind == 0,
        "META_SCALE": variant.metas[0], "META_ZERO": variant.metas[1], "HAS_BIAS": False,
        "HAS_PRE": False, "EXPERTS": 0, "RAGGED": False, "DOT": DOTS[variant.dtype], "PAIR": pair,
        "PRECISION": precision(device), "SCALE": chosen.scale,
        "SPLIT_K": tile.split_k, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "WIDTH": chosen.width,
        "RUN": chosen.run, "UNROLL": tile.unroll, "STAGES": tile.stages,
        **decoding_constants(decoder_of(*about, pair)),
    }  # fmt: skip
    types = {p.name: "i32" for p in linear_kernel.params}
    types |= {name: f"*{variant.dtype}" for name in ("x", "bias", "pre", "out")}
    types |= dict.fromkeys(("scale", "zero"), "*u8" if variant.meta else "*fp16")
    types |= {"qdata": "*u8", "shifts": "*u8", "table": "*fp32", "partial": "*fp32"} | dict.fromkeys(
        ("arrived", "offsets"), "*i32"
    )
    types |= dict.fromkeys(META, "*fp32")
    return compile_kernel(
        linear_kernel, types, constants, variant.arch, options(tile, variant.arch), ("N", "K", "row_bytes", "columns")
    )


def weights_a_turn(variant: Variant) -> float:
    """Weights that a thread decodes in a turn of the loop."""
    tile = variant.plan.tile
    return tile.block_n * 128 * tile.unroll / (tile.warps * LIMITS[variant.arch].warp)


def wide_loads_expected(variant: Variant) -> int:
    """128-bit loads a thread and turn that the packed bytes of the tile come to, planes of fewer bits counted as often
    as their bytes repeat."""
    chosen, tile = variant.plan, variant.plan.tile
    bytes_a_tile = tile.block_n * chosen.width
    threads = tile.warps * LIMITS[variant.arch].warp
    whole = 16 * max(2, PLANES[variant.nbits][0])
    tiles = whole // chosen.width * tile.unroll * len(PLANES[variant.nbits])
    return tiles * (bytes_a_tile // (16 * threads))


def problems(variant: Variant, found: Compiled) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    out = [f"{found.spills} spills"] if found.spills else []
    wide, expected = found.global_loads().get(128, 0), wide_loads_expected(variant)
    if wide < expected:
        out.append(f"{wide} loads of 128 bits where packed codes alone need {expected}: {found.global_loads()}")
    limit = LIMITS[variant.arch].shared - (0 if variant.arch.startswith("gfx") else 1024)
    if found.shared > limit:
        out.append(f"{found.shared} bytes of shared memory, a block can have {limit}")
    if not found.tensor_instruction():
        out.append("no tensor-core instruction")
    return out


def roofline(variant: Variant, per_weight: float) -> tuple[float, str]:
    """Seconds that the slowest of memory, instruction issue and tensor cores needs, and which of them it is."""
    limits, tile = LIMITS[variant.arch], variant.plan.tile
    size = DTYPES[variant.dtype].itemsize
    scales = N * (K // GROUP) * 2 * (variant.meta or 16) // 8
    read = N * row_bytes(K, variant.nbits) + scales + variant.M * (K + N) * size
    passes = -(-variant.M // tile.block_m)
    issue = N * K * passes * per_weight / limits.warp / (limits.processors * limits.issue * limits.clock)
    tensor = 2.0 * N * K * passes * tile.block_m / limits.tensor
    return max((read / limits.bandwidth, "memory"), (issue, "issue"), (tensor, "tensor"))


def fp16_time(arch: str, M: int) -> float:
    """The same roofline for a dense float16 weight."""
    limits = LIMITS[arch]
    return max((2 * (N * K + M * (N + K))) / limits.bandwidth, 2.0 * M * N * K / limits.tensor)


def variants(arch: str, quick: bool, bits: list[int]) -> Iterator[Variant]:
    rows = sorted(shipped(arch))[:-1]
    for nbits in bits:
        for dtype in ("fp16", "bf16"):
            for M in sorted({1, *(r for r in rows if r > 8), SUMS_UP_TO, 128}):
                if not quick or (M in (1, 16, 128) and dtype == "fp16"):
                    yield Variant(arch, M, nbits, dtype)
    if quick:
        return
    if 4 in bits:
        yield Variant(arch, SUMS_UP_TO, 4, "fp32")
    yield from (Variant(arch, SUMS_UP_TO, nbits, axis=0) for nbits in bits)
    for M in (1, SUMS_UP_TO):
        yield from (Variant(arch, M, nbits, meta=4) for nbits in (2, 3, 4) if nbits in bits)
        if 2 in bits:
            yield Variant(arch, M, 2, group=16, meta=4)
    for M in (1, 128):
        if 4 in bits:
            yield from (Variant(arch, M, 4, "fp32"), Variant(arch, M, 4, group=32), Variant(arch, M, 4, group=16))
        for nbits in bits:
            yield Variant(arch, M, nbits, group=128)
            yield Variant(arch, M, nbits, axis=0)
        for nbits, kind in ((4, 1), (6, 1), (8, 1), (4, 2), (3, 2), (2, 2), (1, 2)):
            if nbits in bits:
                yield Variant(arch, M, nbits, "bf16", kind)


def check_linear(arch: str, quick: bool, bits: list[int]) -> tuple[list[str], dict[tuple[int, str], float]]:
    """Print a line a variant; give the failures, and the instructions a weight at M = 1 by width and dtype."""
    failures, cost = [], {}
    print(
        f"\n{arch} ({LIMITS[arch].device}); weight {N}x{K}, group {GROUP}; "
        "BLOCK_N x BLOCK_M, warps, unroll, stages, split-K"
    )
    print(f"{'':70s} regs spill  smem  per16  loads (bits: number)           occ   estimate   x fp16  product")
    for variant in variants(arch, quick, bits):
        found = compile_linear(variant)
        per_weight = found.instructions / weights_a_turn(variant)
        seconds, bound = roofline(variant, per_weight)
        if variant == Variant(arch, 1, variant.nbits, variant.dtype):
            cost[variant.nbits, variant.dtype] = per_weight
        print(
            f"{variant!s:70s} {found.registers:4d} {found.spills:5d} {found.shared:6d} "
            f"{per_weight * 16:5.1f}  {loads(found):28s} "
            f"{found.occupancy(arch, variant.plan.tile.warps):4.0%} {seconds * 1e6:6.1f} us {bound:6s} "
            f"{fp16_time(arch, variant.M) / seconds:4.2f}  {found.tensor_instruction()}",
            flush=True,
        )
        failures += [f"{variant}: {text}" for text in problems(variant, found)]
    return failures, cost


def others(arch: str, bits: list[int]) -> Iterator[tuple[str, Compiled]]:
    """The kernels without a product, by name: dequantize, embedding, the solvers, packing."""
    sizes = "R N K row_bytes columns scale_rows scale_meta_rows zero_meta_rows blocks rows groups size"
    scalars = dict.fromkeys(sizes.split(), "i32")
    pointers = {"indices": "*i64", "qdata": "*u8", "shifts": "*u8", "table": "*fp32", "out": "*bf16"}
    pointers |= {"scale": "*fp16", "zero": "*fp16"} | dict.fromkeys(META, "*fp32")
    solver_types = scalars | dict.fromkeys(("matrix", "inverse", "zero"), "*fp32")
    options = options_dense(arch)
    for nbits in bits:
        formats = [(0, 1), (0, 0)] + [(1, 1)] * (nbits in (4, 6, 8)) + [(2, 1)] * (nbits <= 4)
        for kind, axis in formats:
            dense = plan_dense(nbits, GROUP, axis, LIMITS[arch].warp)
            constants = {
                "NBITS": nbits, "KIND": kind, "MANTISSA": MANTISSA.get(nbits, 0), "PER_ROW": False, "GROUP": GROUP,
                "AXIS": axis, "HAS_ZERO": kind == 0, "META_SCALE": False, "META_ZERO": False,
                "ROW_SCALES": dense.row_scales, "WIDTH": dense.width, "BLOCK_R": dense.rows,
            }  # fmt: skip
            for name, indices in (("dequantize", False), ("embedding", True)):
                if indices and (kind, axis) != (0, 1):
                    continue
                chosen = {**constants, "HAS_INDICES": indices}
                aligned = ("N", "K", "row_bytes", "columns")
                found = compile_kernel(dequantize_kernel, scalars | pointers, chosen, arch, options, aligned, True)
                yield f"{name} {KINDS[kind]}{nbits} axis{axis}", found
        for axis in (1, 0):
            for joint in (False, True):
                constants = {"NBITS": nbits, "JOINT": joint, "AXIS": axis, "MEMBERS": GROUP}
                constants["BLOCK_G"] = SOLVE_TILE // GROUP
                found = compile_kernel(solve_kernel, solver_types, constants, arch, options, ("N", "K"))
                yield f"{'hqq_joint' if joint else 'rtn'} int{nbits} axis{axis}", found
            constants = {"NBITS": nbits, "GROUP": GROUP, "AXIS": axis, "BLOCK_R": 16}
            types = solver_types | {"out": "*u8"}
            found = compile_kernel(assign_kernel, types, constants, arch, options, ("N", "K", "row_bytes"))
            yield f"assign int{nbits} axis{axis}", found


def check_others(arch: str, bits: list[int]) -> list[str]:
    failures = []
    print(f"\n{'':30s} regs spill  smem  loads (bits: number)")
    for name, found in others(arch, bits):
        print(
            f"{arch:7s} {name:22s} {found.registers:5d} {found.spills:5d} {found.shared:6d}  {loads(found)}", flush=True
        )
        if found.spills:
            failures.append(f"{arch} {name}: {found.spills} spills")
        if name.startswith(("dequantize", "embedding")) and not found.global_loads().get(128):
            failures.append(f"{arch} {name}: no loads of 128 bits")
    return failures


def loads(found: Compiled) -> str:
    return " ".join(f"{bits}:{n}" for bits, n in sorted(found.global_loads().items(), reverse=True))


def compare(arch: str, cost: dict[tuple[int, str], float]) -> list[str]:
    """Instructions a weight at M = 1 beside gemlite's, and beside the widths between which 3 bits lie."""
    failures = []
    print(f"\n{arch}: instructions a weight at M=1 (float16)")
    reason = static_gemlite.why_missing()
    for nbits in (8, 4, 3, 2, 1):
        if (nbits, "fp16") not in cost or (nbits == 3 and not {(2, "fp16"), (4, "fp16")} <= cost.keys()):
            continue
        ours = cost[nbits, "fp16"]
        if nbits == 3:
            mean = (cost[2, "fp16"] + cost[4, "fp16"]) / 2
            print(f"  3 bits: {ours:.2f}; mean of 2 and 4 bits {mean:.2f}; gemlite has no 3 bits")
            if ours > mean:
                failures.append(f"{arch} 3 bits: {ours:.2f} instructions a weight, the mean of 2 and 4 {mean:.2f}")
        elif reason:
            print(f"  {nbits} bits: {ours:.2f}; {reason}")
        else:
            theirs = static_gemlite.gemv_cost(nbits, arch)
            print(f"  {nbits} bits: {ours:.2f}; gemlite {theirs:.2f}")
            if ours > theirs:
                failures.append(f"{arch} {nbits} bits: {ours:.2f} instructions a weight, gemlite {theirs:.2f}")
    for nbits in (8, 4, 2, 1) if reason is None else ():
        if (nbits, "fp16") not in cost:
            continue
        for rows in (16, 128):
            found, weights, warps = static_gemlite.gemm(nbits, arch, rows)
            print(
                f"  gemlite M={rows:<3d} {nbits} bits: per16 {found.instructions / weights * 16:.1f}, "
                f"regs {found.registers}, "
                f"spills {found.spills}, smem {found.shared}, loads {found.global_loads()}, "
                f"occ {found.occupancy(arch, warps):.0%}, {found.tensor_instruction()}"
            )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--quick", action="store_true", help="float16 at M = 1, 16, 128 only")
    parser.add_argument("--bits", type=int, nargs="+", choices=range(1, 9), default=list(range(1, 9)))
    parser.add_argument("--results", type=Path, default=Path("build/triton_static.json"), help="where results are kept")
    args = parser.parse_args()
    keep_results(args.results)
    failures: list[str] = []
    for arch in args.arch:
        found, cost = check_linear(arch, args.quick, args.bits)
        failures += found + check_others(arch, args.bits) + compare(arch, cost)
    print(f"\nfew rows of x: M <= {SUMS_UP_TO}. Estimates are upper bounds of speed, not measurements.")
    for failure in failures:
        print("FAIL", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
