"""Gradients of the products, backward and forward: to the activations (and bias), never to codes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hqqtensor.ops import reference
from hqqtensor.ops.batching import mapped_linear
from hqqtensor.ops.definitions import LIBRARY, OPS, split_many
from hqqtensor.ops.packed import PackedWeight, flat, structured
from hqqtensor.ops.pieces import batched_times_dense, grouped_times_dense, times_dense


def forward_mode() -> bool:
    """Whether code runs within ``torch.func.jvp`` or ``forward_ad.dual_level``, where any tensor may have a tangent."""
    return forward_ad._current_level >= 0


def wanted(*tensors: Tensor | None) -> bool:
    """Whether a product of these must have a gradient."""
    asked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return asked or forward_mode()


def _save(ctx: Any, w: PackedWeight, act_pre_scale: Tensor | None, *more: Tensor) -> None:
    tensors = (w.qdata, w.scale, w.zero_point, act_pre_scale, *more, *(w.meta or ()))
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.settings, ctx.more = w[4:], len(more)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """The packed weight, the scale of the activations, and what else was saved."""
    qdata, scale, zero_point, act_pre_scale, *rest = ctx.saved_tensors
    w = PackedWeight(qdata, scale, zero_point, rest[ctx.more :] or None, *ctx.settings)
    return w, act_pre_scale, *rest[: ctx.more]


def _scaled(grad: Tensor, act_pre_scale: Tensor | None) -> Tensor:
    return grad if act_pre_scale is None else grad * act_pre_scale.to(grad.dtype)


class _Product(torch.autograd.Function):
    """What all products have: they are linear in x and bias, so a tangent goes through the same product.

    The tangent's activations stay "float", as in ``backward``, where those of the product itself may be "int8".
    """


class _Linear(_Product):
    @staticmethod
    def forward(x: Tensor, *rest: Any) -> Tensor:
        return OPS._linear(*flat("linear", (x, *rest)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, w, bias, act_pre_scale, _ = inputs
        _save(ctx, w, act_pre_scale)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            w, act = _saved(ctx)
            grad_x = _scaled(times_dense(grad, w), act)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, w: Any, bias: Tensor | None, *_: Any) -> Tensor:
        packed, act = _saved(ctx)
        return linear(x, packed, bias, act, "float")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:  # type: ignore[override]
        return mapped_linear(linear, in_dims, *args)


class _Batched(_Product):
    @staticmethod
    def forward(x: Tensor, *rest: Any) -> Tensor:
        return OPS._batched_linear(*flat("batched_linear", (x, *rest)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs[1], inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        w, act = _saved(ctx)
        return _scaled(batched_times_dense(grad, w), act), None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Tensor:
        w, act = _saved(ctx)
        return batched_linear(x, w, act, "float")


class _Grouped(_Product):
    @staticmethod
    def forward(x: Tensor, *rest: Any) -> Tensor:
        return OPS._grouped_linear(*flat("grouped_linear", (x, *rest)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, offsets, w, act_pre_scale, _ = inputs
        _save(ctx, w, act_pre_scale, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        packed, act, offsets = _saved(ctx)
        return _scaled(grouped_times_dense(grad, offsets, packed), act), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Tensor:
        w, act, offsets = _saved(ctx)
        return grouped_linear(x, offsets, w, act, "float")


def linear(x: Tensor, w: PackedWeight, bias: Tensor | None, act_pre_scale: Tensor | None, activation: str) -> Tensor:
    """``hqqtensor::linear`` with a gradient."""
    return _Linear.apply(x, w, bias, act_pre_scale, activation)


def batched_linear(x: Tensor, w: PackedWeight, act_pre_scale: Tensor | None, activation: str) -> Tensor:
    """``hqqtensor::batched_linear`` with a gradient."""
    return _Batched.apply(x, w, act_pre_scale, activation)


def grouped_linear(
    x: Tensor, offsets: Tensor, w: PackedWeight, act_pre_scale: Tensor | None, activation: str
) -> Tensor:
    """``hqqtensor::grouped_linear`` with a gradient."""
    return _Grouped.apply(x, offsets, w, act_pre_scale, activation)


def linear_many(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], activation: str,
    act_pre_scales: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """``hqqtensor::linear_many`` with a gradient: a product for each weight, of the same results to the last bit."""
    each = zip(weights, biases, act_pre_scales, strict=True)
    return torch.cat([_Linear.apply(x, w, b, s, activation) for w, b, s in each], -1)


def _public(op: str, differentiable: Any) -> Any:
    """What the public operator does while autograd may be on."""
    plain = getattr(OPS, f"_{op}").default

    def run(*args: Any) -> Tensor:
        ours = structured(op, args)
        if not wanted(args[0], ours[2] if op == "linear" else None):
            return plain(*args)
        if not torch._C._are_functorch_transforms_active():
            return differentiable(*ours)
        # No autograd.Function can be called below torch's dispatcher within torch.func.
        if ours[-1] == "int8":
            raise NotImplementedError(f"hqqtensor::{op}: torch.func cannot differentiate int8 activations here")
        return getattr(reference, op)(*ours)

    return run


def _public_many(*args: Any) -> Tensor:
    x, weights, biases, activation, pre = split_many(*args)
    if not wanted(x, *biases):
        return OPS._linear_many(*args)
    if not torch._C._are_functorch_transforms_active():
        return linear_many(x, weights, biases, activation, pre)
    each = zip(weights, biases, pre, strict=True)
    return torch.cat([OPS.linear(*flat("linear", (x, w, b, s, activation))) for w, b, s in each], -1)


for _function in (linear, batched_linear, grouped_linear):
    LIBRARY.impl(_function.__name__, _public(_function.__name__, _function), "Autograd")
LIBRARY.impl("linear_many", _public_many, "Autograd")
