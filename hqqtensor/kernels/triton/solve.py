"""The rtn and joint solvers with a group a row of the tile, all rounds in registers, and the packing of codes.

Equations and constants are those of ``hqqtensor.solvers.rtn`` and ``hqqtensor.solvers.hqq_joint`` (norm 2).
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from hqqtensor.kernels.triton.decode import narrower, widest
from hqqtensor.solvers import hqq_joint

STARTS, SETTLE = tl.constexpr(hqq_joint.STARTS), tl.constexpr(hqq_joint.SETTLE)
MOVES, SETTLE_MOVE = tl.constexpr(hqq_joint.MOVES), tl.constexpr(hqq_joint.SETTLE_MOVE)
MOVE_END, MOVE_BOTH = tl.constexpr(hqq_joint.MOVE_END), tl.constexpr(hqq_joint.MOVE_BOTH)
SHRINK, MAX_SHRINK = tl.constexpr(hqq_joint.SHRINK), tl.constexpr(hqq_joint.MAX_SHRINK)
TINY = tl.constexpr(1.1754943508222875e-38)
ROUND = tl.constexpr(12582912.0)


@triton.jit
def nearest(x):
    """To the nearest integer, ties to even, for |x| < 2**22: adding 1.5 * 2**23 leaves no room for a fraction."""
    return (x + ROUND) - ROUND


@triton.jit
def group_codes(w, s, z, LAST: tl.constexpr):
    # Clamped first, so that rounding need only be right near the codes.
    return nearest(tl.minimum(tl.maximum(w / s[:, None] + z[:, None], 0.0), LAST))


@triton.jit
def fit(w, inside, mean, count, s, z, LAST: tl.constexpr):
    """One alternation: nearest codes, then the regression of w on them; unusable regressions keep (s, z)."""
    codes = tl.where(inside, group_codes(w, s, z, LAST), 0.0)
    code_mean = tl.sum(codes, 1) / count
    centred = tl.where(inside, codes - code_mean[:, None], 0.0)
    spread = tl.sum(centred * centred, 1)
    slope = tl.sum(centred * w, 1) / tl.where(spread > 0, spread, 1.0)
    usable = (spread > 0) & (slope > 0) & (slope < float("inf"))
    slope = tl.where(usable, slope, 1.0)
    return tl.where(usable, slope, s), tl.where(usable, code_mean - mean / slope, z)


@triton.jit
def square_error(w, inside, s, z, LAST: tl.constexpr):
    residual = tl.where(inside, (group_codes(w, s, z, LAST) - z[:, None]) * s[:, None] - w, 0.0)
    return tl.sum(residual * residual, 1)


@triton.jit
def better(w, inside, best, best_s, best_z, s, z, LAST: tl.constexpr):
    error = square_error(w, inside, s, z, LAST)
    won = error < best
    return tl.where(won, error, best), tl.where(won, s, best_s), tl.where(won, z, best_z)


@triton.jit
def search(w, inside, mean, count, low, high, LAST: tl.constexpr):
    """Scale and zero point of least square error, as ``hqq_joint`` finds them: starts, settling, moves."""
    middle = (low + high) / 2
    half = (high - low) / 2
    best = tl.full(low.shape, float("inf"), tl.float32)
    s, z = low, low
    FIRST: tl.constexpr = 1 - min(SHRINK / LAST, MAX_SHRINK)
    for a in range(STARTS):
        start = middle - half * (FIRST + (1 - FIRST) * a / (STARTS - 1))
        for b in range(STARTS):
            new_s = (middle + half * (FIRST + (1 - FIRST) * b / (STARTS - 1)) - start) / LAST
            new_s, new_z = fit(w, inside, mean, count, new_s, -start / new_s, LAST)
            best, s, z = better(w, inside, best, s, z, new_s, new_z, LAST)
    new_s, new_z = s, z
    for _ in range(SETTLE):
        new_s, new_z = fit(w, inside, mean, count, new_s, new_z, LAST)
    best, s, z = better(w, inside, best, s, z, new_s, new_z, LAST)
    for move in range(MOVES):
        change = tl.where(move < 4, MOVE_END, MOVE_BOTH) * tl.where(move % 2 == 0, 1.0, -1.0)
        lower = tl.where((move < 2) | (move >= 4), change, 0.0)
        upper = tl.where(move >= 2, change, 0.0)
        new_s = s * (1 + (lower + upper) / LAST)
        new_z = (z + lower) * s / new_s
        for _ in range(SETTLE_MOVE):
            new_s, new_z = fit(w, inside, mean, count, new_s, new_z, LAST)
        best, s, z = better(w, inside, best, s, z, new_s, new_z, LAST)
    return s, z


@triton.jit
def solve_kernel(
    matrix, inverse, zero, N, K, groups, size,
    NBITS: tl.constexpr, JOINT: tl.constexpr, AXIS: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Inverse scales and zero points, float32, of matrix ``[N, K]``: ``[N, groups]`` or (axis 0) ``[groups, K]``.

    size: members of a group (axis 1). MEMBERS: the most that one has, rounded up to a power of two.
    """
    LAST: tl.constexpr = 2**NBITS - 1
    total = N * groups if AXIS == 1 else groups * K
    g = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    real = g < total
    g = tl.minimum(g, total - 1)
    if AXIS == 1:
        base = g // groups * K + g % groups * size
        step = 1
        count = tl.minimum(size, K - g % groups * size)
    else:
        base = g
        step = groups * K
        count = (N - g // K + groups - 1) // groups
    i = tl.arange(0, MEMBERS).to(tl.int64)
    inside = i[None, :] < count[:, None]
    w = tl.load(matrix + base[:, None] + i[None, :] * step, mask=inside, other=0.0).to(tl.float32)
    low = tl.min(tl.where(inside, w, float("inf")), 1)
    high = tl.max(tl.where(inside, w, float("-inf")), 1)
    flat = high - low <= TINY
    if JOINT:
        unit = tl.where(flat, 1.0, tl.maximum(tl.abs(high), tl.abs(low)))
        scaled = w / unit[:, None]
        mean = tl.sum(scaled, 1) / count
        top = tl.where(flat, low / unit + 1, high / unit)
        s, z = search(scaled, inside, mean, count, low / unit, top, LAST)
        s = s * unit
    else:
        s = high / LAST - low / LAST
        z = -low / tl.where(flat, 1.0, s)
    # A constant group comes back exactly: code 1 for a positive weight, 0 for a negative one.
    s = tl.where(flat, tl.where(low == 0, 1.0, tl.abs(low)), s)
    z = tl.where(flat, tl.where(low < 0, 1.0, 0.0), z)
    tl.store(inverse + g, 1 / s, mask=real)
    tl.store(zero + g, z, mask=real)


@triton.jit
def assign_plane(
    out, matrix, inverse, zero, rn, inside, K, row_bytes, columns, rows, block, start, size, low,
    P: tl.constexpr, NBITS: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Write the bytes of one plane of P bits, which holds the bits of the codes from ``low`` on."""
    width = size * P // 8
    i = tl.arange(0, 16 * P)
    byte = tl.zeros((rn.shape[0], 16 * P), tl.int32)
    r = (rn if AXIS == 1 else rn % rows)[:, None]
    for J in tl.static_range(8 // P):
        k = block * 128 + width * J + i
        real = (i < width) & (k < K)
        k = tl.minimum(k, K - 1)
        at = r * columns + (k // GROUP if AXIS == 1 else k)[None, :]
        w = tl.load(matrix + rn[:, None] * K + k[None, :]).to(tl.float32)
        x = w * tl.load(inverse + at) + tl.load(zero + at)
        codes = nearest(tl.minimum(tl.maximum(x, 0.0), 2**NBITS - 1)).to(tl.int32)
        byte = byte | (tl.where(real[None, :], codes >> low & (2**P - 1), 0) << (P * J))
    target = out + rn[:, None] * row_bytes + (block * (16 * NBITS) + start + i)[None, :]
    tl.store(target, byte.to(tl.uint8), mask=inside[:, None] & (i < width)[None, :])


@triton.jit
def assign_kernel(
    out, matrix, inverse, zero, N, K, row_bytes, columns, rows,
    NBITS: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Pack the nearest codes of matrix ``[N, K]`` into out ``[N, row_bytes]``; scales as from ``solve_kernel``, of
    shape ``[rows, columns]``. Grid (tiles of rows, blocks of 128 codes)."""
    P: tl.constexpr = widest(NBITS)
    Q: tl.constexpr = narrower(NBITS, 1)
    R: tl.constexpr = narrower(NBITS, 2)
    block = tl.program_id(1)
    rn = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rn < N
    rn = tl.minimum(rn, N - 1)
    size = tl.minimum((K + 7) // 8 * 8 - block * 128, 128)
    assign_plane(
        out, matrix, inverse, zero, rn, inside, K, row_bytes, columns, rows, block, 0, size, 0, P, NBITS, GROUP, AXIS
    )
    if Q > 0:
        start = size * P // 8
        assign_plane(
            out, matrix, inverse, zero, rn, inside, K, row_bytes, columns, rows, block, start, size, P, Q, NBITS,
            GROUP, AXIS,
        )  # fmt: skip
    if R > 0:
        start = size * (P + Q) // 8
        assign_plane(
            out, matrix, inverse, zero, rn, inside, K, row_bytes, columns, rows, block, start, size, P + Q, R, NBITS,
            GROUP, AXIS,
        )  # fmt: skip
