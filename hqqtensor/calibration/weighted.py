"""The joint half-quadratic solver with a weight for the error of each input."""

import torch
from torch import Tensor

from hqqtensor.solvers import hqq_joint
from hqqtensor.solvers.base import chunks, constant_group, constant_solution

FLOOR = 1e-4
"""No input weighs less than this share of its group's mean: an input that calibration never saw still counts."""


class _WeightedGroups(hqq_joint.Groups):
    """Groups whose squared errors are weighted by ``m``, of the shape of the groups and of sum 1 in each."""

    def __init__(self, w: Tensor, nbits: int, m: Tensor) -> None:
        super().__init__(w, nbits, 2.0)
        self.m = m
        self.mean = (m * w).sum(-1, keepdim=True)

    def fit(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.codes(s, z)
        code_mean = (self.m * codes).sum(-1, keepdim=True)
        centred = codes.sub_(code_mean)
        pull = self.m * centred
        spread = (pull * centred).sum(-1, keepdim=True)
        slope = (pull * self.w).sum(-1, keepdim=True) / spread
        usable = (spread > 1e-12) & (slope > 0) & slope.isfinite()
        return torch.where(usable, slope, s), torch.where(usable, code_mean - self.mean / slope, z)

    def error(self, s: Tensor, z: Tensor) -> Tensor:
        residual = (self.codes(s, z) - z).mul_(s).sub_(self.w)
        return (residual.square_() * self.m).sum(-1, keepdim=True)


def normalized(importance: Tensor) -> Tensor:
    """``importance [..., group]`` with none below ``FLOOR`` of its group's mean, of sum 1; of zeros all alike."""
    mean = importance.mean(-1, keepdim=True)
    m = torch.where(mean > 0, importance.clamp_min(FLOOR * mean), 1.0)
    return m / m.sum(-1, keepdim=True)


def solve_weighted(groups: Tensor, nbits: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32 ``[R, C]``, of groups ``[R, C, group]``: least sum of importance * error^2.

    importance: float ``[C, group]``, not negative; a group of zeros is weighted evenly.
    """
    scale = torch.empty(groups.shape[:-1], dtype=torch.float32, device=groups.device)
    zero = torch.empty_like(scale)
    m = normalized(importance)
    for part, w in chunks(groups):
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        flat = constant_group(low, high)
        unit = torch.where(flat, 1.0, torch.maximum(high.abs(), low.abs()))
        low, high = low / unit, high / unit
        weighted = _WeightedGroups(w / unit, nbits, m.expand_as(w))
        s, z = hqq_joint.search(weighted, low, torch.where(flat, low + 1, high))
        flat_scale, flat_zero = constant_solution(low)
        scale[part] = torch.where(flat, flat_scale, s * unit).squeeze(-1)
        zero[part] = torch.where(flat, flat_zero, z).squeeze(-1)
    return scale, zero
