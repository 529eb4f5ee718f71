"""Gradients of the products: to the activations (and bias), never to codes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqqtensor.ops.definitions import LIBRARY, OPS, split_many
from hqqtensor.ops.packed import PackedWeight, flat, structured


def wanted(*tensors: Tensor | None) -> bool:
    """Whether a product of these must have a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _save(ctx: Any, w: PackedWeight, act_pre_scale: Tensor | None, *more: Tensor) -> None:
    ctx.save_for_backward(w.qdata, w.scale, w.zero_point, act_pre_scale, *more, *(w.meta or ()))
    ctx.settings, ctx.more = w[4:], len(more)


def _saved(ctx: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    """The dense weight, the scale of the activations, and what else was saved."""
    qdata, scale, zero_point, act_pre_scale, *rest = ctx.saved_tensors
    w = OPS.dequantize(qdata, scale, zero_point, rest[ctx.more :] or None, *ctx.settings, dtype)
    return w, act_pre_scale, *rest[: ctx.more]


def _scaled(grad: Tensor, act_pre_scale: Tensor | None) -> Tensor:
    return grad if act_pre_scale is None else grad * act_pre_scale.to(grad.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        w, act_pre_scale, activation = rest
        return OPS._linear(*flat("linear", (x, w, bias, act_pre_scale, activation)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bias, w, act_pre_scale, _ = inputs
        _save(ctx, w, act_pre_scale)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            w, act = _saved(ctx, grad.dtype)
            grad_x = _scaled(grad @ w, act)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None


class _Batched(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, *rest: Any) -> Tensor:
        return OPS._batched_linear(*flat("batched_linear", (x, *rest)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        w, act = _saved(ctx, grad.dtype)
        return _scaled(torch.bmm(grad, w), act), None, None, None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, *rest: Any) -> Tensor:
        return OPS._grouped_linear(*flat("grouped_linear", (x, *rest)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, offsets, w, act_pre_scale, _ = inputs
        _save(ctx, w, act_pre_scale, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        w, act, offsets = _saved(ctx, grad.dtype)
        out, first = grad.new_zeros(grad.shape[0], w.shape[-1]), 0
        for expert, last in enumerate(offsets.tolist()):
            out[first:last] = grad[first:last] @ w[expert]
            first = max(first, last)
        return _scaled(out, act), None, None, None, None


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None, act_pre_scale: Tensor | None, activation: str) -> Tensor:
    """``hqqtensor::linear`` with a gradient."""
    return _Linear.apply(x, bias, w, act_pre_scale, activation)


def batched_linear(x: Tensor, w: PackedWeight, act_pre_scale: Tensor | None, activation: str) -> Tensor:
    """``hqqtensor::batched_linear`` with a gradient."""
    return _Batched.apply(x, w, act_pre_scale, activation)


def grouped_linear(
    x: Tensor, offsets: Tensor, w: PackedWeight, act_pre_scale: Tensor | None, activation: str
) -> Tensor:
    """``hqqtensor::grouped_linear`` with a gradient."""
    return _Grouped.apply(x, offsets, w, act_pre_scale, activation)


def linear_many(x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], activation: str) -> Tensor:
    """``hqqtensor::linear_many`` with a gradient: a product for each weight, of the same results to the last bit."""
    each = zip(weights, biases, strict=True)
    return torch.cat([_Linear.apply(x, b, w, None, activation) for w, b in each], -1)


def _public(op: str, differentiable: Any) -> Any:
    """What the public operator does while autograd may be on."""
    plain = getattr(OPS, f"_{op}").default

    def run(*args: Any) -> Tensor:
        ours = structured(op, args)
        if wanted(args[0], ours[2] if op == "linear" else None):
            return differentiable(*ours)
        return plain(*args)

    return run


def _public_many(*args: Any) -> Tensor:
    x, weights, biases, activation = split_many(*args)
    if wanted(x, *biases):
        return linear_many(x, weights, biases, activation)
    return OPS._linear_many(*args)


for _function in (linear, batched_linear, grouped_linear):
    LIBRARY.impl(_function.__name__, _public(_function.__name__, _function), "Autograd")
LIBRARY.impl("linear_many", _public_many, "Autograd")
