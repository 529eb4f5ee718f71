"""Dense weights from packed ones: whole matrices, or the rows that an embedding looks up."""
# mypy: ignore-errors

import triton
import triton.language as tl

from hqqtensor.kernels.triton.decode import code, gather_codes, group_value, load_planes, stride, to_expert, value


@triton.jit
def dequantize_kernel(
    indices, qdata, scale, zero, table, shifts, scale_scale, scale_zero, zero_scale, zero_zero, out,
    R, N, K, row_bytes, columns, scale_rows, scale_meta_rows, zero_meta_rows, blocks,
    NBITS: tl.constexpr, KIND: tl.constexpr, MANTISSA: tl.constexpr, PER_ROW: tl.constexpr,
    GROUP: tl.constexpr, AXIS: tl.constexpr, HAS_ZERO: tl.constexpr,
    META_SCALE: tl.constexpr, META_ZERO: tl.constexpr, HAS_INDICES: tl.constexpr, ROW_SCALES: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out ``[E, R, K]``: row r of expert e is row indices[r], or r, of qdata ``[E, N, row_bytes]``.

    Grid (tiles of R, blocks of 128 codes with the ragged last one, E); ``blocks`` counts the full ones. WIDTH: bytes of
    a row at a time; with ROW_SCALES their codes share a group.
    """
    expert = tl.program_id(2).to(tl.int64)
    block = tl.program_id(1)
    at = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = at < R
    at = tl.minimum(at, R - 1)
    rn = tl.load(indices + at) if HAS_INDICES else at
    # A row that is not there reads as NaN; memory past the weight is never touched.
    there = (rn >= 0) & (rn < N)
    rn = tl.minimum(tl.maximum(rn, 0), N - 1)
    rows = qdata + (expert * N + rn) * row_bytes
    scale, zero, table, scale_scale, scale_zero, zero_scale, zero_zero = to_expert(
        expert, scale, zero, table, scale_scale, scale_zero, zero_scale, zero_zero, N, columns, scale_rows,
        scale_meta_rows, zero_meta_rows, NBITS, HAS_ZERO, META_SCALE, META_ZERO, PER_ROW,
    )  # fmt: skip
    r = (rn if AXIS == 1 else rn % scale_rows)[:, None]
    target = out + (expert * R + at[:, None]) * K

    P: tl.constexpr = stride(NBITS)
    if block < blocks:
        for FIRST in tl.static_range(0, 16 * P, WIDTH):
            planes = load_planes(rows, shifts, block, FIRST, WIDTH, NBITS)
            for J in tl.static_range(8 // P):
                start = block * 128 + (16 * P * J + FIRST)
                k = start + tl.arange(0, WIDTH)
                w = value(code(planes, J, NBITS), table, rn, KIND, NBITS, MANTISSA, PER_ROW)
                if ROW_SCALES:  # the tile lies within a group
                    c = (start // GROUP + tl.zeros((1,), tl.int32))[None, :]
                else:
                    c = (k // GROUP if AXIS == 1 else k)[None, :]
                if HAS_ZERO:
                    w -= group_value(zero, zero_scale, zero_zero, r, c, columns, zero_meta_rows, META_ZERO)
                w *= group_value(scale, scale_scale, scale_zero, r, c, columns, scale_meta_rows, META_SCALE)
                if HAS_INDICES:
                    w = tl.where(there[:, None], w, float("nan"))
                tl.store(target + k[None, :], w.to(out.dtype.element_ty), mask=inside[:, None])
    else:
        for part in range(4):
            last = block * 128 + part * 32 + tl.arange(0, 32)
            rest = value(gather_codes(rows, last, K, NBITS), table, rn, KIND, NBITS, MANTISSA, PER_ROW)
            real = last < K
            last = tl.minimum(last, K - 1)
            group = (last // GROUP if AXIS == 1 else last)[None, :]
            if HAS_ZERO:
                rest -= group_value(zero, zero_scale, zero_zero, r, group, columns, zero_meta_rows, META_ZERO)
            rest *= group_value(scale, scale_scale, scale_zero, r, group, columns, scale_meta_rows, META_SCALE)
            if HAS_INDICES:
                rest = tl.where(there[:, None], rest, float("nan"))
            tl.store(target + last[None, :], rest.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])
