"""The operators as functions of Python, with a packed weight as one argument: what the rest of the package calls.

While torch.compile or torch.export traces, a product is the public operator (``hqqtensor::linear``), one node of the
graph. Eager code goes straight to the kernels where no gradient is asked for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hqqtensor.ops import gradients
from hqqtensor.ops.definitions import OPS, join_many
from hqqtensor.ops.packed import PackedWeight, flat

_linear = OPS._linear.default
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_precision = torch.get_float32_matmul_precision


@torch.compiler.assume_constant_result
def _rounds_float32() -> bool:
    return _precision() != "highest"


def precise(activation: str, x: Tensor) -> str:
    """ "high" for "float" where ``torch.set_float32_matmul_precision`` allows float32 inputs to be rounded.

    It is asked when the operator is called, by what calls it: torch.compile compiles again when the answer changes, an
    exported graph keeps the answer that it was traced with.
    """
    return "high" if activation == "float" and _rounds_float32() and x.dtype == torch.float32 else activation


def linear(
    x: Tensor, w: PackedWeight, bias: Tensor | None = None, act_pre_scale: Tensor | None = None,
    activation: str = "float",
) -> Tensor:  # fmt: skip
    """x ``[..., K]``, times act_pre_scale ``[K]``, times the transpose of w ``[N, K]``, plus bias ``[N]``: ``[..., N]``
    in x's dtype. RuntimeError where shapes, dtypes or devices do not fit."""
    if _is_compiling():
        return OPS.linear(*flat("linear", (x, w, bias, act_pre_scale, precise(activation, x))))
    # Written out: this is the call that decoding makes hundreds of times for a token.
    if activation == "float" and _precision() != "highest" and x.dtype == torch.float32:
        activation = "high"
    if forward_ad._current_level >= 0 or (
        _is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    ):
        return gradients.linear(x, w, bias, act_pre_scale, activation)
    qdata, scale, zero, meta, nbits, format, group_size, axis, K = w
    return _linear(
        x, qdata, scale, zero, bias, act_pre_scale, meta, nbits, format, group_size, axis, K, activation
    )  # fmt: skip


def linear_many(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None] = (), activation: str = "float",
    act_pre_scales: Sequence[Tensor | None] = (),
) -> Tensor:  # fmt: skip
    """The products of x ``[..., K]`` with several weights ``[N_i, K]`` of equal settings beside each other:
    ``[..., sum of N_i]``. biases ``[N_i]``, act_pre_scales ``[K]``: one for each weight, or none at all."""
    none: list[Tensor | None] = [None] * len(weights)
    activation, biases, act_pre_scales = precise(activation, x), list(biases) or none, list(act_pre_scales) or none
    args = join_many(x, weights, biases, activation, act_pre_scales)
    if _is_compiling():
        return OPS.linear_many(*args)
    if gradients.wanted(x, *biases):
        return gradients.linear_many(x, weights, biases, activation, act_pre_scales)
    return OPS._linear_many(*args)


def batched_linear(
    x: Tensor, w: PackedWeight, act_pre_scale: Tensor | None = None, activation: str = "float"
) -> Tensor:
    """x ``[E, M, K]`` times the transpose of each of the weights ``[E, N, K]``: ``[E, M, N]``."""
    activation = precise(activation, x)
    args = flat("batched_linear", (x, w, act_pre_scale, activation))
    if _is_compiling():
        return OPS.batched_linear(*args)
    if gradients.wanted(x):
        return gradients.batched_linear(x, w, act_pre_scale, activation)
    return OPS._batched_linear(*args)


def grouped_linear(
    x: Tensor, offsets: Tensor, w: PackedWeight, act_pre_scale: Tensor | None = None, activation: str = "float"
) -> Tensor:
    """Rows of x ``[S, K]`` in runs, run e (up to offsets[e]) times the transpose of weight e of ``[E, N, K]``:
    ``[S, N]``; rows from offsets[-1] on are zero."""
    activation = precise(activation, x)
    args = flat("grouped_linear", (x, offsets, w, act_pre_scale, activation))
    if _is_compiling():
        return OPS.grouped_linear(*args)
    if gradients.wanted(x):
        return gradients.grouped_linear(x, offsets, w, act_pre_scale, activation)
    return OPS._grouped_linear(*args)


def dequantize(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The dense weights ``[..., N, K]`` of a floating dtype."""
    return OPS.dequantize(*w, dtype)


def dequantize_into(out: Tensor, w: PackedWeight) -> None:
    """The dense weights, written into out ``[..., N, K]`` of any floating dtype, whose last dimension has stride 1."""
    OPS.dequantize_into(out, *w)


def embedding(indices: Tensor, w: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows ``indices`` (any shape, integers) of the weight ``[N, K]``: ``[*indices.shape, K]`` of a floating dtype.

    IndexError for an index outside of 0 to N - 1 on a CPU; a row of NaN on a GPU.
    """
    try:
        return OPS.embedding(indices, *w, dtype)
    except RuntimeError as error:  # operators cannot raise another error through torch's stable ABI
        if str(error).startswith("embedding: index "):
            raise IndexError(str(error)) from None
        raise
