"""Products with dense weights for gradients, of which only a piece exists at a time."""

import torch
from torch import Tensor

from hqqtensor.ops.definitions import OPS
from hqqtensor.ops.packed import PackedWeight, expert

PIECE_BYTES = 32 * 2**20
"""Dense weights at a time: 4096 x 4096 of bfloat16 is one piece; an output layer is cut."""


def _fitting(w: PackedWeight, dtype: torch.dtype, rows: int) -> int:
    """How many times ``rows`` rows fit in a piece, at least once."""
    return max(1, PIECE_BYTES // (rows * w.in_features * dtype.itemsize))


def times_dense(grad: Tensor, w: PackedWeight) -> Tensor:
    """``grad [..., N]`` times a packed weight ``[N, K]``: ``[..., K]`` in grad's dtype, summed in float32."""
    count, rows = _fitting(w, grad.dtype, 1), grad.shape[-1]
    if rows <= count:
        return grad @ OPS.dequantize(*w, grad.dtype)
    total = grad.new_zeros(*grad.shape[:-1], w.in_features, dtype=torch.promote_types(grad.dtype, torch.float32))
    for first in range(0, rows, count):
        last = min(first + count, rows)
        indices = torch.arange(first, last, device=grad.device)
        total += grad[..., first:last] @ OPS.embedding(indices, *w, grad.dtype)
    return total.to(grad.dtype)


def batched_times_dense(grad: Tensor, w: PackedWeight) -> Tensor:
    """``grad [E, M, N]`` times packed weights ``[E, N, K]``: ``[E, M, K]``."""
    count = _fitting(w, grad.dtype, grad.shape[-1])
    if grad.shape[0] <= count:
        return torch.bmm(grad, OPS.dequantize(*w, grad.dtype))
    pieces = [slice(first, first + count) for first in range(0, grad.shape[0], count)]
    return torch.cat([torch.bmm(grad[p], OPS.dequantize(*expert(w, p), grad.dtype)) for p in pieces])


def grouped_times_dense(grad: Tensor, offsets: Tensor, w: PackedWeight) -> Tensor:
    """Rows of ``grad [S, N]`` in runs, run e (up to offsets[e]) times weight e of ``[E, N, K]``: ``[S, K]``.

    Only experts that have rows are dequantized. Rows from offsets[-1] on are zero.
    """
    out, first = grad.new_zeros(grad.shape[0], w.in_features), 0
    for index, last in enumerate(offsets.tolist()):
        if last > first:
            out[first:last] = times_dense(grad[first:last], expert(w, index))
            first = last
    return out
