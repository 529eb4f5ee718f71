"""The product with a packed weight whose scales and zero points are trained: gradients to them, never to codes."""

from typing import Any

import torch
from torch import Tensor

from hqqtensor.formats import get_format
from hqqtensor.ops import reference
from hqqtensor.ops.definitions import OPS
from hqqtensor.ops.packed import PackedWeight, flat
from hqqtensor.ops.pieces import PIECE_BYTES, times_dense


def trained_linear(
    x: Tensor, w: PackedWeight, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    act_pre_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """``ops.linear`` with float32 ``scale`` and ``zero_point`` in place of those of ``w``, and gradients to both.

    x ``[..., K]``, w ``[N, K]``; scale and zero_point have the plain shapes of ``HQQTensor``. The product is the fused
    one; gradients take ``pieces.PIECE_BYTES`` of dense weights at a time.
    """
    return _TrainedLinear.apply(x, scale, zero_point, bias, act_pre_scale, w)


class _TrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, act: Tensor | None,
        w: PackedWeight,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, w.qdata, scale, zero, act)
        ctx.settings = w[4:]
        ctx.bias_dtype = None if bias is None else bias.dtype
        packed = PackedWeight(w.qdata, scale, zero, None, *ctx.settings)
        return OPS._linear(*flat("linear", (x, packed, bias, act, "float")))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, qdata, scale, zero, act = ctx.saved_tensors
        w = PackedWeight(qdata, scale, zero, None, *ctx.settings)
        grad_x = grad_scale = grad_zero = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = times_dense(grad, w)
            grad_x = grad_x if act is None else grad_x * act.to(grad_x.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            inputs = x.reshape(-1, x.shape[-1]).to(torch.float32)
            inputs = inputs if act is None else inputs * act.to(torch.float32)
            grad_scale, grad_zero = _to_numbers(rows.to(torch.float32), inputs, w)
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_scale, grad_zero, grad_bias, None, None


def _to_numbers(grad: Tensor, x: Tensor, w: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """Gradients of scale and zero point, from those of outputs ``[T, N]`` and the inputs ``[T, K]``, float32."""
    total = [torch.zeros_like(t) for t in (w.scale, w.zero_point) if t is not None]
    count = max(1, PIECE_BYTES // (4 * w.in_features))
    if w.axis == 0:  # row n has group n % groups, so pieces of whole periods have all groups in order
        groups = w.scale.shape[-2]
        count = max(groups, count // groups * groups)
    for first in range(0, grad.shape[1], count):
        rows = slice(first, first + count)
        places = _places(w, rows)
        numbers = (w.scale, w.zero_point)
        leaves = [t[at].detach().requires_grad_() for t, at in zip(numbers, places, strict=True) if t is not None]
        zero = leaves[1] if len(leaves) > 1 else None
        with torch.enable_grad():
            piece = w._replace(qdata=w.qdata[rows], scale=leaves[0], zero_point=zero)
            dense = reference.dequantize(piece, torch.float32)
        parts = torch.autograd.grad(dense, leaves, grad[:, rows].t() @ x)
        for whole, at, part in zip(total, places, parts, strict=False):
            whole[at] += part
    return total[0], total[1] if len(total) > 1 else None


def _places(w: PackedWeight, rows: slice) -> tuple[slice, slice]:
    """Which rows of scale and zero point are those of ``rows`` of the weight; all, where rows share them."""
    whole = slice(None)
    scale = rows if w.axis == 1 else whole
    if w.zero_point is None or not get_format(w.format).learned:
        return scale, scale
    return scale, whole if w.zero_point.shape[-2] == 1 else rows
