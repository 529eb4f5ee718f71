"""The interface of a solver, the registry of solvers, and iteration over chunks of groups."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hqqtensor.formats.levels import Levels

CHUNK = 1 << 21
"""Weights that a solver works on at a time: bounds the scratch memory to a few times 8 MiB."""

CACHED = 1 << 17
"""The same for solvers that go over the weights many times: a chunk and its scratch memory fit into the cache."""


@dataclass(frozen=True)
class SolverOptions:
    """Settings a solver may use.

    lp_norm: p of the error |w - dequantized|^p to minimise.
    levels: what codes stand for at scale 1; None for the integers, which have a zero point.
    """

    lp_norm: float = 2.0
    levels: Levels | None = None


@dataclass(frozen=True)
class Solution:
    """Inverse scales and zero points, float32, of the shape of the groups without their last dimension.

    Formats other than "int" have no zero point (None), may have negative scales, and an infinite inverse scale where
    all weights are zero. Codes are chosen for scales and zero points as storage rounds them; with ``exact_encode``, for
    these unrounded ones, as the published solver has it.
    """

    inverse_scale: Tensor
    zero_point: Tensor | None
    exact_encode: bool = False


class Solver(Protocol):
    """Solves all groups of one weight, given as a view of shape ``[rows, columns, group]`` of any float dtype."""

    def __call__(self, groups: Tensor, nbits: int, options: SolverOptions) -> Solution: ...


_SOLVERS: dict[str, Solver] = {}


def register_solver(name: str, solver: Solver) -> None:
    """Add ``solver`` as ``name``; a name that is taken raises ValueError."""
    if name in _SOLVERS:
        raise ValueError(f"solver {name!r} is already registered")
    _SOLVERS[name] = solver


def get_solver(name: str) -> Solver:
    """The solver called ``name``; ValueError names those on offer."""
    if not isinstance(name, str) or name not in _SOLVERS:
        raise ValueError(f"solver must be one of {solver_names()}, got {name!r}")
    return _SOLVERS[name]


def solver_names() -> list[str]:
    """Names of the registered solvers."""
    return sorted(_SOLVERS)


def chunks(groups: Tensor, size: int = CHUNK) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows of ``groups [R, C, group]``, each with its groups as contiguous float32 ``[r, C, group]``.

    size: about how many weights a slice has; never less than a row.
    """
    per_row = max(1, groups.shape[1] * groups.shape[2])
    step = max(1, size // per_row)
    for first in range(0, groups.shape[0], step):
        part = slice(first, min(first + step, groups.shape[0]))
        yield part, groups[part].to(torch.float32).contiguous()


def constant_group(low: Tensor, high: Tensor) -> Tensor:
    """Mask of the groups whose weights are all equal, or whose range is below the smallest normal float32 number."""
    return (high - low) <= torch.finfo(torch.float32).tiny


def constant_solution(value: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point that give ``value`` exactly from code 1 (positive), 0 (negative) or any (zero)."""
    scale = torch.where(value == 0, torch.ones_like(value), value.abs())
    return scale, (value < 0).to(value.dtype)
