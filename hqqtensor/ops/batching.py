# mypy: disable-error-code="no-untyped-def"
"""The operators under ``torch.func.vmap``: activations or indices are mapped over one weight, weights are not."""

import torch
from torch.utils._pytree import tree_leaves

from hqqtensor.ops.definitions import LIBRARY, OPS, PRODUCTS, SCHEMAS
from hqqtensor.ops.packed import flat, structured


def _refuse(name: str):
    public = name.removeprefix("_")

    def rule(info, in_dims, *args):
        raise NotImplementedError(
            f"torch.func.vmap of hqqtensor::{public} is not offered for these arguments: activations of a linear layer "
            "and indices of an embedding can be mapped over one quantized weight; for all else dequantize() the weight "
            "first, or hqqtensor.dequantize_(model) the model"
        )

    return rule


def mapped_linear(product, in_dims, x, w, bias, act_pre_scale, activation):
    """``product``, a linear layer, mapped over x, the bias or both, which becomes a leading dimension of the result.

    in_dims: the dimension of each following argument that is mapped over, None where none is.
    """
    x_dim, w_dims, bias_dim, act_dim, _ = in_dims
    if any(dim is not None for dim in tree_leaves((w_dims, act_dim))):
        _refuse("linear")(None, in_dims)
    x = x[None] if x_dim is None else x.movedim(x_dim, 0)
    if bias_dim is None:
        return product(x, w, bias, act_pre_scale, activation), 0
    out = product(x, w, None, act_pre_scale, activation)
    bias = bias.movedim(bias_dim, 0)
    return out + bias.view(-1, *[1] * (out.ndim - 2), bias.shape[-1]), 0


def _linear(info, in_dims, *args):
    # The public operator: what is mapped over may need a gradient that the mapped tensor does not tell of.
    def product(*args):
        return OPS.linear(*flat("linear", args))

    return mapped_linear(product, structured("linear", in_dims), *structured("linear", args))


def _embedding(info, in_dims, indices, *weight):
    if any(dim is not None for dim in tree_leaves(in_dims[1:])):
        _refuse("embedding")(info, in_dims)
    return OPS.embedding(indices.movedim(in_dims[0], 0), *weight), 0


_RULES = {"linear": _linear, "embedding": _embedding}
for _op in SCHEMAS:
    for _name in (_op, f"registry_{_op}", *([f"_{_op}"] if _op in PRODUCTS else [])):
        torch.library.register_vmap(f"hqqtensor::{_name}", _RULES.get(_op, _refuse(_name)), lib=LIBRARY)
