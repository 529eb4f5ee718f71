"""A model's packed weights brought together in memory that the kernels read fastest."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from hqqtensor.ops.decoder import DecoderMaker
from hqqtensor.tensor import HQQTensor

LARGE = 2 << 20
"""Bytes of a huge page: a tensor of that size at a multiple of it is taken to lie in such pages."""


def gather_weights(model: nn.Module, make: DecoderMaker) -> None:
    """Copy the data of all quantized weights to where ``make`` wants them; the numbers and the parameters stay.

    What was mapped from a file is then no longer needed in memory.
    """
    weights = {id(p): p for p in model.parameters() if isinstance(p, HQQTensor) and p.qdata.device.type == "cpu"}
    found = {id(t): (holder, name, t) for w in weights.values() for holder, name, t in _parts(w)}
    small = [one for one in found.values() if one[2].nbytes < LARGE or one[2].data_ptr() % LARGE]
    for (holder, name, _), new in zip(small, make.gathered([t for _, _, t in small]), strict=True):
        setattr(holder, name, new)


def _parts(w: HQQTensor) -> Iterator[tuple[Any, str, Tensor]]:
    """(holder, attribute, tensor) of all plain tensors of a weight."""
    for name in w.__tensor_flatten__()[0]:
        t = getattr(w, name)
        if isinstance(t, HQQTensor):
            yield from _parts(t)
        elif t.is_contiguous():
            yield w, name, t
