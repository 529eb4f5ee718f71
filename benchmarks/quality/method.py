"""What a quantization method is to the benchmark: a function that replaces the weights of a model's layers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.quality.task import Task


@dataclass(frozen=True)
class Quantized:
    """A dense weight as it reads back, and the bits it takes in memory with all of its metadata."""

    weight: Tensor
    bits: float


@dataclass(frozen=True)
class Method:
    """name: unique, as the table shows it. nbits: nominal bits of a code. ours: whether it is hqqtensor.

    data: what it looks at besides the weights: "" (nothing), "text" (calibration text) or "model" (it runs the model on
    random tokens). models: names of the tasks that it is for, all where empty. quantize(model, task): replaces the
    weights of ``task.layers`` and returns the bits of all of them.
    """

    name: str
    nbits: int
    quantize: Callable[[nn.Module, Task], float]
    data: str = ""
    ours: bool = False
    models: tuple[str, ...] = ()


def by_layer(quantize: Callable[[Tensor], Quantized]) -> Callable[[nn.Module, Task], float]:
    """A method that treats each weight ``[N, K]`` on its own."""

    def run(model: nn.Module, task: Task) -> float:
        bits = 0.0
        for name in task.layers:
            layer = model.get_submodule(name)
            got = quantize(layer.weight.detach())
            replace(layer, got.weight)
            bits += got.bits
        return bits

    return run


@torch.no_grad()
def replace(layer: nn.Module, weight: Tensor) -> None:
    """Give ``layer`` a dense weight, checked to be a finite one of the same shape."""
    if weight.shape != layer.weight.shape or not bool(weight.isfinite().all()):
        raise ValueError(f"got a weight of shape {list(weight.shape)}, or not finite")
    layer.weight.copy_(weight)


def affine_bits(weight: Tensor, nbits: float, group_size: int, metadata: float = 32) -> float:
    """Bits of ``[N, K]``: codes, and ``metadata`` bits for each group along K (default: two numbers of 16 bits)."""
    out_features, in_features = weight.shape
    return weight.numel() * nbits + out_features * -(-in_features // group_size) * metadata
