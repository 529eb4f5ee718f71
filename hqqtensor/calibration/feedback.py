"""Error feedback column by column onto half-quadratic grids.

GPTQ (Frantar et al. 2022, arXiv 2210.17323): with H the second moments of the inputs and U the upper Cholesky factor
of its inverse, the error of column k, divided by U[k, k], is taken out of the columns after it by row k of U, so that
the layer's output changes least.

Unlike in GPTQ, a group's scale and zero point do not come from its smallest and largest weight. The joint solver fits
them when the group's first column is reached, to the weights as the errors of earlier columns have changed them. The
error of column k weighs 1 / U[k, k]^2, its cost once later columns have made up for it. Scale and zero point are
rounded for storage before codes are chosen.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hqqtensor.calibration.weighted import solve_weighted

DAMPING = 0.01


def inverse_factor(moments: Tensor) -> Tensor:
    """Upper triangular U ``[K, K]`` with U^T U the inverse of the damped ``moments``.

    moments: float32 ``[K, K]``; the factor is float32. 1 % of the diagonal's mean is added to the diagonal, ten times
    more as long as that does not make the matrix positive definite. Inputs that are always zero get the mean.
    """
    h = moments.to(torch.float64).clone()
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        return torch.eye(len(h), dtype=torch.float32, device=h.device)
    diagonal[diagonal == 0] = mean
    damping = DAMPING * mean
    while True:
        diagonal.add_(damping)
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0:
                return upper.to(torch.float32)
        damping *= 10


def feed_back(
    weight: Tensor,
    moments: Tensor,
    nbits: int,
    group_size: int,
    read_back: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 ``[N, K]``, scale and zero point float32 ``[N, groups]`` of ``weight`` ``[N, K]``.

    moments: float32 ``[K, K]`` second moments of the inputs. read_back(scale, zero): both ``[N, 1]``, as storage rounds
    them. Codes are chosen for the rounded ones; the scales and zero points returned are not rounded.
    """
    w = weight.to(torch.float32).clone()
    columns, last = w.shape[1], 2**nbits - 1
    upper = inverse_factor(moments)
    importance = upper.diagonal().square().reciprocal()
    codes = torch.empty_like(w, dtype=torch.uint8)
    scales, zeros = [], []
    for first in range(0, columns, group_size):
        end = min(first + group_size, columns)
        group = w[:, first:end]
        scale, zero = solve_weighted(group.unsqueeze(1), nbits, importance[None, first:end])
        scales.append(scale)
        zeros.append(zero)
        scale, zero = read_back(scale, zero)
        inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
        errors = torch.empty_like(group)
        for k in range(end - first):
            column, row = group[:, k : k + 1], upper[first + k, first + k : end]
            code = (column * inverse + zero).round_().clamp_(0, last)
            codes[:, first + k] = code.squeeze(1).to(torch.uint8)
            errors[:, k : k + 1] = (column - (code - zero) * scale) / row[0]
            group[:, k + 1 :] -= errors[:, k : k + 1] * row[1:]
        w[:, end:] -= errors @ upper[first:end, end:]
    return codes, torch.cat(scales, 1), torch.cat(zeros, 1)
