"""How far quantized weights lie from the dense ones, while a model is quantized: from a few rows of each weight."""

import math

from torch import Tensor

from hqqtensor.tensor import HQQTensor

RUNS, ROWS = 2, 16
"""Runs of neighbouring rows that are compared of each matrix, and rows of a run."""


class WeightError:
    """Adds up squares over layers."""

    def __init__(self) -> None:
        self._error = self._size = 0.0

    @property
    def relative(self) -> float | None:
        """Norm of the difference by the norm of the dense weights, over all layers so far; None where there are none.

        Each weight counts by its size, of which the rows that were compared are a sample.
        """
        return math.sqrt(self._error / self._size) if self._size else None

    def add(self, weight: Tensor, quantized: Tensor) -> None:
        """Count a weight ``[N, K]``, or a stack ``[E, N, K]`` of which one matrix is looked at."""
        if not isinstance(quantized, HQQTensor) or weight.ndim not in (2, 3):
            return
        share = weight.numel()
        if weight.ndim == 3:
            weight, quantized = weight[len(weight) // 2], quantized[len(quantized) // 2]
        assert isinstance(quantized, HQQTensor)  # for mypy: views of one are ones
        if quantized.transposed:
            weight, quantized = weight.T, quantized.transpose(-1, -2)
            assert isinstance(quantized, HQQTensor)
        dense = weight.detach()
        # Groups that lie across rows cannot be cut between them.
        runs = _runs(len(dense), _step(quantized)) if quantized.axis == 1 else [slice(None)]
        pairs = [(dense[rows].float(), quantized[rows].dequantize().float()) for rows in runs]
        factor = share / sum(rows.numel() for rows, _ in pairs)
        self._error += factor * sum(float((got - want).square().sum()) for want, got in pairs)
        self._size += factor * sum(float(want.square().sum()) for want, _ in pairs)


def _step(quantized: HQQTensor) -> int:
    """Rows by whose multiples a weight can be cut: row n of quantized scales is in group n % G of theirs."""
    return max(
        (meta.scale.shape[-2] for meta in (quantized.scale, quantized.zero_point) if isinstance(meta, HQQTensor)),
        default=1,
    )


def _runs(count: int, step: int) -> list[slice]:
    """A few runs of rows, each from the middle of its share of ``count``; they begin at multiples of ``step``."""
    last = max(0, count - ROWS)
    firsts = {last * (2 * run + 1) // (2 * RUNS) // step * step for run in range(RUNS)}
    return [slice(first, first + ROWS) for first in sorted(firsts)]
