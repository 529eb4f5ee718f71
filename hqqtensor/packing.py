"""Dense bit packing for codes of 1 to 8 bits, one layout for every device.

A row of ``K`` codes is a run of self-contained blocks of 128 codes; the last block may be
shorter (the codes that are left, rounded up to a multiple of 8). A width is a sum of planes:

    1 = 1   2 = 2   3 = 2+1   4 = 4   5 = 4+1   6 = 4+2   7 = 4+2+1   8 = 8

The planes of a block follow one another, widest first; the widest holds the lowest bits of a
code. In a plane of ``p`` bits, code ``c`` of a block of ``B`` codes sits in byte
``c % (B*p/8)`` at bit ``p * (c // (B*p/8))``: a shift and a mask of a whole vector of bytes
gives consecutive codes. Blocks stand alone, so a slice of rows, of leading dimensions or of
whole blocks of a row is a view of the packed bytes.
"""

import torch
from torch import Tensor

BLOCK = 128
"""Codes in a full block."""

PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}
"""Plane widths of each code width, widest first; the widest holds the lowest bits."""


def row_bytes(in_features: int, nbits: int) -> int:
    """Bytes that one packed row of ``in_features`` codes takes; ValueError for nbits outside 1 to 8."""
    _check_nbits(nbits)
    return (in_features + 7) // 8 * nbits


def byte_offset(code: int, in_features: int, nbits: int) -> int | None:
    """Offset of the byte at which the block that starts at ``code`` begins, or None within a block.

    ``code == in_features`` gives the row's length, so a pair of offsets bounds a slice.
    """
    if code == in_features:
        return row_bytes(in_features, nbits)
    return code // 8 * nbits if code % BLOCK == 0 else None


def pack(codes: Tensor, nbits: int) -> Tensor:
    """Pack ``codes`` (uint8, ``[..., K]``, each below ``2**nbits``) into uint8 ``[..., row_bytes(K, nbits)]``.

    TypeError for codes of another dtype; ValueError for nbits outside 1 to 8.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    in_features = codes.shape[-1]
    out = codes.new_empty(*codes.shape[:-1], row_bytes(in_features, nbits))
    if in_features % 8:
        codes = torch.nn.functional.pad(codes, (0, -in_features % 8))
    for start, count, size in _runs(in_features):
        blocks = codes[..., start : start + count * size].unflatten(-1, (count, size))
        low, parts = 0, []
        for plane in PLANES[nbits]:
            slabs = ((blocks >> low) & (2**plane - 1)).unflatten(-1, (8 // plane, size * plane // 8))
            byte = slabs[..., 0, :]
            for position in range(1, 8 // plane):
                byte = byte | (slabs[..., position, :] << (plane * position))
            parts.append(byte)
            low += plane
        first = start // 8 * nbits
        out[..., first : first + count * size // 8 * nbits] = torch.cat(parts, dim=-1).flatten(-2)
    return out


def unpack(qdata: Tensor, nbits: int, in_features: int) -> Tensor:
    """Unpack uint8 ``[..., row_bytes(K, nbits)]`` into codes, uint8 ``[..., K]`` with ``K = in_features``.

    ValueError for packed bytes of another dtype or length, or nbits outside 1 to 8.
    """
    expected = row_bytes(in_features, nbits)
    if qdata.dtype != torch.uint8 or qdata.shape[-1] != expected:
        raise ValueError(
            f"packed rows of {in_features} codes of {nbits} bits are uint8 [..., {expected}], "
            f"got {qdata.dtype} {list(qdata.shape)}"
        )
    out = qdata.new_empty(*qdata.shape[:-1], (in_features + 7) // 8 * 8)
    for start, count, size in _runs(in_features):
        first = start // 8 * nbits
        blocks = qdata[..., first : first + count * size // 8 * nbits].unflatten(-1, (count, size // 8 * nbits))
        codes = out[..., start : start + count * size].unflatten(-1, (count, size))
        low, offset = 0, 0
        for plane in PLANES[nbits]:
            width = size * plane // 8
            bytes_ = blocks[..., offset : offset + width]
            for position in range(8 // plane):
                slab = (bytes_ >> (plane * position)) & (2**plane - 1)
                target = codes[..., position * width : (position + 1) * width]
                if low:
                    target |= slab << low
                else:
                    target.copy_(slab)
            low += plane
            offset += width
    return out[..., :in_features]


def meta_bytes(columns: int, nbits: int) -> int:
    """Bytes of a row of ``columns`` quantized scales or zero points, in 8 or 4 bits each (see ``pack_meta``)."""
    return columns if nbits == 8 else (columns + 1) // 2


def meta_bits(columns: int, stored: int) -> int:
    """8 or 4: the bits of each of ``columns`` scales (or zero points) in rows of ``stored`` bytes.

    A single column takes a byte and reads the same in either; it counts as 8. ValueError for any other length.
    """
    for nbits in (8, 4):
        if stored == meta_bytes(columns, nbits):
            return nbits
    raise ValueError(
        f"rows of {columns} quantized scales or zero points take {columns} bytes in 8 bits or {meta_bytes(columns, 4)} "
        f"in 4, got {stored}"
    )


def pack_meta(codes: Tensor, nbits: int) -> Tensor:
    """Pack the codes of scales or zero points, uint8 ``[..., G]``: uint8 ``[..., meta_bytes(G, nbits)]``.

    8 bits are a byte each. 4 bits lie as ``pack`` lays them, in blocks of 128 codes, code ``c`` of a block of ``B`` in
    nibble ``c // h`` of byte ``c % h`` with ``h = ceil(B / 2)``. Unlike there, the last block is not filled up to a
    multiple of 8 codes: with few groups a row, padding would be much of what the scales take.
    """
    if nbits == 8:
        return codes.contiguous()
    full = codes.shape[-1] // BLOCK * BLOCK
    parts = [pack(codes[..., :full], nbits)] if full else []
    if full < codes.shape[-1]:
        last = codes[..., full:]
        half = (last.shape[-1] + 1) // 2
        high = torch.nn.functional.pad(last[..., half:], (0, last.shape[-1] % 2))
        parts.append(last[..., :half] | (high << 4))
    return torch.cat(parts, -1)


def unpack_meta(rows: Tensor, columns: int) -> Tensor:
    """The codes ``[..., columns]`` of rows that ``pack_meta`` packed in 8 or 4 bits."""
    if meta_bits(columns, rows.shape[-1]) == 8:
        return rows
    full = columns // BLOCK
    parts = [unpack(rows[..., : full * (BLOCK // 2)], 4, full * BLOCK)] if full else []
    if columns % BLOCK:
        last = rows[..., full * (BLOCK // 2) :]
        parts += [last & 15, (last >> 4)[..., : columns % BLOCK - last.shape[-1]]]
    return torch.cat(parts, -1)


def _runs(in_features: int) -> list[tuple[int, int, int]]:
    """(first code, number of blocks, codes a block) of the full blocks and of the short last one."""
    full, last = divmod((in_features + 7) // 8 * 8, BLOCK)
    runs = [(0, full, BLOCK)] if full else []
    return [*runs, (full * BLOCK, 1, last)] if last else runs


def _check_nbits(nbits: int) -> None:
    if nbits not in PLANES:
        raise ValueError(f"nbits must be one of {sorted(PLANES)}, got {nbits!r}")
