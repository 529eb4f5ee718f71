"""Which rows and columns of a weight belong to a process of tensor parallelism, and cutting them out of packed data.

Unlike the views of ``hqqtensor.tensor.views``, a cut may fall anywhere. Columns are cut outward, to whole groups: the
process then has a few columns more than it needs, and pads its inputs with zeros (``Columns``).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqqtensor.packing import byte_offset, pack, pack_meta, unpack, unpack_meta
from hqqtensor.tensor import HQQTensor


class Columns(NamedTuple):
    """A weight whose input needs ``before`` and ``after`` zeros around it."""

    weight: Tensor
    before: int
    after: int


def row_ranges(
    rows: int, local_sizes: Sequence[int], full_sizes: Sequence[int] | None, rank: int, ranks: int, name: str
) -> list[tuple[int, int]]:
    """The rows of a stored weight that belong to a process, as ranges that do not touch one another.

    rows: of the stored weight, which holds one weight, or several below each other. local_sizes: rows that the process
    has of each. full_sizes: rows of each in the file; None where the file holds ``ranks`` times what a process has, or
    one weight alone. A weight with fewer rows than ``ranks`` processes would need (key and value heads, or a layer that
    is not split) is shared by neighbouring ranks. ValueError naming ``name`` where the rows do not come out even.
    """
    if full_sizes is None:
        full_sizes = [rows] if len(local_sizes) == 1 else [size * ranks for size in local_sizes]
    out: list[tuple[int, int]] = []
    offset = 0
    for local, full in zip(local_sizes, full_sizes, strict=True):
        copies, remainder = divmod(local * ranks, full) if full else (0, 1)
        if remainder or not copies or ranks % copies:
            raise ValueError(f"{name}: {full} rows cannot be split over {ranks} processes with {local} rows each")
        start = offset + rank // copies * local
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], start + local)
        else:
            out.append((start, start + local))
        offset += full
    if offset != rows:
        raise ValueError(f"{name}: the file has {rows} rows, the model needs {offset}")
    return out


def cut_rows(weight: Tensor, start: int, end: int) -> Tensor:
    """Rows ``[start, end)`` of ``[..., N, K]``, quantized or not.

    Row n of a weight with axis 0 is in group n % groups, so its groups are rotated until row ``start`` is in the first.
    Quantized scales that cannot be rotated become plain.
    """
    if not isinstance(weight, HQQTensor):
        return weight.narrow(-2, start, end - start)
    if (start, end) == (0, weight.out_features):
        return weight
    shape = torch.Size([*weight.shape[:-2], end - start, weight.shape[-1]])
    changes: dict[str, Any] = {"qdata": weight.qdata.narrow(-2, start, end - start), "shape": shape}
    for part in ("scale", "zero_point"):
        value = getattr(weight, part)
        if value is None or (part == "zero_point" and weight.codebook == "tensor"):
            continue
        changes[part] = cut_rows(value, start, end) if weight.axis == 1 else _rotated(value, start)
    return weight.with_data(**changes)


def _rotated(values: Tensor, start: int) -> Tensor:
    """Scales (or zero points) ``[..., groups, K]`` with group ``start % groups`` first."""
    shift = start % values.shape[-2]
    if not shift:
        return values
    plain = values.dequantize(torch.float32) if isinstance(values, HQQTensor) else values
    return plain.roll(-shift, -2)


def cut_columns(weight: Tensor, start: int, end: int) -> Columns:
    """Columns ``[start, end)`` of ``[..., N, K]``, quantized or not, with what whole groups and rotations add."""
    if not isinstance(weight, HQQTensor):
        return Columns(weight.narrow(-1, start, end - start), 0, 0)
    K = weight.in_features
    step = math.lcm(weight.group_size if weight.axis == 1 else 1, weight.rotation or 1)
    first, last = start // step * step, min(-(-end // step) * step, K)
    if (first, last) == (0, K):
        return Columns(weight, start, K - end)
    shape = torch.Size([*weight.shape[:-1], last - first])
    act = weight.act_pre_scale
    changes: dict[str, Any] = {"qdata": _bytes(weight, first, last), "shape": shape}
    changes["act_pre_scale"] = None if act is None else act[first:last]
    size = weight.group_size
    groups = (first // size, -(-last // size)) if weight.axis == 1 else (first, last)
    for part in ("scale", "zero_point"):
        value = getattr(weight, part)
        if value is not None and not (part == "zero_point" and weight.codebook is not None):
            changes[part] = _number_columns(value, *groups)
    return Columns(weight.with_data(**changes), start - first, last - end)


def _bytes(weight: HQQTensor, first: int, last: int) -> Tensor:
    """Packed columns: a view where blocks of 128 codes begin and end there, else packed anew."""
    packed, K, nbits = weight.operand().qdata, weight.in_features, weight.nbits
    low, high = byte_offset(first, K, nbits), byte_offset(last, K, nbits)
    if low is not None and high is not None:
        return packed[..., low:high]
    return pack(unpack(packed, nbits, K)[..., first:last], nbits)


def _number_columns(values: Tensor, first: int, last: int) -> Tensor:
    """Columns of scales or zero points, plain or quantized."""
    if not isinstance(values, HQQTensor):
        return values[..., first:last]
    codes = unpack_meta(values.qdata, values.in_features)[..., first:last]
    shape = torch.Size([*values.shape[:-1], last - first])
    parts = {name: getattr(values, name)[..., first:last] for name in ("scale", "zero_point")}
    return values.with_data(qdata=pack_meta(codes, values.nbits), shape=shape, **parts)
