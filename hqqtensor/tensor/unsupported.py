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

    def __init__(self, name: str, weight: HQQTensor) -> None:
        text = (
            f"{name} is not offered for a quantized weight: call dequantize() on it first, or "
            f"hqqtensor.dequantize_(model) for all of a model (needed for torch.func transforms and exporters too). "
            f"The weight is {weight!r}"
        )
        super().__init__("\n".join([text, *problems()]))
        self.weight = weight

    def of(self, func: Callable) -> "UnsupportedOperation":
        """The same, named after the function that the user called instead of the operator that it came to."""
        return UnsupportedOperation(resolve_name(func) or str(func), self.weight)


def unsupported(func: Any, args: Any, kwargs: Any) -> UnsupportedOperation:
    """The error for ``func`` with an HQQTensor among its arguments, or in a list among them."""
    weight = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, HQQTensor))
    return UnsupportedOperation(str(func), weight)


@HQQTensor.implements_torch_function([Tensor.numpy, Tensor.tolist, Tensor.__array__])
def _(func, types, args, kwargs):
    raise UnsupportedOperation(resolve_name(func) or str(func), args[0])
