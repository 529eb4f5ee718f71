# mypy: disable-error-code="no-untyped-def"
"""The operators under ``torch.func.vmap``: activations or indices are mapped over one weight, weights are not."""

import torch
from torch.utils._pytree import tree_leaves

from hqqtensor.ops.definitions import LIBRARY, PRODUCTS, SCHEMAS

_WITH_LEADING_DIMENSIONS = ("linear", "embedding")
"""Operators whose first argument may have any leading dimensions: what is mapped over becomes one more."""


def _refuse(name: str):
    public = name.removeprefix("_")

    def rule(info, in_dims, *args):
        raise NotImplementedError(
            f"torch.func.vmap of hqqtensor::{public} is not offered for these arguments: activations of a linear layer "
            "and indices of an embedding can be mapped over one quantized weight; for all else dequantize() the weight "
            "first, or hqqtensor.dequantize_(model) the model"
        )

    return rule


def _with_leading_dimension(name: str):
    # The public operator: what is mapped over may need a gradient that the mapped tensor does not tell of.
    operator = getattr(torch.ops.hqqtensor, name.removeprefix("_")).default
    bias = {argument.name: place for place, argument in enumerate(operator._schema.arguments)}.get("bias")

    def rule(info, in_dims, *args):
        """``in_dims``: of each argument the dimension that is mapped over, None where none is."""
        mapped = {place for place, dim in enumerate(in_dims) if any(d is not None for d in tree_leaves(dim))}
        if mapped - {0, bias}:
            _refuse(name)(info, in_dims, *args)
        first, *others = args
        if bias is None or bias not in mapped:
            return operator(first.movedim(in_dims[0], 0), *others), 0
        others[bias - 1] = None
        out = operator(first.movedim(in_dims[0], 0) if 0 in mapped else first[None], *others)
        added = args[bias].movedim(in_dims[bias], 0)
        return out + added.view(-1, *[1] * (out.ndim - 2), added.shape[-1]), 0

    return rule


for _op in SCHEMAS:
    for _name in (_op, f"registry_{_op}", *([f"_{_op}"] if _op in PRODUCTS else [])):
        _rule = _with_leading_dimension if _op in _WITH_LEADING_DIMENSIONS else _refuse
        torch.library.register_vmap(f"hqqtensor::{_name}", _rule(_name), lib=LIBRARY)
