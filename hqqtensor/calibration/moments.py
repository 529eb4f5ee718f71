"""Second moments of a layer's inputs, and what error feedback needs of them."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hqqtensor.transforms import rotate

DAMPING = 0.01
"""Share of the diagonal's mean that is added to the diagonal before a matrix is inverted."""
SHIFT = 0.5
"""How far a weight moves to make up for inputs that quantized layers before it have changed; see ``InputMoments``."""


@dataclass(frozen=True)
class InputMoments:
    """Moments of the inputs x of a layer, over the tokens of the calibration.

    second: float32 mean of x x^T ``[K, K]``, or its diagonal ``[K]``. cross: float32 ``[K, K]``, mean of (d - x) x^T
    with d the inputs that the dense model has at the same tokens; None where they are not known. missing: float32
    ``[N, K]``, mean of t x^T with t what the output of a layer's block lacks, for a layer that adds its output to that.
    """

    second: Tensor
    cross: Tensor | None = None
    missing: Tensor | None = None

    @property
    def diagonal(self) -> Tensor:
        """Mean of x^2, ``[K]``."""
        return self.second if self.second.ndim == 1 else self.second.diagonal()

    @functools.cached_property
    def lower(self) -> Tensor | None:
        """``damped_factor`` of ``second``."""
        return damped_factor(self.second)

    @functools.cached_property
    def upper(self) -> Tensor:
        """``inverse_factor`` of ``second``."""
        return inverse_factor(self.second, self.lower)

    def towards_dense(self, weight: Tensor) -> Tensor:
        """``weight`` float32 ``[N, K]`` moved so that its outputs on x are nearest what the dense model has there.

        Least squares gives W + T S^-1 with S the (damped) second moments and T the mean of t x^T, where t is what the
        outputs lack: W (d - x), or ``missing`` where that is known. GPTAQ (Li et al. 2025, arXiv 2504.02692) finds the
        former column by column. ``SHIFT`` of the change is taken, which guards against fitting the text.
        """
        lacks = self.missing
        if lacks is None and self.cross is not None:
            lacks = weight @ self.cross
        if lacks is None or self.lower is None:
            return weight
        change = torch.cholesky_solve(lacks.to(torch.float64).T, self.lower).T
        return weight + SHIFT * change.to(torch.float32)

    def prepared(self, act: Tensor | None, block: int) -> "InputMoments":
        """Moments of the inputs times ``act`` ``[K]``, then rotated in blocks (0: not at all)."""
        if act is None and not block:
            return self
        d = torch.ones(len(self.second), device=self.second.device) if act is None else act.to(torch.float32)
        if self.second.ndim == 1:
            return InputMoments(self.second * d * d)

        def right(m: Tensor) -> Tensor:
            return rotate(m * d, block) if block else m * d

        def both(m: Tensor) -> Tensor:
            return right(right(m).T).T

        cross, missing = self.cross, self.missing
        return InputMoments(
            both(self.second), None if cross is None else both(cross), None if missing is None else right(missing)
        )


class MomentSums:
    """Adds up moments of the inputs of a layer, and of something else with them."""

    def __init__(self) -> None:
        self.second = self.other = torch.empty(0)
        self.count = 0

    def add(self, x: Tensor, other: Tensor | None = None) -> None:
        """Inputs ``x [tokens, K]``, and ``other [tokens, N]`` at the same tokens."""
        x = x.to(torch.float32)
        if self.count == 0:
            size = x.shape[1]
            self.second = torch.zeros(size, size, device=x.device)
            self.other = torch.zeros(0 if other is None else other.shape[1], size, device=x.device)
        self.second.addmm_(x.T, x)
        if other is not None:
            self.other.addmm_(other.to(torch.float32).T, x)
        self.count += len(x)

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of x x^T ``[K, K]`` and of other x^T ``[N, K]``, float32."""
        return self.second / max(1, self.count), self.other / max(1, self.count)


def damped_factor(moments: Tensor, more: float = 0.0) -> Tensor | None:
    """Lower Cholesky factor, float64 ``[K, K]``, of the damped ``moments``; None where all inputs are zero.

    moments: float32 ``[K, K]``. ``DAMPING`` of the diagonal's mean is added to the diagonal, ten times more as long as
    that does not make the matrix positive definite, and ``more`` times the mean at first. Inputs that are always zero
    get the mean.
    """
    h = moments.to(torch.float64).clone()
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        return None
    diagonal[diagonal == 0] = mean
    diagonal.add_(more * mean)
    damping = DAMPING * mean
    while True:
        diagonal.add_(damping)
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0:
            return lower
        damping *= 10


def inverse_factor(moments: Tensor, lower: Tensor | None) -> Tensor:
    """Upper triangular U, float32 ``[K, K]``, with U^T U the inverse of the damped ``moments``; see ``damped_factor``.

    lower: that factor.
    """
    more = DAMPING
    while lower is not None:
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if int(info) == 0:
            return upper.to(torch.float32).contiguous()
        more *= 10
        lower = damped_factor(moments, more)
    return torch.eye(len(moments), dtype=torch.float32, device=moments.device)
