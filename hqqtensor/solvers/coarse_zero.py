"""Zero points that storage rounds coarsely: integers, or bfloat16 ones beside 8-bit codes.

Rounding the best zero point at the end is costly (at 4 bits, a quarter more squared error for integers), because the
scale is not the best one for the rounded zero point. Instead both neighbours on the storage grid are tried, each with
its best scale. That is found as for levels without a zero point (``scale_only``), from several scales around the
solver's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hqqtensor.solvers.base import CACHED, chunks
from hqqtensor.solvers.scale_only import Scales, settle

AROUND = (1.0, 0.97, 1.03, 0.94, 1.06)
"""Scales to start from, as multiples of the solver's."""
STEPS = 2
COARSE = 0.002
"""Mean squared rounding error of zero points, in codes, that counts as coarse: 2 % of that of codes, which is 1/12."""


@dataclass(frozen=True)
class ShiftedIntegers:
    """The levels 0 .. last less a zero point ``[R, C, 1]``."""

    zero: Tensor
    last: int
    spacing = 1.0

    def nearest(self, x: Tensor) -> Tensor:
        return (x + self.zero).round_().clamp_(0, self.last)

    def at(self, index: Tensor) -> Tensor:
        return index - self.zero


def neighbours(zero: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The integers (``dtype`` None) or numbers of ``dtype`` below and above each zero point, the same where it is one.

    Both float32, of the shape of ``zero``; for a ``dtype``, the nearer one first.
    """
    if dtype is None:
        return zero.floor(), zero.ceil()
    stored = zero.to(dtype)
    near = stored.to(torch.float32)
    towards = torch.where(near < zero, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(stored, towards).to(torch.float32)
    return near, torch.where(near == zero, near, other)


def is_coarse(zero: Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding these zero points to ``dtype`` would raise the error noticeably."""
    return bool((zero.to(dtype).to(torch.float32) - zero).square().mean() > COARSE)


def refit(
    groups: Tensor, inverse: Tensor, zero: Tensor, nbits: int, lp_norm: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Inverse scales and zero points, float32 ``[R, C]``, of groups ``[R, C, group]``, with zero points of ``dtype``.

    inverse, zero: what a solver found without that limit. dtype: None stands for integers.
    """
    inverse, zero = inverse.clone(), zero.clone()
    for part, w in chunks(groups, CACHED):
        s = inverse[part].reciprocal().unsqueeze(-1)
        best_error, best_s, best_z = torch.full_like(s, torch.inf), s, s
        for z in neighbours(zero[part].unsqueeze(-1), dtype):
            scales = Scales(w / s, ShiftedIntegers(z, 2**nbits - 1), lp_norm)  # in units of the solver's scale
            best = torch.full_like(s, torch.inf), torch.ones_like(s)
            for factor in AROUND:
                best = settle(scales, best, torch.full_like(s, factor), STEPS)
            won = best[0] < best_error
            best_error = torch.where(won, best[0], best_error)
            best_s, best_z = torch.where(won, best[1] * s, best_s), torch.where(won, z, best_z)
        inverse[part], zero[part] = best_s.reciprocal().squeeze(-1), best_z.squeeze(-1)
    return inverse, zero
