"""Scales of groups whose codes stand for fixed levels: value = level * scale, no zero point.

For fixed codes, with levels t_i, the best scale of a group, min over s of sum_i m_i (w_i - s t_i)^2, is
sum m w t / sum m t^2; for a fixed scale the best code is that of the nearest level. The two alternate from several
starting scales, fractions of the one that reaches every weight. From the best, scales a little larger and smaller are
tried, with the same alternation. Where the levels are not symmetric, negative scales are tried as well: they mirror the
levels at no cost in bits. The m_i are those of ``hqq_joint``, 1 for the squared error.
"""

from typing import Protocol

import torch
from torch import Tensor

from hqqtensor.formats.levels import Levels

FRACTIONS = (0.55, 0.594, 0.639, 0.684, 0.728, 0.773, 0.817, 0.862, 0.906, 0.951, 1.0, 1.04)
SETTLE, SETTLE_MOVE = 2, 2
MOVES = (1.03, 0.97)
EPSILON = 0.05


def reaching_scale(w: Tensor, levels: Levels, sign: float = 1.0) -> Tensor:
    """The scale of this sign, smallest in absolute value, with which no weight of a group is beyond the levels.

    w: ``[R, C, group]``; the scale is float32 ``[R, C, 1]``, zero where all weights are zero. Where all levels have one
    sign, only weights of that sign count.
    """
    low, high = w.amin(-1, keepdim=True) * sign, w.amax(-1, keepdim=True) * sign
    if sign < 0:
        low, high = high, low
    first, last = (values.view(-1, 1, 1).to(w.device) for values in (levels.values[..., 0], levels.values[..., -1]))
    below = torch.where(first < 0, low / first, 0.0)
    above = torch.where(last > 0, high / last, 0.0)
    return torch.maximum(below, above).clamp_min_(0) * sign


class LevelsLike(Protocol):
    """What the solver needs of levels: the index of the nearest, the value at an index, the mean distance of two."""

    @property
    def spacing(self) -> Tensor | float: ...

    def nearest(self, x: Tensor) -> Tensor: ...

    def at(self, index: Tensor) -> Tensor: ...


class Scales:
    """Weights ``[R, C, group]`` of a chunk, and the error of scales ``[R, C, 1]`` for them."""

    def __init__(self, w: Tensor, levels: LevelsLike, lp_norm: float) -> None:
        self.w, self.levels, self.lp_norm = w, levels, lp_norm

    def step(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The error of ``s`` with the nearest codes, and the best scale for those codes."""
        t = self.levels.at(self.levels.nearest(self.w * s.reciprocal()))
        residual = self.w - t * s
        if self.lp_norm == 2.0:
            error = residual.square().sum(-1, keepdim=True)
            top, bottom = (self.w * t).sum(-1, keepdim=True), t.square_().sum(-1, keepdim=True)
        else:
            residual.abs_()
            error = residual.pow(self.lp_norm).sum(-1, keepdim=True)
            m = (residual / (s * self.levels.spacing)).square_().add_(EPSILON**2).pow_((self.lp_norm - 2) / 2)
            top, bottom = (m * self.w * t).sum(-1, keepdim=True), (m * t * t).sum(-1, keepdim=True)
        better = top / bottom
        # Where all codes are zero or the scale would change its sign, the regression says nothing: s stays.
        usable = (bottom > 0) & (better * s > 0) & better.isfinite()
        return error, torch.where(usable, better, s)


def fit_scales(w: Tensor, levels: Levels, lp_norm: float) -> Tensor:
    """Scales ``[R, C, 1]`` of groups ``[R, C, group]``, float32, of least |w - dequantized|_p^p; zero where w is."""
    unit = w.abs().amax(-1, keepdim=True)
    nothing = unit == 0
    unit = torch.where(nothing, 1.0, unit)
    group = Scales(w / unit, levels, lp_norm)
    best = (torch.full_like(unit, torch.inf), torch.ones_like(unit))
    for sign in (1.0,) if levels.symmetric else (1.0, -1.0):
        reach = reaching_scale(group.w, levels, sign)
        reach = torch.where(reach == 0, sign, reach)
        for fraction in FRACTIONS:
            best = settle(group, best, reach * fraction, 2)
    best = settle(group, best, best[1], SETTLE)
    for move in MOVES:
        best = settle(group, best, best[1] * move, SETTLE_MOVE)
    return torch.where(nothing, 0.0, best[1] * unit)


def settle(group: Scales, best: tuple[Tensor, Tensor], s: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Alternate ``steps`` times from ``s``; the (error, scale) of least error seen, ``best`` included."""
    for _ in range(steps):
        error, following = group.step(s)
        won = error < best[0]
        best = torch.where(won, error, best[0]), torch.where(won, s, best[1])
        s = following
    return best
