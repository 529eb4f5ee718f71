"""A quantized parameter and a low-rank update, as one operand of products: ``x W + (x lhs) rhs``.

peft adds the update to the parameter itself, which would need the dense weights of all experts. Modules that hold such
parameters only choose experts, transpose, and multiply, so this stands in for the parameter while they run.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hqqtensor.tensor import HQQTensor


class AdaptedWeight:
    """``weight + lhs @ rhs`` for the products and indexing of expert layers; NotImplementedError for all else.

    weight: HQQTensor ``[N, K]`` or ``[E, N, K]``, possibly transposed. lhs ``[..., N, r]``, rhs ``[..., r, K]``:
    floating-point, with the same leading dimension.
    """

    def __init__(self, weight: HQQTensor, lhs: Tensor, rhs: Tensor) -> None:
        self.weight, self.lhs, self.rhs = weight, lhs, rhs
        self._experts: list[tuple[Tensor, Tensor]] = []

    shape = property(lambda self: self.weight.shape)
    dtype = property(lambda self: self.weight.dtype)
    device = property(lambda self: self.weight.device)
    ndim = property(lambda self: self.weight.ndim)

    def __repr__(self) -> str:
        return f"AdaptedWeight({self.weight!r}, rank {self.lhs.shape[-1]})"

    def size(self, dim: int | None = None) -> Any:
        """As ``torch.Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def experts(self) -> list[tuple[Tensor, Tensor]]:
        """lhs and rhs of each expert. Unbound once: autograd then stacks their gradients once, not for each expert."""
        if not self._experts:
            self._experts = list(zip(self.lhs.unbind(), self.rhs.unbind(), strict=True))
        return self._experts

    def __getitem__(self, index: Any) -> "AdaptedWeight":
        if self.ndim != 3:
            raise NotImplementedError("LoRA over a quantized parameter: only a stack of experts can be indexed")
        one_expert = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
        low_rank = self.experts()[int(index)] if one_expert else (self.lhs[index], self.rhs[index])
        return AdaptedWeight(self.weight[index], *low_rank)  # type: ignore[arg-type]

    def transpose(self, first: int, second: int) -> "AdaptedWeight":
        """The matrices transposed; NotImplementedError for other dimensions."""
        if {first % self.ndim, second % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            raise NotImplementedError("LoRA over a quantized parameter: only its last two dimensions can be transposed")
        return AdaptedWeight(self.weight.transpose(-1, -2), self.rhs.mT, self.lhs.mT)  # type: ignore[arg-type]

    def t(self) -> "AdaptedWeight":
        """The transposed matrix."""
        return self.transpose(0, 1)

    mT = property(lambda self: self.transpose(-1, -2))
    T = property(lambda self: self.t())

    def __matmul__(self, x: Tensor) -> Tensor:
        return _matmul(self, x)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return _matmul(x, self)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS:
            name = getattr(func, "__name__", str(func))
            raise NotImplementedError(
                f"LoRA over a quantized parameter: {name} is not offered for it, only indexing, transposing and "
                "products; leave the parameter dense with skip_modules"
            )
        return _PRODUCTS[func](*args, **(kwargs or {}))


def _plus(product: Tensor, update: Tensor) -> Tensor:
    return product + update.to(product.dtype)


def _linear(input: Tensor, weight: AdaptedWeight, bias: Tensor | None = None) -> Tensor:
    update = F.linear(F.linear(input.to(weight.rhs.dtype), weight.rhs), weight.lhs)
    return _plus(F.linear(input, weight.weight, bias), update)


def _matmul(first: Any, second: Any) -> Tensor:
    if isinstance(second, AdaptedWeight):
        update = (first.to(second.lhs.dtype) @ second.lhs) @ second.rhs
        return _plus(first @ second.weight, update)
    update = first.lhs @ (first.rhs @ second.to(first.rhs.dtype))
    return _plus(first.weight @ second, update)


def _grouped_mm(x: Tensor, weight: AdaptedWeight, offs: Tensor | None = None, **options: Any) -> Tensor:
    product = torch._grouped_mm(x, weight.weight, offs, **options)  # refuses what it does not offer
    ends: list[int] = offs.tolist()  # type: ignore[union-attr]
    counts = [last - first for first, last in itertools.pairwise([0, *ends, x.shape[0]])]
    # One split, not a slice for each expert: the gradient of each slice would be as large as x.
    *runs, last_run = x.split(counts)
    each = zip(runs, weight.experts(), strict=True)
    updates = [(run.to(lhs.dtype) @ lhs) @ rhs for run, (lhs, rhs) in each if len(run)]
    if len(last_run):  # rows of no expert
        updates.append(product.new_zeros(len(last_run), product.shape[1]))
    return _plus(product, torch.cat(updates)) if updates else product


def _grouped_mm_fallback(input: Tensor, weight: AdaptedWeight, offs: Tensor) -> Tensor:
    return _grouped_mm(input, weight, offs)


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch._grouped_mm: _grouped_mm,
    F.grouped_mm: _grouped_mm,
    **dict.fromkeys((torch.mm, torch.bmm, torch.matmul, torch.Tensor.mm, torch.Tensor.bmm), _matmul),
    **dict.fromkeys((torch.Tensor.matmul, torch.Tensor.__matmul__), _matmul),
    torch.Tensor.__rmatmul__: lambda second, first: _matmul(first, second),
}
