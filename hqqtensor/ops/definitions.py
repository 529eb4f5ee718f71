"""The torch.library operators, their fake kernels and their gradients.

Each operator asks the backend registry for its kernel when it runs, so a compiled graph follows
``set_backend`` as eager code does. Gradients flow to the activations (and bias), never to codes.
"""

import torch
from torch import Tensor

from hqqtensor.ops import reference as reference  # registers the plain backend
from hqqtensor.ops.backend import kernel


@torch.library.custom_op("hqqtensor::dequantize", mutates_args=())
def dequantize(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, nbits: int, format: str,
    group_size: int, axis: int, in_features: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Weights ``[..., N, K]`` of ``dtype`` from packed rows ``[..., N, row_bytes]``."""
    run = kernel("dequantize", qdata.device.type)
    return run(qdata, scale, zero_point, nbits, format, group_size, axis, in_features, dtype)


@dequantize.register_fake
def _(qdata, scale, zero_point, nbits, format, group_size, axis, in_features, dtype):  # type: ignore[no-untyped-def]
    return qdata.new_empty(*qdata.shape[:-1], in_features, dtype=dtype)


@torch.library.custom_op("hqqtensor::linear", mutates_args=())
def linear(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
    act_pre_scale: Tensor | None, nbits: int, format: str, group_size: int, axis: int, in_features: int,
) -> Tensor:  # fmt: skip
    """``x [..., K]`` times the transpose of packed weights ``[N, K]``, plus bias: ``[..., N]`` in x's dtype."""
    run = kernel("linear", x.device.type)
    return run(x, qdata, scale, zero_point, bias, act_pre_scale, nbits, format, group_size, axis, in_features)


@linear.register_fake
def _(x, qdata, scale, zero_point, bias, act_pre_scale, nbits, format, group_size, axis, in_features):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], qdata.shape[-2])


@torch.library.custom_op("hqqtensor::batched_linear", mutates_args=())
def batched_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, act_pre_scale: Tensor | None,
    nbits: int, format: str, group_size: int, axis: int, in_features: int,
) -> Tensor:  # fmt: skip
    """``x [E, M, K]`` times the transpose of each of E packed weights ``[E, N, K]``: ``[E, M, N]``."""
    run = kernel("batched_linear", x.device.type)
    return run(x, qdata, scale, zero_point, act_pre_scale, nbits, format, group_size, axis, in_features)


@batched_linear.register_fake
def _(x, qdata, scale, zero_point, act_pre_scale, nbits, format, group_size, axis, in_features):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1], qdata.shape[-2])


@torch.library.custom_op("hqqtensor::embedding", mutates_args=())
def embedding(
    indices: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, nbits: int, format: str,
    group_size: int, axis: int, in_features: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Rows ``indices`` (any shape, int) of packed weights ``[N, K]``: ``[*indices.shape, K]`` of ``dtype``."""
    run = kernel("embedding", qdata.device.type)
    return run(indices, qdata, scale, zero_point, nbits, format, group_size, axis, in_features, dtype)


@embedding.register_fake
def _(indices, qdata, scale, zero_point, nbits, format, group_size, axis, in_features, dtype):  # type: ignore[no-untyped-def]
    return qdata.new_empty(*indices.shape, in_features, dtype=dtype)


def _save_linear(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, qdata, scale, zero_point, bias, act_pre_scale, *settings = inputs
    ctx.save_for_backward(qdata, scale, zero_point, act_pre_scale)
    ctx.settings, ctx.bias_dtype = settings, None if bias is None else bias.dtype


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    qdata, scale, zero_point, act_pre_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ dequantize(qdata, scale, zero_point, *ctx.settings, grad.dtype)
        if act_pre_scale is not None:
            grad_x = grad_x * act_pre_scale.to(grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (grad_x, None, None, None, grad_bias, *([None] * 6))


linear.register_autograd(_linear_backward, setup_context=_save_linear)


def _save_batched(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, qdata, scale, zero_point, act_pre_scale, *settings = inputs
    ctx.save_for_backward(qdata, scale, zero_point, act_pre_scale)
    ctx.settings = settings


def _batched_backward(ctx, grad):  # type: ignore[no-untyped-def]
    qdata, scale, zero_point, act_pre_scale = ctx.saved_tensors
    grad_x = torch.bmm(grad, dequantize(qdata, scale, zero_point, *ctx.settings, grad.dtype))
    if act_pre_scale is not None:
        grad_x = grad_x * act_pre_scale.to(grad.dtype)
    return (grad_x, *([None] * 9))


batched_linear.register_autograd(_batched_backward, setup_context=_save_batched)
