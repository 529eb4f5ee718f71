"""C++ kernels for CPUs: AMX, AVX-512 (VNNI), AVX2 or portable code, chosen when first used (HQQTENSOR_CPU forces one).

Importing this module puts the compiled kernels behind the operators for CPU tensors. Without the extension those run
through the plain path.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hqqtensor.formats import Levels, TableFormat, format_names, get_format
from hqqtensor.ops.backend import Backend, observe_choice, register_backend
from hqqtensor.ops.encoder import EncodeSettings
from hqqtensor.solvers import Passes, Solution

_missing: str | None = None
_C: Any
try:
    from hqqtensor.kernels.cpu import _C  # type: ignore[no-redef]
except ImportError as error:
    _missing = f"the compiled extension is not there ({error}); install with --no-build-isolation and a C++ compiler"
    warnings.warn(f"hqqtensor runs through its plain path, many times slower: {_missing}", stacklevel=2)


def why_unavailable() -> str | None:
    """None, or why the compiled kernels cannot run here."""
    return _missing


def instruction_set() -> str:
    """The one in use: "amx", "avx512", "avx2" or "portable". RuntimeError for a HQQTENSOR_CPU that cannot be."""
    if _missing is not None:
        raise RuntimeError(_missing)
    return _C.instruction_set()


def solves(solver: str, lp_norm: float, format: str) -> bool:
    """Whether ``solve`` (format "int") or ``solve_levels`` has this solver."""
    if solver == "hqq":
        return format == "int"
    return (solver == "rtn" or (solver == "hqq_joint" and lp_norm == 2.0)) and assigns(format)


def assigns(format: str) -> bool:
    """Whether ``assign`` (format "int") or ``assign_levels`` has this format."""
    fmt = get_format(format)
    if isinstance(fmt, TableFormat):
        return fmt.rounding is not None or len(fmt.codes) <= 16
    return format == "int" or fmt.learned


def _with_codes(levels: Levels, format: str) -> tuple[Tensor, Tensor, Tensor, int, float]:
    fmt = get_format(format)
    codes = fmt.codes if isinstance(fmt, TableFormat) else torch.arange(levels.count, dtype=torch.uint8)
    rounding = fmt.rounding if isinstance(fmt, TableFormat) else None
    return levels.values, levels.thresholds, codes, *(rounding or (-1, 0.0))


def solve(matrix: Tensor, nbits: int, group_size: int, axis: int, solver: str) -> tuple[Tensor, Tensor]:
    """Inverse scales and zero points, float32, of ``[N, K]``: ``[N, groups]`` (axis 1) or ``[groups, K]`` (axis 0)."""
    return _C.solve(matrix, nbits, group_size, axis, solver)


def assign(
    out: Tensor, matrix: Tensor, inverse: Tensor, zero_point: Tensor, nbits: int, group_size: int, axis: int
) -> None:
    """Pack the nearest integer codes of ``[N, K]`` into ``out``, uint8 ``[N, row_bytes]``; scales as from ``solve``."""
    _C.assign(out, matrix, inverse, zero_point, nbits, group_size, axis)


def solve_levels(matrix: Tensor, levels: Levels, group_size: int, axis: int, solver: str, format: str) -> Tensor:
    """Inverse scales as from ``solve`` for a format without zero points; ``levels`` may have a row for each of N."""
    return _C.solve_levels(matrix, group_size, axis, solver, _with_codes(levels, format))


def assign_levels(
    out: Tensor, matrix: Tensor, inverse: Tensor, levels: Levels, nbits: int, group_size: int, axis: int, format: str
) -> None:
    """Like ``assign``, for a format without zero points."""
    _C.assign_levels(out, matrix, inverse, _with_codes(levels, format), nbits, group_size, axis)


class LloydPasses:
    """``solvers.codebook.Passes`` compiled."""

    chunk = 1 << 18

    def fit(self, w: Tensor, levels: Levels) -> Tensor:
        inverse = solve_levels(w.flatten(1), levels, w.shape[-1], 1, "hqq_joint", "codebook")
        return inverse.reciprocal_().unsqueeze(-1)

    def step(self, w: Tensor, s: Tensor, levels: Levels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        error, better, top, bottom = _C.lloyd(w, s.squeeze(-1), _with_codes(levels, "codebook"))
        return error, better.unsqueeze(-1), top, bottom


def empty_packed(*sizes: int) -> Tensor:
    """Room for packed codes, uint8 on the CPU; in huge pages where the system gives them on request: to read packed
    weights is then up to 1.4 x as fast."""
    return torch.empty(sizes, dtype=torch.uint8) if _missing is not None else _C.empty_packed(sizes)


def pool() -> Any:
    """An owner of memory for large tensors that are made and dropped over and over; None without the extension.

    ``pool().empty(sizes, like)`` is ``like.new_empty(sizes)`` on the CPU. Memory is used again only when no tensor uses
    it any more, so what was returned is its holder's own. At most two pieces wait for their next use.
    """
    return None if _missing is not None else _C.Pool()


def _follow(process: str, thread: str | None) -> None:
    codes = {"auto": 0, "cpu": 1}
    _C.set_process_choice(codes.get(process, 2))
    _C.set_thread_choice(-1 if thread is None else codes.get(thread, 2))


class _Encoder:
    """``ops.encoder.Encoder`` of the compiled solvers."""

    passes: Passes | None = LloydPasses()

    def why_not(self, step: str, matrix: Tensor, settings: EncodeSettings) -> str | None:
        if not assigns(settings.format):
            return f"format {settings.format!r}: the C++ kernels have no tables of more than 16 numbers"
        if step == "assign" or solves(settings.solver, settings.lp_norm, settings.format):
            return None
        if settings.solver == "hqq_joint":
            return f"lp_norm {settings.lp_norm}: the C++ solver has 2.0 only"
        return f"solver {settings.solver!r}: the C++ kernels have 'rtn', 'hqq_joint' and, for integers, 'hqq'"

    def solve(self, matrix: Tensor, settings: EncodeSettings, levels: Levels | None) -> Solution:
        group_size, axis, solver = settings.group_size, settings.axis, settings.solver
        if levels is None:
            inverse, zero_point = solve(matrix, settings.nbits, group_size, axis, solver)
            return Solution(inverse, zero_point, exact_encode=solver == "hqq")
        return Solution(solve_levels(matrix, levels, group_size, axis, solver, settings.format), None)

    def assign(
        self, out: Tensor, matrix: Tensor, inverse_scale: Tensor, zero_point: Tensor | None, settings: EncodeSettings
    ) -> None:
        fmt, where = get_format(settings.format), (settings.nbits, settings.group_size, settings.axis)
        if fmt.has_zero_point:
            assert zero_point is not None
            return assign(out, matrix, inverse_scale, zero_point, *where)
        levels = fmt.levels(settings.nbits) if zero_point is None else Levels.between(zero_point)
        assert levels is not None
        return assign_levels(out, matrix, inverse_scale, levels, *where, settings.format)

    def empty_packed(self, sizes: Sequence[int], device: torch.device) -> Tensor:
        return empty_packed(*sizes)


# No kernels by name: the operators call the compiled ones without asking the registry.
register_backend(Backend("cpu", {}, ("cpu",), why_unavailable, _Encoder()))
if _missing is None:
    observe_choice(_follow)
    for _format in (get_format(name) for name in format_names()):
        if isinstance(_format, TableFormat):
            _C.set_table(_format.name, _format.widths[0], _format.table)
