"""What a target of the fuzzer is, and checks that several of them share."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqtensor import HQQTensor, backend

ROOT = Path(__file__).parents[1]
Files = dict[str, bytes]
"""Names within a folder, and what is in them."""


class Wrong(Exception):
    """An input that was taken and gave an answer that a cross-check refutes, or left something half done."""


@dataclass(frozen=True)
class Target:
    """case: a damaged input, the same for the same generator; ``Files`` are written into a folder before ``run``.

    run: reads the input as a user would. It returns where the answer stood every check, raises one of ``refusals``,
    the documented errors, where the input is refused, and ``Wrong`` otherwise.
    """

    name: str
    case: Callable[[random.Random], Any]
    run: Callable[[Any, Path], None]
    refusals: tuple[type[Exception], ...]


def check_usable(name: str, tensor: Tensor) -> None:
    """Wrong where the compiled kernels and the plain path read a quantized weight differently; dense ones pass."""
    if not isinstance(tensor, HQQTensor) or not tensor.numel():
        return
    with torch.no_grad():
        fast = tensor.dequantize()
        with backend("dequantize"):
            plain = tensor.dequantize()
        if not torch.equal(fast.nan_to_num(), plain.nan_to_num()):
            raise Wrong(f"{name}: kernels and the plain path read other numbers from {tensor!r}")
        if tensor.rank == 2 and tensor.row_dims == 1 and tensor.dtype is not torch.float64:
            torch.nn.functional.linear(torch.ones(2, tensor.shape[-1], dtype=tensor.dtype), tensor)


def check_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Wrong where two readings of one input differ."""
    if first.keys() != second.keys():
        raise Wrong(f"read twice, other names: {sorted(first.keys() ^ second.keys())}")
    for name, tensor in first.items():
        if not _equal(tensor, second[name]):
            raise Wrong(f"{name}: read twice, other numbers")


def _equal(a: Tensor, b: Tensor) -> bool:
    a, b = (t.dequantize() if isinstance(t, HQQTensor) else t for t in (a, b))
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    same = torch.equal(a, b)
    return same or (a.is_floating_point() and torch.equal(a.float().nan_to_num(), b.float().nan_to_num()))
