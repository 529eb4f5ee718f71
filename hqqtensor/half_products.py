"""Products of dense half-precision numbers on processors without instructions for them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = {
    torch.nn.functional.linear: 0, torch.matmul: 0, torch.mm: 0, torch.bmm: 0, torch.addmm: 1,
    Tensor.matmul: 0, Tensor.__matmul__: 0, Tensor.mm: 0, Tensor.bmm: 0, Tensor.addmm: 1,
}  # fmt: skip
"""Functions that multiply, and which of their tensors is the left side."""
_MIN_ROWS = 32
"""Rows of the left side from which a float32 copy of the right side costs less than it saves."""


@contextlib.contextmanager
def fast_half_products() -> Iterator[None]:
    """Dense half-precision products are computed in float32 within the block, where this processor is slow at them.

    Torch's own take several times as long as float32 ones on a CPU without AVX-512 (bfloat16) or AVX512-FP16 (float16).
    The sums are float32 either way, and the result is rounded to the inputs' dtype, so it differs by the order of
    the sums only. Products of few rows, of other devices and of tensor subclasses are left alone. Memory: a float32
    copy of the weight and of the inputs of one product at a time.
    """
    dtypes = _slow_dtypes()
    if not dtypes:
        yield
        return
    with _InFloat32(dtypes):
        yield


def _slow_dtypes() -> frozenset[torch.dtype]:
    """The half-precision dtypes whose products this processor has no instructions for."""
    has = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, is_fast in has.items() if not is_fast)


class _InFloat32(TorchFunctionMode):
    """Computes products of the given dtypes in float32."""

    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        super().__init__()
        self.dtypes = dtypes

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and "out" not in kwargs:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if all(self._is_slow(t) for t in tensors) and _rows(func, tensors[_PRODUCTS[func]]) >= _MIN_ROWS:
                wide = [_float32(value) for value in args]
                product = func(*wide, **{name: _float32(value) for name, value in kwargs.items()})
                return product.to(tensors[0].dtype)
        return func(*args, **kwargs)

    def _is_slow(self, value: Tensor) -> bool:
        return type(value) in (Tensor, torch.nn.Parameter) and value.device.type == "cpu" and value.dtype in self.dtypes


def _rows(func: Callable[..., Any], left: Tensor) -> int:
    """Rows that meet one right side."""
    if func is torch.nn.functional.linear:
        return left.shape[:-1].numel()
    return left.shape[-2] if left.ndim > 1 else 1


def _float32(value: Any) -> Any:
    return value.to(torch.float32) if isinstance(value, Tensor) else value
