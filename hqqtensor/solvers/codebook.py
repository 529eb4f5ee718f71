"""Learned codebooks: the entries with which a weight, or each of its rows, has the least squared error.

Codes c, scales s of groups and entries t have the error sum (w - s t_c)^2. Three steps alternate, none of which raises
it: the nearest codes; the best scale of each group for them; the best entries for them. The last is Lloyd's rule in the
group-weighted form of any4 (Elhoushi and Johnson, "any4: Learned 4-bit Numeric Representation for LLMs", 2025),

    t_c = (sum of s w over the weights of code c) / (sum of s^2 over them)

4 bits start from NF4. Other widths start twice from quantiles of a normal distribution, once shifted a little to one
side and once not. The shift pays because a group may mirror its levels (a negative scale). Entries that lean to one
side give it two sets to choose from, symmetric ones the same set twice, and Lloyd's rule leaves those symmetric.
"""

from collections.abc import Iterator
from statistics import NormalDist
from typing import Protocol

import torch
from torch import Tensor

from hqqtensor.formats.levels import Levels
from hqqtensor.formats.nf4 import VALUES
from hqqtensor.solvers.base import CACHED, chunks
from hqqtensor.solvers.scale_only import Scales, fit_scales

ROUNDS = 10
SHIFT = 0.15
"""Shift of the start below 4 bits, in standard deviations of the normal distribution."""
SAMPLE = 1 << 20
"""Weights from which the one codebook of a whole tensor is learned."""


def starting_entries(nbits: int) -> list[Tensor]:
    """``[2**nbits]`` entries from -1 to 1: NF4's, or medians of equal slices of the normal one, shifted and not."""
    if nbits == 4:
        return [VALUES.clone()]
    count, normal = 2**nbits, NormalDist()
    middles = torch.tensor([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    return [(middles + shift) / (middles[-1] + shift) for shift in (SHIFT, 0.0)]


class Passes(Protocol):
    """Works on ``chunk`` weights at a time, float32 ``[R, C, group]``; ``levels`` are one set or one for each row."""

    chunk: int

    def fit(self, w: Tensor, levels: Levels) -> Tensor:
        """Scales ``[R, C, 1]`` of least squared error."""

    def step(self, w: Tensor, s: Tensor, levels: Levels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The squared error of scales ``s`` ``[rows, 1]``, the best scales for its codes, and for those scales, by
        code, sums of scale * weight and of scale^2, ``[rows, L]``; rows is that of the levels."""


class TorchPasses:
    """``Passes`` in plain torch."""

    chunk = CACHED

    def fit(self, w: Tensor, levels: Levels) -> Tensor:
        return fit_scales(w, levels, 2.0)

    def step(self, w: Tensor, s: Tensor, levels: Levels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        error, better = Scales(w, levels, 2.0).step(s)
        rows = 1 if levels.values.ndim == 1 else len(levels.values)
        codes = levels.nearest(w * better.reciprocal()).long().view(rows, -1)
        top, bottom = torch.zeros(2, rows, levels.count, device=w.device)
        for total, each in ((top, better * w), (bottom, (better * better).expand_as(w))):
            total.scatter_add_(1, codes, each.reshape(codes.shape))
        return error.view(rows, -1).sum(1, keepdim=True), better, top, bottom


TORCH_PASSES = TorchPasses()


def learn(parts: list[Tensor], nbits: int, per_row: bool, dtype: torch.dtype, passes: Passes = TORCH_PASSES) -> Tensor:
    """Entries, ascending and within -1 and 1, float32 rounded to ``dtype``: ``[R or 1, 2**nbits]``.

    parts: the groups of one weight as views ``[R, C, group]``. per_row: learn a codebook for each of the R rows;
    otherwise one for all, from an even sample of about ``SAMPLE`` weights. The result is the best of the starts and of
    what was learned from them.
    """
    groups = parts if per_row else [_sample(part, SAMPLE // len(parts)) for part in parts]
    rows = groups[0].shape[0] if per_row else 1
    units = _units(groups, rows)
    best: tuple[Tensor, Tensor] | None = None
    for start in starting_entries(nbits):
        for entries, error in _from(groups, units, start.to(groups[0].device).expand(rows, -1), dtype, passes):
            if best is not None:
                won = error < best[1]
                entries, error = torch.where(won, entries, best[0]), torch.where(won, error, best[1])
            best = entries, error
    assert best is not None
    return best[0]


def _from(
    groups: list[Tensor], units: Tensor, start: Tensor, dtype: torch.dtype, passes: Passes
) -> Iterator[tuple[Tensor, Tensor]]:
    """Entries rounded to ``dtype`` and their squared error ``[rows, 1]``: ``start``, then those learned from it."""
    scales = [torch.empty(*part.shape[:2], 1, device=part.device) for part in groups]
    for i, part, w, levels in _walk(groups, units, start, passes.chunk):
        scales[i][part] = passes.fit(w, levels)
    rounded = start.to(dtype).to(torch.float32)
    yield rounded, _pass(groups, units, rounded, scales, passes)[0]
    entries = start
    for _ in range(ROUNDS):
        _, scales, top, bottom = _pass(groups, units, entries, scales, passes)
        entries = torch.where(bottom > 0, top / bottom, entries)
        largest = entries.abs().amax(-1, keepdim=True)
        entries = entries / largest
        for s in scales:
            s *= largest.unsqueeze(-1)
    rounded = entries.to(dtype).to(torch.float32)
    yield rounded, _pass(groups, units, rounded, scales, passes)[0]


def _pass(
    groups: list[Tensor], units: Tensor, entries: Tensor, scales: list[Tensor], passes: Passes
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """``Passes.step`` over all of the weights."""
    error, better = torch.zeros(len(entries), 1, device=entries.device), [torch.empty_like(s) for s in scales]
    top, bottom = torch.zeros(2, *entries.shape, device=entries.device)
    for i, part, w, levels in _walk(groups, units, entries, passes.chunk):
        rows = slice(None) if len(entries) == 1 else part
        chunk_error, better[i][part], chunk_top, chunk_bottom = passes.step(w, scales[i][part], levels)
        for total, of_chunk in ((error, chunk_error), (top, chunk_top), (bottom, chunk_bottom)):
            total[rows] += of_chunk
    return error, better, top, bottom


def _sample(part: Tensor, most: int) -> Tensor:
    """About ``most`` weights of ``[R, C, group]``: whole groups at even distances."""
    step = -(-part.numel() // most)
    down = min(step, part.shape[0])
    return part[::down, :: -(-step // down)]


def _units(groups: list[Tensor], rows: int) -> Tensor:
    """``[rows, 1, 1]``: the largest weight of each row, or of all; in these units nothing underflows."""
    sizes = torch.stack([part.reshape(rows, -1).abs().amax(1).to(torch.float32) for part in groups]).amax(0)
    return torch.where(sizes == 0, 1.0, sizes).view(-1, 1, 1)


def _walk(
    groups: list[Tensor], units: Tensor, entries: Tensor, chunk: int
) -> Iterator[tuple[int, slice, Tensor, Levels]]:
    """(index into ``groups``, its rows, their weights in ``units``, the levels of those rows) of all chunks."""
    levels = Levels.between(entries[0] if len(entries) == 1 else entries)
    for i, part in enumerate(groups):
        for rows, w in chunks(part, chunk):
            yield i, rows, w / (units if len(units) == 1 else units[rows]), levels.rows(rows)
