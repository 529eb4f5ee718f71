"""The plain path: unpack, dequantize in float32, and let torch multiply. Every kernel is tested against it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hqqtensor.formats import get_format
from hqqtensor.ops.backend import Backend, register_backend
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


def plain_meta(
    scale: Tensor, zero_point: Tensor | None, meta: Sequence[Tensor], group_size: int, axis: int, in_features: int
) -> tuple[Tensor, Tensor | None]:
    """``scale`` and ``zero_point`` in float32; those that are uint8 are read through their own scales in ``meta``."""
    rest, columns = list(meta), -(-in_features // group_size) if axis == 1 else in_features

    def plain(values: Tensor) -> Tensor:
        if values.dtype != torch.uint8:
            return values.to(torch.float32)
        own = [expand_groups(rest.pop(0).to(torch.float32), values.shape[-2], columns, 0, 0) for _ in range(2)]
        return (unpack_meta(values, columns).to(torch.float32) - own[1]) * own[0]

    return plain(scale), None if zero_point is None else plain(zero_point)


def dequantize(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, meta: Sequence[Tensor], nbits: int, format: str,
    group_size: int, axis: int, in_features: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    codes = unpack(qdata, nbits, in_features)
    size = (codes.shape[-2], in_features, group_size, axis)
    scale, zero_point = plain_meta(scale, zero_point, meta, group_size, axis, in_features)
    fmt = get_format(format)
    if zero_point is not None and fmt.has_zero_point:
        zero_point = expand_groups(zero_point, *size)
    return fmt.decode(codes, expand_groups(scale, *size), zero_point, nbits).to(dtype)


Settings = tuple[int, str, int, int, int]
"""nbits, format, group_size, axis, in_features."""


def activation_group(group_size: int, axis: int, in_features: int) -> int:
    """Features that share a step under ``activation="int8"``: 64, or 128 where the weight has groups of 128."""
    return 128 if axis == 1 and group_size == 128 < in_features else 64


def int8_activations(x: Tensor, size: int) -> Tensor:
    """float32 ``x [..., K]`` rounded to 8-bit integers: a step for each token and ``size`` features, max / 127."""
    K = x.shape[-1]
    runs = torch.nn.functional.pad(x, (0, -K % size)).unflatten(-1, (-1, size))
    top = runs.abs().amax(-1, keepdim=True)
    inverse = torch.where(top == 0, 0.0, torch.full_like(top, 127) / top)  # `127 / top` is 127 times a rounded 1 / top
    return ((runs * inverse).round() * (top / 127)).flatten(-2)[..., :K]


def _int8_product(x: Tensor, w: Sequence[Tensor | None], meta: Sequence[Tensor], settings: Settings) -> Tensor:
    """``x [M, K]`` times the transpose of one packed weight, activations as 8-bit integers; float32 ``[M, N]``.

    With groups along out_features the scale of each column belongs to the activations before they are rounded.
    """
    nbits, format, group_size, axis, K = settings
    qdata, scale, zero = w
    assert qdata is not None and scale is not None
    size, x = activation_group(group_size, axis, K), x.to(torch.float32)
    if axis == 1:
        dense = dequantize(qdata, scale, zero, meta, *settings, torch.float32)
        return int8_activations(x, size) @ dense.t()
    scale, zero = plain_meta(scale, zero, meta, group_size, axis, K)
    out, one = x.new_empty(x.shape[0], qdata.shape[0]), scale.new_ones(())
    for g in range(scale.shape[0]):
        own = zero if zero is None or get_format(format).learned else zero[g]
        codes = get_format(format).decode(unpack(qdata[g :: scale.shape[0]], nbits, K), one, own, nbits)
        out[:, g :: scale.shape[0]] = int8_activations(x * scale[g], size) @ codes.t()
    return out


def _product(
    x: Tensor, w: Sequence[Tensor | None], meta: Sequence[Tensor], act_pre_scale: Tensor | None, settings: Settings,
    activation: str,
) -> Tensor:  # fmt: skip
    """``x [..., K]`` times the transpose of one packed weight: ``[..., N]`` in x's dtype."""
    if act_pre_scale is not None:
        x = x * act_pre_scale.to(x.dtype)
    if activation == "int8":
        return _int8_product(x.reshape(-1, x.shape[-1]), w, meta, settings).to(x.dtype).reshape(*x.shape[:-1], -1)
    return x @ dequantize(w[0], w[1], w[2], meta, *settings, x.dtype).t()  # type: ignore[arg-type]


def linear(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    act_pre_scale: Tensor | None, meta: Sequence[Tensor], nbits: int, format: str, group_size: int, axis: int,
    in_features: int, activation: str,
) -> Tensor:  # fmt: skip
    settings = (nbits, format, group_size, axis, in_features)
    y = _product(x, (qdata, scale, zero_point), meta, act_pre_scale, settings, activation)
    return y if bias is None else y + bias.to(x.dtype)


def _expert(index: int, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t if t is None or t.ndim < 3 else t[index] for t in tensors]


def batched_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, act_pre_scale: Tensor | None,
    meta: Sequence[Tensor], nbits: int, format: str, group_size: int, axis: int, in_features: int, activation: str,
) -> Tensor:  # fmt: skip
    S = x.shape[1]
    ends = torch.arange(1, x.shape[0] + 1) * S
    rest = (act_pre_scale, meta, nbits, format, group_size, axis, in_features, activation)
    return grouped_linear(x.flatten(0, 1), ends, qdata, scale, zero_point, *rest).unflatten(0, (-1, S))  # type: ignore[arg-type]


def grouped_linear(
    x: Tensor, offsets: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, act_pre_scale: Tensor | None,
    meta: Sequence[Tensor], nbits: int, format: str, group_size: int, axis: int, in_features: int, activation: str,
) -> Tensor:  # fmt: skip
    settings = (nbits, format, group_size, axis, in_features)
    out = x.new_zeros(x.shape[0], qdata.shape[-2])
    first = 0
    for expert, last in enumerate(offsets.tolist()):
        if last > first:
            w, own = _expert(expert, (qdata, scale, zero_point)), _expert(expert, meta)
            out[first:last] = _product(x[first:last], w, own, act_pre_scale, settings, activation)  # type: ignore[arg-type]
        first = max(first, last)
    return out


def embedding(
    indices: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, meta: Sequence[Tensor], nbits: int,
    format: str, group_size: int, axis: int, in_features: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    rows, fmt = indices.reshape(-1), get_format(format)
    scale, zero_point = plain_meta(scale, zero_point, meta, group_size, axis, in_features)
    own = rows if axis == 1 else rows % scale.shape[-2]
    size = (rows.numel(), in_features, group_size, axis)

    def pick(t: Tensor) -> Tensor:
        return expand_groups(t[own], *size) if axis == 1 else t[own]

    if zero_point is not None and fmt.has_zero_point:
        zero_point = pick(zero_point)
    elif zero_point is not None and zero_point.numel() > zero_point.shape[-1]:  # a codebook for each row
        zero_point = zero_point[rows]
    codes = unpack(qdata[rows], nbits, in_features)
    out = fmt.decode(codes, pick(scale), zero_point, nbits).to(dtype)
    return out.reshape(*indices.shape, in_features)


register_backend(
    Backend(
        "dequantize",
        {
            "linear": linear,
            "batched_linear": batched_linear,
            "grouped_linear": grouped_linear,
            "embedding": embedding,
            "dequantize": dequantize,
        },
    )
)
