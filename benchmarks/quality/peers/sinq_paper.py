"""SINQ, our own plain reading of arXiv 2509.22944, algorithm 1: equalise row and column spread, then round to nearest.

Tiles of one group's width; row scales are joined with the group's scale, column scales kept for each column.
"""

import torch
from torch import Tensor

from benchmarks.quality.method import Method, Quantized, affine_bits, by_layer

ROUNDS = 16


def _equalise(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Row scales ``[N, 1]`` and column scales ``[1, G]`` of least imbalance (largest over smallest spread) met."""
    row, column = torch.ones(tile.shape[0], 1), torch.ones(1, tile.shape[1])
    target = torch.minimum(tile.std(0).min(), tile.std(1).min()).clamp_min(1e-12)
    best = (torch.tensor(torch.inf), row, column)
    for _ in range(ROUNDS):
        scaled = tile / row / column
        by_row, by_column = scaled.std(1, keepdim=True), scaled.std(0, keepdim=True)
        both = torch.cat([by_row.flatten(), by_column.flatten()])
        imbalance = both.max() / both.min().clamp_min(1e-12)
        if imbalance < best[0]:
            best = (imbalance, row, column)
        column = column * (by_column / target).clamp(0.7, 2)
        row = row * (by_row / target).clamp(0.7, 2)
    return best[1], best[2]


def _quantize(w: Tensor, nbits: int, group_size: int = 64) -> Quantized:
    out = torch.empty_like(w)
    last = 2**nbits - 1
    for first in range(0, w.shape[1], group_size):
        tile = w[:, first : first + group_size]
        _, column = _equalise(tile)
        column = column.half().float()
        scaled = tile / column
        low, high = scaled.amin(1, keepdim=True), scaled.amax(1, keepdim=True)
        scale = ((high - low) / last).clamp_min(1e-9).half().float()
        zero = (-low / scale).half().float()
        codes = (scaled / scale + zero).round().clamp(0, last)
        out[:, first : first + group_size] = (codes - zero) * scale * column
    return Quantized(out, affine_bits(w, nbits, group_size) + 16 * w.shape[1])


def methods() -> list[Method]:
    return [Method(f"SINQ {b}-bit g64 (paper)", b, by_layer(lambda w, b=b: _quantize(w, b))) for b in (4, 3, 2)]
