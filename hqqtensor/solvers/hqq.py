"""The published half-quadratic solver: scale from the range, zero point by alternating minimisation.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. Minimises
|w - dequantized|_p^p by splitting off an error variable e:

    e <- shrink(w - (codes - zero) / s)        shrink(x) = sign(x) relu(|x| - |x|^(p-1) / beta)
    zero <- mean(codes - (w - e) * s)

with s the inverse scale, p = 0.7, beta = 10, at most 20 rounds, ended for the whole weight once the mean
absolute error no longer falls. The result equals that of the hqq library on a CPU in float32, oddities included:
4-bit zero points start rounded, groups narrower than 1e-4 get scale 1, the inverse scale is at most 2e4, and the
update of the last round holds although it did not lower the error.
"""

import torch
from torch import Tensor

from hqqtensor.solvers.base import Solution, SolverOptions, chunks, register_solver

LP_NORM, BETA, ROUNDS = 0.7, 10.0, 20


def solve(groups: Tensor, nbits: int, options: SolverOptions) -> Solution:
    """Inverse scale and zero point of each group of ``[R, C, group]``; the codes follow from them unrounded."""
    if options.levels is not None:
        raise ValueError('solver "hqq" moves zero points, which only format "int" has; use "hqq_joint" or "rtn"')
    last = 2**nbits - 1
    shape = (*groups.shape[:-1], 1)
    inverse = torch.empty(shape, dtype=torch.float32, device=groups.device)
    zero = torch.empty_like(inverse)
    for part, w in chunks(groups):
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        spread = high - low
        s = torch.where(spread.abs() <= 1e-4, 1.0, last / spread).clamp(max=2e4)
        z = -low * s
        inverse[part], zero[part] = s, torch.round(z) if nbits == 4 else z

    best = torch.tensor(torch.inf)
    for _ in range(ROUNDS):
        total = torch.zeros((), dtype=torch.float64)
        for part, w in chunks(groups):
            s, z = inverse[part], zero[part]
            codes = torch.round(w * s + z).clamp_(0, last)
            residual = w - (codes - z) / s
            size = residual.abs()
            total += size.sum(dtype=torch.float64).cpu()
            error = (size - (1 / BETA) * size.pow(LP_NORM - 1)).clamp_min_(0).mul_(residual.sign())
            zero[part] = torch.mean(codes - (w - error) * s, dim=-1, keepdim=True)
        current = (total / groups.numel()).to(torch.float32)
        if not current < best:
            break
        best = current
    return Solution(inverse.squeeze(-1), zero.squeeze(-1), exact_encode=True)


register_solver("hqq", solve)
