"""From packed bytes to weights, within Triton kernels. Shared by every kernel; the layout is that of ``packing.py``.

A tile is ``[rows, WIDTH]`` bytes: columns FIRST .. FIRST + WIDTH of a block's ``16 * P``, P the bits of the widest
plane, but at least 2. Its position j (of ``8 / P``) holds the codes ``16 * P * j + FIRST`` onward, one a column, so
shifting and masking the whole tile gives a tile of consecutive weights. The bytes of a plane of fewer bits q repeat
every ``16 * q`` columns, and their bits for position j begin at ``P * j + q * (column // (16 * q))``.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005

import triton
import triton.language as tl

INT, MINIFLOAT, TABLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a code stands for: itself, a small float (sign, exponent, mantissa), or an entry of a table."""


@triton.constexpr_function
def widest(nbits):
    """Bits of the widest plane of a width."""
    return 8 if nbits == 8 else 4 if nbits >= 4 else 2 if nbits >= 2 else 1


@triton.constexpr_function
def stride(nbits):
    """Bits of a byte from one position of a tile to the next."""
    return max(2, 8 if nbits == 8 else 4 if nbits >= 4 else 2)


@triton.constexpr_function
def numbers(text):
    """How many numbers a constant text holds, for constants that are tuples do not reach a kernel."""
    return len(text.split())


@triton.constexpr_function
def number(text, index):
    return float(text.split()[index]) if "." in text else int(text.split()[index])


@triton.constexpr_function
def alike(text, first, count):
    """Whether so many numbers of a constant text are the same."""
    return len(set(text.split()[first : first + count])) == 1


@triton.constexpr_function
def narrower(nbits, index):
    """Bits of the second (1) or third (2) plane of a width, or 0."""
    rest = nbits - widest(nbits)
    second = 2 if rest >= 2 else rest
    return second if index == 1 else rest - second


@triton.constexpr_function
def copies(item, count):
    return (item,) * count


@triton.jit
def to_expert(
    expert, scale, zero, table, scale_scale, scale_zero, zero_scale, zero_zero, N, columns, scale_rows,
    scale_meta_rows, zero_meta_rows,
    NBITS: tl.constexpr, HAS_ZERO: tl.constexpr, META_SCALE: tl.constexpr, META_ZERO: tl.constexpr,
    PER_ROW: tl.constexpr,
):  # fmt: skip
    """The pointers ``scale`` to ``zero_zero`` where those of an expert (int64) begin; absent ones stay."""
    scale += expert * scale_rows * stored(columns, META_SCALE)
    if HAS_ZERO:
        zero += expert * scale_rows * stored(columns, META_ZERO)
    if META_SCALE:
        scale_scale += expert * scale_meta_rows * columns
        scale_zero += expert * scale_meta_rows * columns
    if META_ZERO:
        zero_scale += expert * zero_meta_rows * columns
        zero_zero += expert * zero_meta_rows * columns
    if PER_ROW:
        table += expert * N * (2**NBITS)
    return scale, zero, table, scale_scale, scale_zero, zero_scale, zero_zero


@triton.jit
def load_planes(
    rows, shifts, block, FIRST: tl.constexpr, WIDTH: tl.constexpr, NBITS: tl.constexpr, PAIR: tl.constexpr = 1
):
    """The bytes ``[rows, WIDTH]`` of a full block's planes, and how much too high in them the bits of narrower ones
    lie, ``[1, WIDTH]``: (first, second, third, second's shifts, third's shifts); absent ones stand in by the first. At
    1 bit the first plane is a narrower one, with the second's shifts.

    rows: pointers to the first byte of each packed row, ``[rows]``. PAIR: 1, or 2 for words of two bytes in int16,
    ``[rows, WIDTH / 2]``, each with one shift. shifts: ``launch.shift_table``; it is read, not
    computed, because the compiler lets the tensor cores' operand layout reach back only to loads.
    """
    P: tl.constexpr = widest(NBITS)
    Q: tl.constexpr = narrower(NBITS, 1)
    R: tl.constexpr = narrower(NBITS, 2)
    column = FIRST // PAIR + tl.arange(0, WIDTH // PAIR)
    if PAIR > 1:
        rows = rows.to(tl.pointer_type(tl.int16))
    start = rows[:, None] + block * (16 * NBITS // PAIR)
    w = tl.load(start + (column % (16 * P // PAIR))[None, :], eviction_policy="evict_first")
    second, third, second_shift, third_shift = w, w, w, w
    if NBITS == 1:
        second_shift = tl.load(shifts + column * PAIR)[None, :]
    if Q > 0:
        second = tl.load(start + (16 * P // PAIR + column % (16 * Q // PAIR))[None, :], eviction_policy="evict_first")
        second_shift = tl.load(shifts + column * PAIR)[None, :]
    if R > 0:
        third = tl.load(
            start + (16 * (P + Q) // PAIR + column % (16 * R // PAIR))[None, :], eviction_policy="evict_first"
        )
        third_shift = tl.load(shifts + 64 + column * PAIR)[None, :]
    return w, second, third, second_shift, third_shift


@triton.jit
def positions(
    planes, TEXT: tl.constexpr, CONSTRAINTS: tl.constexpr, CONSTANTS: tl.constexpr, NBITS: tl.constexpr,
    HALF: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """The numbers of every position as a tuple of ``8 / P`` tiles of HALF (float16 or bfloat16), by the text of a
    ``words.Decoder``: codes, or codes and the offsets it states. With PAIR 2, a position's even and odd columns."""
    w, second, third, second_shift, third_shift = planes
    Q: tl.constexpr = narrower(NBITS, 1)
    R: tl.constexpr = narrower(NBITS, 2)
    if is_ptx(TEXT) or PAIR > 1:
        args = (w,)
        if Q > 0:
            args = (w, second)
        if R > 0:
            args = (w, second, third)
    else:  # AMD: the planes' bytes of a weight in one register
        together = w.to(tl.int32)
        if Q > 0:
            together = together | second.to(tl.int32) << 16
        if R > 0:
            together = together | third.to(tl.int32) << 24
        args = (together,)
    if not is_ptx(TEXT):  # counts for 16-bit lanes
        second_shift = second_shift.to(tl.int16)
        third_shift = third_shift.to(tl.int16)
    if Q > 0 or NBITS == 1:
        args = args + (second_shift,)
    if R > 0:
        args = args + (third_shift,)
    for i in tl.static_range(numbers(CONSTANTS)):
        args = args + (tl.full(w.shape, number(CONSTANTS, i), tl.int32),)
    SPARE: tl.constexpr = 1 if NBITS > 4 and PAIR == 1 and not is_ptx(TEXT) else 0
    KINDS: tl.constexpr = copies(HALF, 8 // stride(NBITS) * PAIR + SPARE)
    return tl.inline_asm_elementwise(TEXT, CONSTRAINTS, args, dtype=KINDS, is_pure=True, pack=4 // PAIR)


@triton.jit
def everywhere(planes, VALUE: tl.constexpr, TEXT: tl.constexpr, HALF: tl.constexpr):
    """VALUE, plus or minus a power of two, in the shape of a tile and, where PTX decodes, in the register layout of
    what it decoded."""
    if is_ptx(TEXT):
        KIND: tl.constexpr = copies(HALF, 1)
        text: tl.constexpr = splat(VALUE, tl.bfloat16 == HALF)
        return tl.inline_asm_elementwise(text, "=r,=r,r", (planes[0],), KIND, is_pure=True, pack=4)[0]
    else:
        return tl.full(planes[0].shape, VALUE, HALF)


@triton.constexpr_function
def is_ptx(text):
    return text.startswith("{")


@triton.constexpr_function
def splat(value, is_bfloat16):
    """PTX for two registers of ``value`` in each half."""
    mantissa, bias = (7, 127) if is_bfloat16 else (10, 15)
    exponent = len(f"{int(abs(value)):b}") - 1
    bits = (bias + exponent) << mantissa | (0x8000 if value < 0 else 0)
    return f"mov.b32 $0, {bits * 0x00010001}; mov.b32 $1, {bits * 0x00010001};"


@triton.jit
def byte(planes, H: tl.constexpr, PAIR: tl.constexpr):
    """Byte H of planes that ``load_planes`` loaded in pairs."""
    if PAIR == 1:
        return planes
    else:
        w, second, third, second_shift, third_shift = planes
        w, second, third = w >> (8 * H), second >> (8 * H), third >> (8 * H)
        return w.to(tl.uint8), second.to(tl.uint8), third.to(tl.uint8), second_shift, third_shift


@triton.jit
def code(planes, J: tl.constexpr, NBITS: tl.constexpr):
    """Codes of position J, uint8 ``[rows, WIDTH]``."""
    P: tl.constexpr = widest(NBITS)
    Q: tl.constexpr = narrower(NBITS, 1)
    R: tl.constexpr = narrower(NBITS, 2)
    w, second, third, second_shift, third_shift = planes
    if NBITS == 1:
        return (w >> second_shift >> (2 * J)) & 1
    out = (w >> (P * J)) & (2**P - 1)
    if Q > 0:
        out = out | (((second >> second_shift >> (P * J)) & (2**Q - 1)) << P)
    if R > 0:
        out = out | (((third >> third_shift >> (P * J)) & (2**R - 1)) << (P + Q))
    return out


@triton.jit
def gather_codes(rows, k, in_features, NBITS: tl.constexpr):
    """Codes of the columns ``k`` (``[columns]``), byte by byte, in full blocks and in the ragged last one alike: uint8
    ``[rows, columns]``. Columns from in_features on give 0."""
    P: tl.constexpr = widest(NBITS)
    Q: tl.constexpr = narrower(NBITS, 1)
    R: tl.constexpr = narrower(NBITS, 2)
    block = k // 128
    size = tl.minimum((in_features + 7) // 8 * 8 - block * 128, 128)
    c = k - block * 128
    start = block * (16 * NBITS)
    out = gather_plane(rows, start, c, size, k < in_features, P)
    if Q > 0:
        out = out | (gather_plane(rows, start + size * P // 8, c, size, k < in_features, Q) << P)
    if R > 0:
        out = out | (gather_plane(rows, start + size * (P + Q) // 8, c, size, k < in_features, R) << (P + Q))
    return out


@triton.jit
def gather_plane(rows, start, c, size, mask, P: tl.constexpr):
    width = size * P // 8
    width = tl.maximum(width, 1)
    shift = (P * (c // width)).to(tl.uint8)
    byte = tl.load(rows[:, None] + (start + c % width)[None, :], mask=mask[None, :], other=0)
    return (byte >> shift[None, :]) & (2**P - 1)


@triton.jit
def value(codes, table, row, KIND: tl.constexpr, NBITS: tl.constexpr, MANTISSA: tl.constexpr, PER_ROW: tl.constexpr):
    """Float32 numbers that uint8 ``codes [rows, columns]`` stand for, before scale and zero point.

    table: float32 entries ``[2**NBITS]``, or ``[N, 2**NBITS]`` with PER_ROW, then ``row`` gives each row's index.
    """
    if KIND == INT:
        return codes.to(tl.float32)
    elif KIND == MINIFLOAT:
        # Sign, exponent and mantissa in the places of float32's; the product mends the bias, and subnormals with it.
        EXPONENT: tl.constexpr = NBITS - 1 - MANTISSA
        FACTOR: tl.constexpr = 2.0 ** (127 - (2 ** (EXPONENT - 1) - 1))
        wide = codes.to(tl.int32)
        bits = (wide >> (NBITS - 1) << 31) | ((wide & (2 ** (NBITS - 1) - 1)) << (23 - MANTISSA))
        return bits.to(tl.float32, bitcast=True) * FACTOR
    else:
        index = codes.to(tl.int32)
        if PER_ROW:
            index += row[:, None] * (2**NBITS)
        return tl.load(table + index)


@triton.jit
def narrowed(w, DOT: tl.constexpr, KIND: tl.constexpr):
    """Numbers before scale and zero point as DOT. All but a table's have few bits: bfloat16 is their upper half."""
    if tl.bfloat16 == DOT and KIND != TABLE and w.dtype == tl.float32:
        return (w.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(DOT, bitcast=True)
    return w.to(DOT)


@triton.jit
def stored(columns, META: tl.constexpr):
    """Entries of a row of ``columns`` scales or zero points: bytes of two in 4 bits (``packing.meta_bytes``)."""
    return (columns + 1) // 2 if META == 4 else columns


@triton.jit
def group_value(values, meta_scale, meta_zero, row, column, columns, meta_rows, META: tl.constexpr):
    """Scale or zero point at (row, column) of its matrix in float32, undoing its own quantization to META bits (4 as
    ``packing.pack_meta`` lays them), 0 where it has none."""
    values += row * stored(columns, META)
    if META == 4:
        start = column // 128 * 128
        half = (tl.minimum(columns - start, 128) + 1) // 2
        high = (column - start >= half).to(tl.int32)
        out = tl.load(values + (column - start // 2 - half * high)).to(tl.int32) >> 4 * high & 15
    else:
        out = tl.load(values + column)
    out = out.to(tl.float32)
    if META > 0:
        at = row % meta_rows * columns + column
        out = (out - tl.load(meta_zero + at).to(tl.float32)) * tl.load(meta_scale + at).to(tl.float32)
    return out
