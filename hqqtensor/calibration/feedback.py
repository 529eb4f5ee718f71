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

from hqqtensor.calibration.weighted import normalized, solve_weighted
from hqqtensor.ops.backend import encoder
from hqqtensor.ops.encoder import ColumnSteps


class TorchSteps:
    """``ops.encoder.ColumnSteps`` by torch's operations."""

    def solve(self, group: Tensor, importance: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
        return solve_weighted(group.unsqueeze(1), nbits, importance.unsqueeze(0))

    def feed_back(
        self, group: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, nbits: int, codes: Tensor
    ) -> Tensor:
        inverse = torch.where(scale == 0, 0.0, scale.reciprocal())
        errors = torch.empty_like(group)
        for k in range(group.shape[1]):
            column, row = group[:, k : k + 1], upper[k, k:]
            code = (column * inverse + zero_point).round_().clamp_(0, 2**nbits - 1)
            codes[:, k] = code.squeeze(1).to(torch.uint8)
            errors[:, k : k + 1] = (column - (code - zero_point) * scale) / row[0]
            group[:, k + 1 :] -= errors[:, k : k + 1] * row[1:]
        return errors


def column_steps(device: torch.device) -> ColumnSteps:
    """Those of the backend that serves ``device``, else torch's operations."""
    device_encoder = encoder(device.type)
    return (None if device_encoder is None else device_encoder.column_steps) or TorchSteps()


def feed_back(
    weight: Tensor,
    upper: Tensor,
    nbits: int,
    group_size: int,
    read_back: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes uint8 ``[N, K]``, scale and zero point float32 ``[N, groups]`` of ``weight`` ``[N, K]``.

    And, float32 ``[N, K]``, by how many codes each weight lay above the code that it was given.

    upper: float32 ``[K, K]``, ``moments.inverse_factor`` of the inputs. read_back(scale, zero): both ``[N, 1]``, as
    storage rounds them. Codes are chosen for the rounded ones; the scales and zero points returned are not rounded.
    """
    w = weight.to(torch.float32, copy=True).contiguous()
    steps = column_steps(w.device)
    importance = upper.diagonal().square().reciprocal()
    codes = torch.empty_like(w, dtype=torch.uint8)
    scales, zeros, above = [], [], []
    for first in range(0, w.shape[1], group_size):
        end = min(first + group_size, w.shape[1])
        group = w[:, first:end]
        scale, zero = steps.solve(group, normalized(importance[first:end]), nbits)
        scales.append(scale)
        zeros.append(zero)
        scale, zero = read_back(scale, zero)
        errors = steps.feed_back(group, upper[first:end, first:end], scale, zero, nbits, codes[:, first:end])
        w[:, end:].addmm_(errors, upper[first:end, end:], alpha=-1)
        above.append(errors * (upper.diagonal()[first:end] / torch.where(scale == 0, 1.0, scale)))
    return codes, torch.cat(scales, 1), torch.cat(zeros, 1), torch.cat(above, 1)
