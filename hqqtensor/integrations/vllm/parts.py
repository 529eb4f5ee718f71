"""Weights as vLLM's layers run them: plain tensors in buffers, and several weights of one input at a time.

The buffers of a part are what the operators take. A compiled graph then has plain tensors as inputs, and eager code
does not go through the dispatch of a tensor subclass at each call.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from hqqtensor import ops
from hqqtensor.ops import PackedWeight
from hqqtensor.tensor import HQQTensor
from hqqtensor.transforms import rotate, to_inputs


class DensePart(nn.Module):
    """Rows of a layer that are stored dense, ``[N, K]``."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.rows = weight.shape[-2]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [..., K]`` times the transpose, plus bias ``[N]``."""
        return nn.functional.linear(x, self.weight, bias)


class PackedPart(nn.Module):
    """A quantized weight ``[..., N, K]``, not transposed. before, after: zeros that its inputs lack (``Columns``)."""

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    act_pre_scale: Tensor | None

    def __init__(self, weight: HQQTensor, before: int = 0, after: int = 0) -> None:
        super().__init__()
        packed = weight.operand()
        self.rows, self.padding = weight.out_features, (before, after)
        self.settings, self.activation, self.rotation = packed[4:], weight.activation, weight.rotation
        for name in ("qdata", "scale", "zero_point"):
            self.register_buffer(name, getattr(packed, name), persistent=False)
        self.register_buffer("act_pre_scale", weight.act_pre_scale, persistent=False)
        self.meta_names = [f"meta_{place}" for place, _ in enumerate(packed.meta or ())]
        for name, values in zip(self.meta_names, packed.meta or (), strict=True):
            self.register_buffer(name, values, persistent=False)

    def operand(self) -> PackedWeight:
        """What the operators take."""
        meta = [getattr(self, name) for name in self.meta_names] or None
        return PackedWeight(self.qdata, self.scale, self.zero_point, meta, *self.settings)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The activations for the operators, and the scale that they are to multiply them with."""
        if self.padding != (0, 0):
            x = nn.functional.pad(x, self.padding)
        if self.rotation:
            return to_inputs(x, self.act_pre_scale, self.rotation), None
        return x, self.act_pre_scale

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [..., K]`` times the transpose of ``[N, K]``, plus bias ``[N]``."""
        x, act = self.inputs(x)
        return ops.linear(x, self.operand(), bias, act, self.activation)

    def grouped(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Runs of rows of x ``[S, K]`` with an expert each, see ``ops.grouped_linear``."""
        x, act = self.inputs(x)
        return ops.grouped_linear(x, offsets, self.operand(), act, self.activation)

    def embedding(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``indices`` of the weight, in ``dtype``."""
        out = ops.embedding(indices, self.operand(), torch.float32 if self.rotation else dtype)
        if self.rotation:
            out = rotate(out, self.rotation)
        return (out if self.act_pre_scale is None else out * self.act_pre_scale.to(out.dtype)).to(dtype)

    def join_key(self) -> Any:
        """Equal for weights of one input that one call of ``linear_many`` can multiply; unique where none can."""
        if self.rotation or self.settings[1] == "codebook":
            return id(self)
        packed = self.operand()
        dtypes = tuple(None if t is None else t.dtype for t in (packed.scale, packed.zero_point))
        widths = tuple(None if t is None else t.shape[-1] for t in (packed.scale, packed.zero_point))
        return (*self.settings, self.activation, self.padding, dtypes, widths, self.act_pre_scale is None)


class Parts(nn.Module):
    """The weights of a layer, below each other: ``x`` goes through all of them, results lie beside each other."""

    def __init__(self, parts: Sequence[DensePart | PackedPart]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        keyed = groupby(parts, lambda part: part.join_key() if isinstance(part, PackedPart) else id(part))
        self.runs: list[tuple[Any, ...]] = [tuple(run) for _, run in keyed]
        self.rows = [part.rows for part in parts]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [..., K]`` times the transpose of all rows, plus bias."""
        biases = [None] * len(self.rows) if bias is None else list(bias.split(self.rows))
        out, place = [], 0
        for run in self.runs:
            out.append(_product(run, x, biases[place : place + len(run)]))
            place += len(run)
        return out[0] if len(out) == 1 else torch.cat(out, -1)


def _product(run: tuple[Any, ...], x: Tensor, biases: list[Tensor | None]) -> Tensor:
    if len(run) == 1:
        return run[0](x, biases[0])
    x, act = run[0].inputs(x)
    acts = () if act is None else [part.act_pre_scale for part in run]
    return ops.linear_many(x, [part.operand() for part in run], biases, run[0].activation, acts)


def routed(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Sequence[PackedPart], down: PackedPart,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """The sum of the experts' answers to x ``[T, K]``, ``[T, K]`` in its dtype.

    weights, experts: ``[T, k]``, each token's experts and what their answers are multiplied with; numbers from the
    count of experts on stand for experts of other processes, which add nothing. gate_up: 3-D weights whose results lie
    beside each other. activate: ``[S, 2 * I]`` to ``[S, I]``.
    """
    tokens, each = experts.shape
    count = down.qdata.shape[0]
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    counts = (flat[:, None] == torch.arange(count, device=x.device)).sum(0)
    offsets = counts.cumsum(0).to(torch.int32)
    rows = x[order // each]
    hidden = [part.grouped(rows, offsets) for part in gate_up]
    answers = down.grouped(activate(hidden[0] if len(hidden) == 1 else torch.cat(hidden, -1)), offsets)
    unsorted = torch.empty_like(answers).index_copy_(0, order, answers)
    scaled = unsorted.view(tokens, each, -1).float() * weights[..., None].float()
    return scaled.sum(1).to(x.dtype)
