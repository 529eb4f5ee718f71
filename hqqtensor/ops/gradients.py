"""Gradients of the operators in Python: to the activations (and bias), never to codes."""

import torch

from hqqtensor.ops.definitions import LIBRARY, dequantize


def _save(ctx, activations, weight, act_pre_scale, settings, bias=None):  # type: ignore[no-untyped-def]
    """Keep what the gradients need: of ``settings`` all but the last, which says how activations are rounded."""
    meta, *ctx.settings = settings[:-1]
    # The gradients of what comes after the weight: of a list there is a list.
    ctx.rest = ([None] * len(meta), *([None] * len(settings[1:])))
    ctx.save_for_backward(*activations, *weight, act_pre_scale, *meta)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _dense(ctx, saved, dtype):  # type: ignore[no-untyped-def]
    """The dense weight, and the scale of the activations."""
    qdata, scale, zero_point, act_pre_scale, *meta = saved
    return dequantize(qdata, scale, zero_point, meta, *ctx.settings, dtype), act_pre_scale


def _scaled(grad, act_pre_scale):  # type: ignore[no-untyped-def]
    return grad if act_pre_scale is None else grad * act_pre_scale.to(grad.dtype)


def _save_linear(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, qdata, scale, zero_point, bias, act_pre_scale, *settings = inputs
    _save(ctx, (), (qdata, scale, zero_point), act_pre_scale, settings, bias)


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        w, act = _dense(ctx, ctx.saved_tensors, grad.dtype)
        grad_x = _scaled(grad @ w, act)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (grad_x, None, None, None, grad_bias, None, *ctx.rest)


def _save_batched(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, qdata, scale, zero_point, act_pre_scale, *settings = inputs
    _save(ctx, (), (qdata, scale, zero_point), act_pre_scale, settings)


def _batched_backward(ctx, grad):  # type: ignore[no-untyped-def]
    w, act = _dense(ctx, ctx.saved_tensors, grad.dtype)
    return (_scaled(torch.bmm(grad, w), act), *([None] * 4), *ctx.rest)


def _save_grouped(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, offsets, qdata, scale, zero_point, act_pre_scale, *settings = inputs
    _save(ctx, (offsets,), (qdata, scale, zero_point), act_pre_scale, settings)


def _grouped_backward(ctx, grad):  # type: ignore[no-untyped-def]
    offsets, *saved = ctx.saved_tensors
    w, act = _dense(ctx, saved, grad.dtype)
    out, first = grad.new_zeros(grad.shape[0], w.shape[-1]), 0
    for expert, last in enumerate(offsets.tolist()):
        out[first:last] = grad[first:last] @ w[expert]
        first = max(first, last)
    return (_scaled(out, act), *([None] * 5), *ctx.rest)


def register() -> None:
    """Give the operators these gradients; the compiled extension has the same in C++ and takes their place."""
    library = torch.library.register_autograd
    library("hqqtensor::linear", _linear_backward, setup_context=_save_linear, lib=LIBRARY)
    library("hqqtensor::batched_linear", _batched_backward, setup_context=_save_batched, lib=LIBRARY)
    library("hqqtensor::grouped_linear", _grouped_backward, setup_context=_save_grouped, lib=LIBRARY)
