"""Gradients of the operators in Python: to the activations (and bias), never to codes."""

import torch

from hqqtensor.ops.definitions import LIBRARY, dequantize


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


def register() -> None:
    """Give the operators these gradients; the compiled extension has the same in C++ and takes their place."""
    library = torch.library.register_autograd
    library("hqqtensor::linear", _linear_backward, setup_context=_save_linear, lib=LIBRARY)
    library("hqqtensor::batched_linear", _batched_backward, setup_context=_save_batched, lib=LIBRARY)
