"""Column scales: even out how much the inputs' columns of a weight spread before its groups are solved.

A group along in_features has one step for all of its columns. Where columns differ in spread, the wide ones set the
step and the narrow ones are lost. SINQ (arXiv 2509.22944) divides rows and columns in turn by their standard
deviations, as Sinkhorn's iteration does, until both are even; each row's factor then belongs to its groups' scales and
each column's factor moves to the activations: y = (x * d) (W / d)^T. We keep only half of it, d to the power of 1/2:
the full factor also gives wide columns the larger error, which is right only where wide columns meet small
activations. On the models measured (docs/quality.md) they do in one and do not in the other; the half serves both.
"""

import torch
from torch import Tensor

ROUNDS, STRENGTH = 8, 0.5
LIMIT = 64.0
"""No column is scaled by more than this, or less than its inverse, against the middle one."""


def column_scale(weight: Tensor) -> Tensor:
    """float32 ``[K]`` scales of the columns of ``[..., N, K]``, median 1; columns of zeros get 1.

    The spread of a column is the root mean square of its weights, each row divided by its own spread and the other way
    about, in turn. Experts (leading dimensions) share the scales.
    """
    flat = weight.detach().reshape(-1, weight.shape[-1])
    column = torch.ones(flat.shape[1], dtype=torch.float32, device=flat.device)
    largest = flat.abs().amax().to(torch.float32)
    if not largest > 0:
        return column
    # Divided first, so that squares of very small or large weights are normal numbers.
    squares = (flat.to(torch.float32) / largest).square_()
    row = torch.ones(flat.shape[0], dtype=torch.float32, device=flat.device)
    for _ in range(ROUNDS):
        row = (squares @ column.reciprocal()) / flat.shape[1]
        row = torch.where(row > 0, row, 1.0)
        column = (row.reciprocal() @ squares) / flat.shape[0]
        column = torch.where(column > 0, column, 1.0)
    live = squares.amax(0) > 0
    scale = (column / column[live].median()).pow_(STRENGTH / 2).clamp_(1 / LIMIT, LIMIT)
    return torch.where(live, scale, 1.0)
