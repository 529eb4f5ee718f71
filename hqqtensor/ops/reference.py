"""The plain path: unpack, dequantize in float32, and let torch multiply. Every kernel is tested against it."""

import torch
from torch import Tensor

from hqqtensor.formats import get_format
from hqqtensor.ops.backend import Backend, register_backend
from hqqtensor.packing import unpack


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


def dequantize(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, nbits: int, format: str,
    group_size: int, axis: int, in_features: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    codes = unpack(qdata, nbits, in_features)
    size = (codes.shape[-2], in_features, group_size, axis)
    full_scale = expand_groups(scale.to(torch.float32), *size)
    fmt, zero = get_format(format), zero_point
    if zero is not None and fmt.has_zero_point:
        zero = expand_groups(zero.to(torch.float32), *size)
    return fmt.decode(codes, full_scale, zero, nbits).to(dtype)


def linear(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    act_pre_scale: Tensor | None, nbits: int, format: str, group_size: int, axis: int, in_features: int,
) -> Tensor:  # fmt: skip
    if act_pre_scale is not None:
        x = x * act_pre_scale.to(x.dtype)
    w = dequantize(qdata, scale, zero_point, nbits, format, group_size, axis, in_features, x.dtype)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


def batched_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, act_pre_scale: Tensor | None,
    nbits: int, format: str, group_size: int, axis: int, in_features: int,
) -> Tensor:  # fmt: skip
    if act_pre_scale is not None:
        x = x * act_pre_scale.to(x.dtype)
    w = dequantize(qdata, scale, zero_point, nbits, format, group_size, axis, in_features, x.dtype)
    return torch.bmm(x, w.transpose(-1, -2))


def embedding(
    indices: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, nbits: int, format: str,
    group_size: int, axis: int, in_features: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    rows, fmt = indices.reshape(-1), get_format(format)
    meta = rows if axis == 1 else rows % scale.shape[-2]
    size = (rows.numel(), in_features, group_size, axis)

    def pick(t: Tensor) -> Tensor:
        t = t[meta].to(torch.float32)
        return expand_groups(t, *size) if axis == 1 else t

    zero = zero_point
    if zero is not None and fmt.has_zero_point:
        zero = pick(zero)
    elif zero is not None and zero.ndim == 2:  # a codebook for each row
        zero = zero[rows]
    codes = unpack(qdata[rows], nbits, in_features)
    out = fmt.decode(codes, pick(scale), zero, nbits).to(dtype)
    return out.reshape(*indices.shape, in_features)


register_backend(
    Backend(
        "dequantize",
        {"linear": linear, "batched_linear": batched_linear, "embedding": embedding, "dequantize": dequantize},
    )
)
