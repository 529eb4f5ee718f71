"""y = x W^T with packed W: one kernel, tiled as GEMV (few rows of x), split-K GEMM or GEMM by its constants.

The product is taken as W x^T: weights are the left operand of the tensor cores' instructions, which Hopper reads from
registers, where they were just decoded. Three ways of scaling (SCALE):

- GROUP_SUMS: dot of the codes themselves (exact in 16 bits), scaled once a group in float32. For few rows of x.
- ROWS: weights rounded to x's dtype, one scale a row of the tile. For many rows of x.
- ELEMENTS: the same with a scale looked up for each weight: axis 0, and groups that no tile fits.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108

import triton
import triton.language as tl

from hqqtensor.kernels.triton.decode import (
    alike,
    alike_columns,
    byte,
    code,
    everywhere,
    gather_codes,
    group_value,
    load_planes,
    narrowed,
    number,
    positions,
    spread,
    stride,
    to_expert,
    value,
)

GROUP_SUMS, ROWS, ELEMENTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_x(x, pre, rm, k, K, mask, DOT: tl.constexpr, HAS_PRE: tl.constexpr, MASKED: tl.constexpr):
    """Activations ``[k, m]`` (K by rows) as DOT, times ``act_pre_scale``."""
    pointers = x + rm[None, :].to(tl.int64) * K + k[:, None]
    if MASKED:
        out = tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        out = tl.load(pointers)
    if HAS_PRE:
        # Columns that are masked hold zeros already; the last entry stands in for those past the end.
        out = out.to(tl.float32) * tl.load(pre + tl.minimum(k, K - 1)).to(tl.float32)[:, None]
    return out.to(DOT)


@triton.jit
def load_pairs(x, pre, rm, pair, K, DOT: tl.constexpr, HAS_PRE: tl.constexpr):
    """Activations of columns 2 ``pair``, and of those after them: two tiles as of ``load_x``."""
    words = tl.load((x + rm.to(tl.int64) * K).to(tl.pointer_type(tl.uint32))[None, :] + pair[:, None])
    low = words.to(tl.uint16).to(x.dtype.element_ty, bitcast=True)
    high = (words >> 16).to(tl.uint16).to(x.dtype.element_ty, bitcast=True)
    k = 2 * pair
    if HAS_PRE:
        low = low.to(tl.float32) * tl.load(pre + k).to(tl.float32)[:, None]
        high = high.to(tl.float32) * tl.load(pre + k + 1).to(tl.float32)[:, None]
    return low.to(DOT), high.to(DOT)


@triton.jit
def linear_kernel(
    x, qdata, scale, zero, bias, pre, table, shifts, scale_scale, scale_zero, zero_scale, zero_zero, offsets,
    out, partial, arrived,
    M, N, K, row_bytes, columns, scale_rows, scale_meta_rows, zero_meta_rows, blocks, blocks_a_split,
    NBITS: tl.constexpr, KIND: tl.constexpr, MANTISSA: tl.constexpr, PER_ROW: tl.constexpr,
    GROUP: tl.constexpr, AXIS: tl.constexpr, SCALE: tl.constexpr, HAS_ZERO: tl.constexpr,
    META_SCALE: tl.constexpr, META_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PRE: tl.constexpr,
    EXPERTS: tl.constexpr, RAGGED: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
    CONSTANTS: tl.constexpr, HALF: tl.constexpr, OFFSETS: tl.constexpr, DOT: tl.constexpr,
    PAIR: tl.constexpr, PRECISION: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr, RUN: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x ``[E, M, K]``, qdata ``[E, N, row_bytes]``, out ``[E, M, N]``; grid (tiles of N and M, SPLIT_K, E).

    With EXPERTS (their number padded to a power of two, ``offsets`` padded with its last entry), x is ``[S, K]`` in
    runs of rows for one expert each, ending before offsets; grid (tiles of N times tiles of M that any such runs can
    need, SPLIT_K).
    columns, scale_rows: shape of each expert's scale. WIDTH: bytes a row that one dot takes. UNROLL: blocks of 128
    codes a turn of the loop. PAIR: 2 takes even and odd columns apart. partial: float32 ``[tiles, SPLIT_K, BLOCK_N,
    BLOCK_M]``; arrived: int32 zeros, one a tile.
    """
    part = tl.program_id(1)
    tile = tl.program_id(0)
    if EXPERTS > 0:
        # The tile's expert is the one at which the count of tiles of M, summed over the experts, passes its own.
        index = tl.arange(0, EXPERTS)
        ends = tl.load(offsets + index)
        starts = tl.where(index == 0, 0, tl.load(offsets + tl.maximum(index - 1, 0)))
        tiles = tl.cdiv(tl.maximum(ends - starts, 0), BLOCK_M)
        past = tl.cumsum(tiles, 0)
        own = tile // tl.cdiv(N, BLOCK_N)
        expert = tl.sum((past <= own).to(tl.int32), 0)
        if expert >= EXPERTS:
            return
        here = index == expert
        at = own - tl.sum(tl.where(here, past - tiles, 0), 0)
        m = tl.sum(tl.where(here, starts, 0), 0) + at * BLOCK_M + tl.arange(0, BLOCK_M)
        limit = tl.sum(tl.where(here, ends, 0), 0)
        row = tile % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
        first_row = 0
    else:
        expert = tl.program_id(2)
        tiles_m = tl.cdiv(M, BLOCK_M)
        row = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
        m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        limit = M
        first_row = expert * M
    expert = expert.to(tl.int64)
    # Rows past the end repeat the last one: no masks in the loop, and nothing of theirs is stored.
    rn = tl.minimum(row, N - 1)
    rm = first_row + tl.minimum(m, limit - 1)
    rows = qdata + (expert * N + rn) * row_bytes
    WHOLE: tl.constexpr = AXIS == 0 and not RAGGED
    scale, zero, table, scale_scale, scale_zero, zero_scale, zero_zero = to_expert(
        expert, scale, zero, table, scale_scale, scale_zero, zero_scale, zero_zero, N, columns, scale_rows,
        scale_meta_rows, zero_meta_rows, NBITS, HAS_ZERO, META_SCALE, META_ZERO, PER_ROW, WHOLE,
    )  # fmt: skip

    P: tl.constexpr = stride(NBITS)
    EACH: tl.constexpr = alike_columns(META_SCALE, META_ZERO, AXIS, GROUP, WIDTH)
    column = tl.arange(0, WIDTH // PAIR)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = part * blocks_a_split
    for turn in tl.range(first, tl.minimum(first + blocks_a_split, blocks), UNROLL, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            for FIRST in tl.static_range(0, 16 * P, WIDTH):
                planes = load_planes(rows, shifts, turn + u, FIRST, WIDTH, NBITS, PAIR)
                if ASM != "":
                    decoded = positions(planes, ASM, CONSTRAINTS, CONSTANTS, NBITS, HALF, PAIR)
                for J0 in tl.static_range(0, 8 // P, RUN):
                    k0 = (turn + u) * 128 + (16 * P * J0 + FIRST)
                    if SCALE != ELEMENTS:
                        group = k0 // GROUP
                        s = group_value(scale, scale_scale, scale_zero, rn, group, columns, scale_meta_rows, META_SCALE)
                        if HAS_ZERO:
                            z = group_value(zero, zero_scale, zero_zero, rn, group, columns, zero_meta_rows, META_ZERO)
                    xs = ()
                    for J in tl.static_range(RUN):
                        k = (k0 + 16 * P * J) // PAIR + column
                        if PAIR > 1:
                            xs = xs + load_pairs(x, pre, rm, k, K, DOT, HAS_PRE)
                        else:
                            xs = xs + (load_x(x, pre, rm, k, K, None, DOT, HAS_PRE, False),)
                    dot = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                    if SCALE == GROUP_SUMS and (HAS_ZERO or OFFSETS != ""):
                        # Sums of x, and what decoding leaves in the numbers: the same for all rows, so taken off first.
                        one = everywhere(planes, 1.0, ASM, HALF).to(DOT)
                        if OFFSETS == "" or alike(OFFSETS, J0, RUN):
                            for J in tl.static_range(RUN * PAIR):
                                sums = tl.dot(one, xs[J], sums, input_precision=PRECISION)
                            if OFFSETS != "":
                                dot = sums * -number(OFFSETS, J0)
                        else:
                            for J in tl.static_range(RUN * PAIR):
                                part_sums = tl.dot(one, xs[J], input_precision=PRECISION)
                                sums += part_sums
                                dot -= part_sums * number(OFFSETS, J0 + J // PAIR)
                    for J in tl.static_range(RUN * PAIR):
                        if ASM != "":
                            w = decoded[J0 * PAIR + J]
                        else:
                            codes = code(byte(planes, J % PAIR, PAIR), J0 + J // PAIR, NBITS)
                            w = value(codes, table, rn, KIND, NBITS, MANTISSA, PER_ROW)
                            if OFFSETS != "":
                                w += number(OFFSETS, J0 + J // PAIR)
                        if SCALE == GROUP_SUMS:
                            dot = tl.dot(narrowed(w, DOT, KIND), xs[J], dot, input_precision=PRECISION)
                        else:
                            w = w.to(tl.float32)
                            if SCALE == ROWS:
                                if HAS_ZERO:
                                    w = w - z[:, None]
                                w = w * s[:, None]
                            else:
                                k = k0 + 16 * P * J + column
                                r = (rn if AXIS == 1 else rn % scale_rows)[:, None]
                                if EACH > 1:
                                    c = (k0 + 16 * P * J) // GROUP + tl.arange(0, WIDTH // EACH)[None, :]
                                else:
                                    c = (k // GROUP if AXIS == 1 else k)[None, :]
                                if HAS_ZERO:
                                    off = group_value(
                                        zero, zero_scale, zero_zero, r, c, columns, zero_meta_rows, META_ZERO, WHOLE
                                    )
                                    w -= spread(off, EACH)
                                by = group_value(
                                    scale, scale_scale, scale_zero, r, c, columns, scale_meta_rows, META_SCALE, WHOLE
                                )
                                w *= spread(by, EACH)
                            acc = tl.dot(w.to(DOT), xs[J], acc, input_precision=PRECISION)
                    if SCALE == GROUP_SUMS:
                        if HAS_ZERO:
                            dot -= z[:, None] * sums
                        acc += dot * s[:, None]

    if RAGGED and part == SPLIT_K - 1:
        for start in range(blocks * 128, K, 32):
            k = start + tl.arange(0, 32)
            inside = k < K
            xk = load_x(x, pre, rm, k, K, inside, DOT, HAS_PRE, True)
            w = value(gather_codes(rows, k, K, NBITS), table, rn, KIND, NBITS, MANTISSA, PER_ROW)
            k = tl.minimum(k, K - 1)
            r = (rn if AXIS == 1 else rn % scale_rows)[:, None]
            c = (k // GROUP if AXIS == 1 else k)[None, :]
            if HAS_ZERO:
                w -= group_value(zero, zero_scale, zero_zero, r, c, columns, zero_meta_rows, META_ZERO)
            w *= group_value(scale, scale_scale, scale_zero, r, c, columns, scale_meta_rows, META_SCALE)
            acc = tl.dot(w.to(DOT), xk, acc, input_precision=PRECISION)

    if SPLIT_K > 1:
        # The program that arrives last adds the parts in their order, so results do not vary from run to run.
        spot = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tile
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        pieces = partial + spot * (SPLIT_K * BLOCK_N * BLOCK_M) + inner
        tl.store(pieces + part * (BLOCK_N * BLOCK_M), acc)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + spot, 1, sem="acq_rel")
        if before != SPLIT_K - 1:
            return
        tl.debug_barrier()
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in range(SPLIT_K):
            acc += tl.load(pieces + i * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
    if HAS_BIAS:
        acc += tl.load(bias + rn).to(tl.float32)[:, None]
    tl.store(
        out + (first_row + m[None, :]).to(tl.int64) * N + row[:, None],
        acc.to(out.dtype.element_ty),
        mask=(row[:, None] < N) & (m[None, :] < limit),
    )
