# mypy: disable-error-code="no-untyped-def"
"""Products with an HQQTensor: linear, matrix products, convolutions, embedding."""

import torch
from torch import Tensor

from hqqtensor import ops
from hqqtensor.tensor import HQQTensor
from hqqtensor.transforms import rotate, to_inputs

aten = torch.ops.aten
implements = HQQTensor.implements
implements_torch_function = HQQTensor.implements_torch_function


_is_autocast = torch._C._is_any_autocast_enabled


def _activations(x: Tensor) -> Tensor:
    """Autocast does not know our ops; do for their input what it would do for a dense linear."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def inputs_of(x: Tensor, weight: HQQTensor) -> tuple[Tensor, Tensor | None]:
    """The activations for the operators, and the scale that they are to multiply them with."""
    if _is_autocast():
        x = _activations(x)
    if weight.rotation:
        return to_inputs(x, weight.act_pre_scale, weight.rotation), None
    return x, weight.act_pre_scale


def linear(x: Tensor, weight: HQQTensor, bias: Tensor | None) -> Tensor:
    """``x [..., K]`` times the transpose of a weight ``[N, K]`` that is not transposed, plus ``bias``."""
    if isinstance(x, HQQTensor):
        x = x.dequantize()
    if not weight.in_features:  # an empty slice: kernels take no row without codes
        bias = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x, x.new_empty(weight.out_features, 0), bias)
    # As `inputs_of`, without the calls: decoding comes here hundreds of times for a token.
    act = weight.act_pre_scale
    if weight.rotation or _is_autocast():
        x, act = inputs_of(x, weight)
    return ops.linear(x, weight.operand(), bias, act, weight.activation)


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight`` where either may be quantized; fused where weight is a transposed HQQTensor."""
    if isinstance(weight, HQQTensor) and weight.transposed and not isinstance(x, HQQTensor):
        if weight.ndim == 2:
            return linear(x, weight, None)
        if weight.ndim == 3 and x.ndim == 3 and x.shape[0] == weight.shape[0] and weight.in_features:
            x, act = inputs_of(x, weight)
            return ops.batched_linear(x, weight.operand(), act, weight.activation)
    first = isinstance(x, HQQTensor) and x.row_dims == 1 and not x.transposed and not isinstance(weight, HQQTensor)
    if first and x.ndim == weight.ndim == 3:
        # A product of the transposes: the kernels take weights as the second operand.
        return _matmul(weight.transpose(-1, -2), x.transpose(-1, -2)).transpose(-1, -2)
    x, weight = (t.dequantize() if isinstance(t, HQQTensor) else t for t in (x, weight))
    return torch.matmul(x, weight)


@implements([aten.linear.default])
@implements_torch_function([torch.nn.functional.linear])
def _(func, types, args, kwargs):
    def call(input, weight, bias=None):
        if isinstance(weight, HQQTensor) and weight.ndim == 2 and not weight.transposed:
            return linear(input, weight, bias)
        dense = [t.dequantize() if isinstance(t, HQQTensor) else t for t in (input, weight)]
        return torch.nn.functional.linear(dense[0], dense[1], bias)

    return call(*args, **(kwargs or {}))


@implements([aten.mm.default, aten.bmm.default, aten.matmul.default])
@implements_torch_function([torch.mm, torch.bmm, torch.matmul, Tensor.mm, Tensor.bmm, Tensor.matmul, Tensor.__matmul__])
def _(func, types, args, kwargs):
    return _matmul(*args, **(kwargs or {}))


@implements([aten._grouped_mm.default])
@implements_torch_function([torch._grouped_mm])
def _(func, types, args, kwargs):
    def call(x, weight, offs=None, bias=None, out_dtype=None):
        experts = isinstance(weight, HQQTensor) and weight.transposed and weight.ndim == 3
        if not experts or isinstance(x, HQQTensor) or x.ndim != 2 or offs is None or bias is not None:
            raise NotImplementedError(
                "grouped_mm: needs x [S, K], offs and a transposed 3-D HQQTensor [E, K, N], and no bias"
            )
        if not weight.in_features:
            return x.new_zeros(x.shape[0], weight.out_features, dtype=out_dtype)
        x, act = inputs_of(x, weight)
        out = ops.grouped_linear(x, offs, weight.operand(), act, weight.activation)
        return out if out_dtype is None else out.to(out_dtype)

    return call(*args, **(kwargs or {}))


@implements_torch_function([Tensor.__rmatmul__])
def _(func, types, args, kwargs):
    return _matmul(args[1], args[0])


@implements([aten.addmm.default])
@implements_torch_function([torch.addmm, Tensor.addmm])
def _(func, types, args, kwargs):
    bias, x, weight = args
    beta, alpha = (kwargs or {}).get("beta", 1), (kwargs or {}).get("alpha", 1)
    if beta == 1 and alpha == 1 and isinstance(weight, HQQTensor) and weight.transposed and bias.ndim == 1:
        return linear(x, weight, bias)
    return beta * bias + alpha * _matmul(x, weight)


_CONVOLUTIONS = [f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)]


@implements([aten.convolution.default])
@implements_torch_function([getattr(torch.nn.functional, name) for name in _CONVOLUTIONS])
def _(func, types, args, kwargs):
    def dense(value):
        return value.dequantize() if isinstance(value, HQQTensor) else value

    return func(*map(dense, args), **{name: dense(value) for name, value in (kwargs or {}).items()})


@implements([aten.embedding.default])
@implements_torch_function([torch.nn.functional.embedding])
def _(func, types, args, kwargs):
    kwargs = kwargs or {}
    if func is torch.nn.functional.embedding:
        indices = kwargs.get("input", args[0] if args else None)
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        rest = args[3:]
        if kwargs.get("max_norm") is not None or (rest and rest[0] is not None):
            raise NotImplementedError("embedding: max_norm rewrites rows, which a quantized weight cannot do")
    else:
        weight, indices = args[0], args[1]
    if not isinstance(weight, HQQTensor) or weight.ndim != 2 or weight.transposed:
        raise NotImplementedError("embedding: needs a 2-D HQQTensor weight that is not transposed")
    if not weight.in_features:
        return torch.nn.functional.embedding(indices, weight.dequantize())
    out = ops.embedding(indices, weight.operand(), torch.float32 if weight.rotation else weight.dtype)
    if weight.rotation:
        out = rotate(out, weight.rotation).to(weight.dtype)
    return out if weight.act_pre_scale is None else out * weight.act_pre_scale.to(out.dtype)
