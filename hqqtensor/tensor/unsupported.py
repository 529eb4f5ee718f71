# mypy: disable-error-code="no-untyped-def"
"""What an HQQTensor says to functions that need its numbers and that it does not offer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves

from hqqtensor.integrations.patches import problems
from hqqtensor.tensor import HQQTensor


class UnsupportedOperation(NotImplementedError):
    """An operation that is not offered for an HQQTensor; the text says to dequantize first."""

    def of(self, func: Callable) -> "UnsupportedOperation":
        """The same, named after the function that the user called instead of the operator that it came to."""
        _, after = str(self).split(_AFTER_NAME, 1)
        return UnsupportedOperation(_name(func) + _AFTER_NAME + after)


_AFTER_NAME = " is not offered for a quantized weight"


def unsupported(func: Callable, args: Any, kwargs: Any) -> UnsupportedOperation:
    """The error for ``func`` with an HQQTensor among its arguments, or in a list among them."""
    weight = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, HQQTensor))
    text = (
        f"{_name(func)}{_AFTER_NAME}: call dequantize() on it first, or hqqtensor.dequantize_(model) for a whole "
        f"model (for torch.func transforms and exporters too). The weight is {weight!r}"
    )
    return UnsupportedOperation("\n".join([text, *problems()]))


def _name(func: Callable) -> str:
    return resolve_name(func) or str(func)


@HQQTensor.implements_torch_function([Tensor.numpy, Tensor.tolist, Tensor.__array__])
def _(func, types, args, kwargs):
    raise unsupported(func, args, kwargs)
