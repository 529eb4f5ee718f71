"""Round to nearest: the group's smallest and largest weight become the first and the last code.

Formats without a zero point take the smallest scale with which no weight lies beyond the outermost levels.
"""

import torch
from torch import Tensor

from hqqtensor.solvers.base import (
    Solution,
    SolverOptions,
    chunks,
    constant_group,
    constant_solution,
    register_solver,
)
from hqqtensor.solvers.scale_only import reaching_scale


def solve(groups: Tensor, nbits: int, options: SolverOptions) -> Solution:
    """Scale = (max - min) / (2**nbits - 1), zero point = -min / scale, for each group of ``[R, C, group]``."""
    if options.levels is not None:
        scales = [reaching_scale(w, options.levels.rows(part)) for part, w in chunks(groups)]
        return Solution(torch.cat(scales).reciprocal().squeeze(-1), None)
    shape = groups.shape[:-1]
    inverse = torch.empty(shape, dtype=torch.float32, device=groups.device)
    zero = torch.empty_like(inverse)
    for part, w in chunks(groups):
        low, high = w.aminmax(dim=-1)
        scale = (high / (2**nbits - 1)) - (low / (2**nbits - 1))
        offset = -low / scale
        flat = constant_group(low, high)
        flat_scale, flat_zero = constant_solution(low)
        inverse[part] = torch.where(flat, flat_scale, scale).reciprocal()
        zero[part] = torch.where(flat, flat_zero, offset)
    return Solution(inverse, zero)


register_solver("rtn", solve)
