"""The default solver: scale and zero point of a group are fitted together, from several starting ranges.

For fixed codes c the best affine map of a group, min over (s, z) of sum_i m_i (w_i - s (c_i - z))^2, is a
weighted linear regression of w on c with a closed form; for a fixed map the best code is the nearest.
Alternating the two never raises the error. It ends in a local minimum, so it starts from nine ranges
(each end of the group's range pulled in by up to ``SHRINK`` codes) and goes on from the best. Then it moves either
end by half a code, in and out, and both ends by less, alternates again from there, and takes what is better.

For a norm p < 2 the weights m_i are the multiplicative half-quadratic ones of |r|^p,
m = (r^2 + eps^2)^((p-2)/2) (Geman and Reynolds 1992). The residual r is measured in units of the group's scale, so
that weights of any size are treated alike; the threshold of the published solver is in units of the weights.
"""

import torch
from torch import Tensor

from hqqtensor.solvers.base import (
    CACHED,
    Solution,
    SolverOptions,
    chunks,
    constant_group,
    constant_solution,
    register_solver,
)
from hqqtensor.solvers.scale_only import fit_scales

SHRINK, MAX_SHRINK = 4.0, 0.4
"""The most by which starts pull in an end of the range: in codes, and as a share of half the range."""
STARTS = 3
"""Positions tried for each end."""
SETTLE, SETTLE_MOVE = 2, 2
"""Alternations after the starts, and after each move."""
MOVES = 6
MOVE_END, MOVE_BOTH = 0.5, 0.15
"""Codes by which the moves widen and narrow the range: at its lower end, at its upper end, and at both."""
EPSILON = 0.05
"""eps above."""


class Groups:
    """Weights ``[R, C, group]`` of a chunk and the error that an affine map of them has."""

    def __init__(self, w: Tensor, nbits: int, lp_norm: float) -> None:
        self.w, self.last, self.lp_norm = w, 2**nbits - 1, lp_norm
        self.mean = w.mean(-1, keepdim=True)

    def codes(self, s: Tensor, z: Tensor) -> Tensor:
        """The nearest codes, float32 of the shape of the weights."""
        return (self.w / s).add_(z).round_().clamp_(0, self.last)

    def fit(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """One alternation: nearest codes for (s, z), then the regression on them; s and z have shape [R, C, 1]."""
        codes = self.codes(s, z)
        if self.lp_norm == 2.0:
            code_mean, mean = codes.mean(-1, keepdim=True), self.mean
            centred = codes.sub_(code_mean)
            spread = centred.square().sum(-1, keepdim=True)
            slope = (centred * self.w).sum(-1, keepdim=True) / spread
        else:
            residual = self.w / s - (codes - z)
            m = (residual.square_() + EPSILON**2).pow_((self.lp_norm - 2) / 2)
            m /= m.sum(-1, keepdim=True)
            code_mean, mean = (m * codes).sum(-1, keepdim=True), (m * self.w).sum(-1, keepdim=True)
            centred = codes.sub_(code_mean)
            spread = (m * centred * centred).sum(-1, keepdim=True)
            slope = (m * centred * self.w).sum(-1, keepdim=True) / spread
        # Where all codes are equal or the slope is no usable number, the regression says nothing: s and z stay.
        usable = (spread > 0) & (slope > 0) & slope.isfinite()
        return torch.where(usable, slope, s), torch.where(usable, code_mean - mean / slope, z)

    def error(self, s: Tensor, z: Tensor) -> Tensor:
        """Sum of |w - dequantized|^p of each group, ``[R, C, 1]``."""
        residual = (self.codes(s, z) - z).mul_(s).sub_(self.w)
        if self.lp_norm == 2.0:
            return residual.square_().sum(-1, keepdim=True)
        return residual.abs_().pow_(self.lp_norm).sum(-1, keepdim=True)


def solve(groups: Tensor, nbits: int, options: SolverOptions) -> Solution:
    """Inverse scale and zero point of each group of ``[R, C, group]``, float32, least |w - dequantized|_p^p."""
    if options.levels is not None:
        scales = [fit_scales(w, options.levels.rows(part), options.lp_norm) for part, w in chunks(groups, CACHED)]
        return Solution(torch.cat(scales).reciprocal().squeeze(-1), None)
    inverse = torch.empty(groups.shape[:-1], dtype=torch.float32, device=groups.device)
    zero = torch.empty_like(inverse)
    for part, w in chunks(groups):
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        flat = constant_group(low, high)
        # In units of the group's largest weight the arithmetic is the same for weights of any size.
        unit = torch.where(flat, 1.0, torch.maximum(high.abs(), low.abs()))
        low, high = low / unit, high / unit
        s, z = search(Groups(w / unit, nbits, options.lp_norm), low, torch.where(flat, low + 1, high))
        flat_scale, flat_zero = constant_solution(low)
        inverse[part] = torch.where(flat, flat_scale, s * unit).reciprocal().squeeze(-1)
        zero[part] = torch.where(flat, flat_zero, z).squeeze(-1)
    return Solution(inverse, zero)


def search(groups: Groups, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[R, C, 1]`` of least error.

    low, high: ``[R, C, 1]``, the ends of each group's range.
    """
    last = groups.last
    best: tuple[Tensor, Tensor, Tensor] | None = None
    middle, half = (low + high) / 2, (high - low) / 2
    pulls = torch.linspace(1 - min(SHRINK / last, MAX_SHRINK), 1, STARTS).tolist()
    for pull_low in pulls:
        for pull_high in pulls:
            start = middle - half * pull_low
            s = (middle + half * pull_high - start) / last
            best = _better(groups, best, *groups.fit(s, -start / s))
    assert best is not None
    s, z = best[1:]
    for _ in range(SETTLE):
        s, z = groups.fit(s, z)
    best = _better(groups, best, s, z)
    for move in range(MOVES):
        _, s, z = best
        change = (MOVE_END if move < 4 else MOVE_BOTH) * (1 if move % 2 == 0 else -1)
        lower, upper = change * (move not in (2, 3)), change * (move >= 2)
        wider = s * (1 + (lower + upper) / last)
        s, z = wider, (z + lower) * s / wider
        for _ in range(SETTLE_MOVE):
            s, z = groups.fit(s, z)
        best = _better(groups, best, s, z)
    return best[1], best[2]


def _better(
    groups: Groups, best: tuple[Tensor, Tensor, Tensor] | None, s: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(error, scale, zero point) of each group: ``best``, or (s, z) where that has less error."""
    error = groups.error(s, z)
    if best is None:
        return error, s, z
    won = error < best[0]
    return torch.where(won, error, best[0]), torch.where(won, s, best[1]), torch.where(won, z, best[2])


register_solver("hqq_joint", solve)
