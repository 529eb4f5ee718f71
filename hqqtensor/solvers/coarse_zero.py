"""Zero points that can be kept only coarsely: integers, or 8-bit codes beside bfloat16 zero points.

To round the best zero point at the end costs much (at 4 bits, a quarter more squared error for integers): the scale no
longer belongs to it. Instead both neighbours on the coarse grid are tried, each with the scale that is best for it,
found as for levels without a zero point (``scale_only``) from several scales around the given one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hqqtensor.solvers.base import CACHED, chunks
from hqqtensor.solvers.scale_only import Scales, settle

AROUND = (1.0, 0.97, 1.03, 0.94, 1.06)
STEPS = 2
COARSE = 0.002
"""Mean squared rounding of zero points, in codes, from which it matters: 2 % of the error of codes, 1/12."""


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
    """The integers (``dtype`` None) or the numbers of ``dtype`` next to each zero point, itself twice if it is one."""
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
    """Inverse scales and zero points ``[R, C]`` of groups ``[R, C, group]``, the zero points on the coarse grid.

    ``inverse`` and ``zero`` are a solver's own; ``dtype`` None asks for integers.
    """
    inverse, zero = inverse.clone(), zero.clone()
    for part, w in chunks(groups, CACHED):
        s = inverse[part].reciprocal().unsqueeze(-1)
        best_error, best_s, best_z = torch.full_like(s, torch.inf), s, s
        for z in neighbours(zero[part].unsqueeze(-1), dtype):
            scales = Scales(w / s, ShiftedIntegers(z, 2**nbits - 1), lp_norm)  # in units of the given scale
            best = torch.full_like(s, torch.inf), torch.ones_like(s)
            for factor in AROUND:
                best = settle(scales, best, torch.full_like(s, factor), STEPS)
            won = best[0] < best_error
            best_error = torch.where(won, best[0], best_error)
            best_s, best_z = torch.where(won, best[1] * s, best_s), torch.where(won, z, best_z)
        inverse[part], zero[part] = best_s.reciprocal().squeeze(-1), best_z.squeeze(-1)
    return inverse, zero
