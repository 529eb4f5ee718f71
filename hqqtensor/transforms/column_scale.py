"""Column scales: even out how much the inputs' columns of a weight spread before its groups are solved.

A group along in_features has one scale for all of its columns. Where columns differ in spread, the wide ones set the
scale and the narrow ones are lost. SINQ (arXiv 2509.22944) divides rows and columns alternately by their standard
deviations, as Sinkhorn's iteration does, until all have the same. Each row's factor then belongs to the scales of its
groups, and each column's factor d moves to the activations: y = (x * d) (W / d)^T. Here d^0.7 is used: d itself gives
wide columns the larger error, which is right only where their activations are small. Of powers from 0.3 to 1, 0.7 was
best or near it on each of the three models measured (docs/solvers.md).
"""

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS, STRENGTH = 8, 0.7
"""Alternations, and the power of d."""
LIMIT = 64.0
"""Largest scale of a column relative to the median; the smallest is its inverse."""
LARGEST_UNIT = 1e38
"""A finite float32, also where the largest weight is subnormal."""


def column_scale(weight: Tensor, spread: Callable[[Tensor, int], Tensor] | None = None) -> Tensor:
    """float32 ``[K]`` scales of the columns of ``[..., N, K]``, median 1; columns of zeros get 1.

    The spread of a column is the root mean square of its weights after each row was divided by its spread, and that of
    a row likewise; the two alternate. Experts (leading dimensions) share the scales. spread: computes
    ``column_spread``, which is the default.
    """
    flat = weight.detach().reshape(-1, weight.shape[-1])
    column = (spread or column_spread)(flat, ROUNDS)
    live = column > 0
    if not live.any():
        return torch.ones_like(column)
    scale = (column / column[live].median()).pow_(STRENGTH / 2).clamp_(1 / LIMIT, LIMIT)
    return torch.where(live, scale, 1.0)


def column_spread(flat: Tensor, rounds: int) -> Tensor:
    """float32 ``[K]``: mean square of each column of ``[N, K]`` over its rows' spreads, in units of the largest weight.

    A unit keeps the squares of very small and very large weights normal numbers.
    """
    low, high = flat.aminmax()
    largest = float(torch.maximum(-low, high))
    squares = flat.to(torch.float32, copy=True).mul_(min(1 / largest, LARGEST_UNIT) if largest else 0.0).square_()
    column = torch.ones(flat.shape[1], dtype=torch.float32, device=flat.device)
    for _ in range(rounds):
        row = (squares @ torch.where(column > 0, column, 1.0).reciprocal()) / flat.shape[1]
        column = (torch.where(row > 0, row, 1.0).reciprocal() @ squares) / flat.shape[0]
    return column
