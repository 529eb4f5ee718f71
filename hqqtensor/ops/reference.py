"""The plain path: unpack, dequantize in float32, and let torch multiply. Every kernel is tested against it."""

import torch
from torch import Tensor

from hqqtensor.formats import get_format
from hqqtensor.ops.backend import Backend, register_backend
from hqqtensor.ops.batch_invariant import BATCH_INVARIANT
from hqqtensor.ops.packed import PackedWeight, expert
from hqqtensor.packing import unpack, unpack_meta


def expand_groups(values: Tensor, out_features: int, in_features: int, group_size: int, axis: int) -> Tensor:
    """Repeat per-group ``values`` for each weight: ``[..., N, K]``.

    axis 1: ``[..., N, G]``, column k belongs to group k // group_size. axis 0: ``[..., G, K]``, row n belongs
    to group n % G, as the published library's ``reshape(group_size, -1)`` has it.
    """
    if axis == 1:
        if values.shape[-1] == 1:
            return values.expand(*values.shape[:-1], in_features)
        return values.repeat_interleave(group_size, dim=-1)[..., :in_features]
    groups = values.shape[-2]
    repeats = -(-out_features // groups)
    return values.repeat(*([1] * (values.ndim - 2)), repeats, 1)[..., :out_features, :]


def plain_meta(w: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """``scale`` and ``zero_point`` in float32; those that are uint8 are read through their own scales in ``meta``."""
    rest, columns = list(w.meta or ()), -(-w.in_features // w.group_size) if w.axis == 1 else w.in_features

    def plain(values: Tensor) -> Tensor:
        if values.dtype != torch.uint8:
            return values.to(torch.float32)
        own = [expand_groups(rest.pop(0).to(torch.float32), values.shape[-2], columns, 0, 0) for _ in range(2)]
        return (unpack_meta(values, columns).to(torch.float32) - own[1]) * own[0]

    return plain(w.scale), None if w.zero_point is None else plain(w.zero_point)


def dequantize(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    codes = unpack(w.qdata, w.nbits, w.in_features)
    size = (codes.shape[-2], w.in_features, w.group_size, w.axis)
    scale, zero_point = plain_meta(w)
    fmt = get_format(w.format)
    if zero_point is not None and fmt.has_zero_point:
        zero_point = expand_groups(zero_point, *size)
    return fmt.decode(codes, expand_groups(scale, *size), zero_point, w.nbits).to(dtype)


def activation_group(group_size: int, axis: int, in_features: int) -> int:
    """Features that share a step under ``activation="int8"``: 64, or 128 where the weight has groups of 128."""
    return 128 if axis == 1 and group_size == 128 < in_features else 64


def int8_activations(x: Tensor, size: int) -> Tensor:
    """float32 ``x [..., K]`` rounded to 8-bit integers: a step for each token and ``size`` features, max / 127."""
    K = x.shape[-1]
    runs = torch.nn.functional.pad(x, (0, -K % size)).unflatten(-1, (-1, size))
    largest = runs.abs().amax(-1, keepdim=True)
    # Powers of two keep 127 / top finite for the smallest numbers, and 127 times the step for the largest.
    unit = torch.where(largest < 2.0**-64, 2.0**64, torch.where(largest > 2.0**64, 2.0**-64, 1.0))
    top = largest * unit
    inverse = torch.where(top == 0, 0.0, torch.full_like(top, 127) / top)  # `127 / top` is 127 times a rounded 1 / top
    rounded = (runs * unit * inverse).round() * (top / 127)
    return (rounded.clamp(-top, top) / unit).flatten(-2)[..., :K]


def _int8_product(x: Tensor, w: PackedWeight) -> Tensor:
    """``x [M, K]`` times the transpose of one packed weight, activations as 8-bit integers; float32 ``[M, N]``.

    With groups along out_features the scale of each column belongs to the activations before they are rounded.
    """
    size, x = activation_group(w.group_size, w.axis, w.in_features), x.to(torch.float32)
    if w.axis == 1:
        return int8_activations(x, size) @ dequantize(w, torch.float32).t()
    fmt = get_format(w.format)
    scale, zero = plain_meta(w)
    groups, one = scale.shape[0], scale.new_ones(())
    out = x.new_empty(x.shape[0], w.qdata.shape[0])
    for g in range(groups):
        own = zero if zero is None or fmt.learned else zero[g]
        codes = fmt.decode(unpack(w.qdata[g::groups], w.nbits, w.in_features), one, own, w.nbits)
        out[:, g::groups] = int8_activations(x * scale[g], size) @ codes.t()
    return out


def _product(x: Tensor, w: PackedWeight, act_pre_scale: Tensor | None, activation: str) -> Tensor:
    """``x [..., K]`` times the transpose of one packed weight: ``[..., N]`` in x's dtype."""
    if act_pre_scale is not None:
        x = x * act_pre_scale.to(x.dtype)
    if BATCH_INVARIANT and x.numel() > x.shape[-1]:  # torch adds up in another order for other numbers of rows
        rows = [_product(row.unsqueeze(0), w, None, activation) for row in x.reshape(-1, x.shape[-1])]
        return torch.cat(rows).reshape(*x.shape[:-1], -1)
    if activation == "int8":
        out = _int8_product(x.reshape(-1, x.shape[-1]), w)
        return out.to(x.dtype).reshape(*x.shape[:-1], w.qdata.shape[0])
    return x @ dequantize(w, x.dtype).t()


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None, act_pre_scale: Tensor | None, activation: str) -> Tensor:
    y = _product(x, w, act_pre_scale, activation)
    return y if bias is None else y + bias.to(x.dtype)


def batched_linear(x: Tensor, w: PackedWeight, act_pre_scale: Tensor | None, activation: str) -> Tensor:
    S = x.shape[1]
    ends = torch.arange(1, x.shape[0] + 1) * S
    return grouped_linear(x.flatten(0, 1), ends, w, act_pre_scale, activation).unflatten(0, (-1, S))


def grouped_linear(
    x: Tensor, offsets: Tensor, w: PackedWeight, act_pre_scale: Tensor | None, activation: str
) -> Tensor:
    out = x.new_zeros(x.shape[0], w.qdata.shape[-2])
    first = 0
    for index, last in enumerate(offsets.tolist()):
        if last < first or last > x.shape[0]:
            raise RuntimeError(
                f"grouped_linear: offsets must rise from 0 to at most {x.shape[0]}, got {last} after {first}"
            )
        if last > first:
            out[first:last] = _product(x[first:last], expert(w, index), act_pre_scale, activation)
        first = last
    return out


def embedding(indices: Tensor, w: PackedWeight, dtype: torch.dtype) -> Tensor:
    rows, fmt = indices.reshape(-1).long(), get_format(w.format)
    N, K = w.qdata.shape[0], w.in_features
    if rows.numel() and rows.device.type == "cpu" and not 0 <= (bad := _farthest(rows, N)) < N:
        raise RuntimeError(f"embedding: index {bad} is not in 0 to {N - 1}")
    scale, zero_point = plain_meta(w)
    own = rows if w.axis == 1 else rows % scale.shape[-2]

    def pick(t: Tensor) -> Tensor:
        return expand_groups(t[own], rows.numel(), K, w.group_size, w.axis) if w.axis == 1 else t[own]

    if zero_point is not None and fmt.has_zero_point:
        zero_point = pick(zero_point)
    elif zero_point is not None and zero_point.numel() > zero_point.shape[-1]:  # a codebook for each row
        zero_point = zero_point[rows]
    codes = unpack(w.qdata[rows], w.nbits, K)
    out = fmt.decode(codes, pick(scale), zero_point, w.nbits).to(dtype)
    return out.reshape(*indices.shape, K)


def _farthest(rows: Tensor, N: int) -> int:
    """An index outside of 0 to N - 1 if there is one."""
    low, high = (int(t) for t in rows.aminmax())
    return low if low < 0 else high


_KERNELS = (linear, batched_linear, grouped_linear, embedding, dequantize)
register_backend(Backend("reference", {function.__name__: function for function in _KERNELS}))
