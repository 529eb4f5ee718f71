"""C++ kernels for CPUs: AMX, AVX-512 (VNNI), AVX2 or portable code, chosen when first used (HQQTENSOR_CPU forces one).

Importing this module loads the compiled library, which puts its kernels behind the operators for CPU tensors. Without
it those run through the plain path. The library uses torch's stable ABI and no symbol of Python, so one build serves
every Python and every torch that the package supports. Its stable ABI is that of ``OLDEST_TORCH``.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqqtensor.formats import Format, Levels, TableFormat, get_format, observe_formats
from hqqtensor.kernels.cpu.decoder import CompiledDecoder
from hqqtensor.ops.backend import Backend, observe_choice, register_backend
from hqqtensor.ops.encoder import ColumnSteps as ColumnStepsProtocol
from hqqtensor.ops.encoder import EncodeSettings
from hqqtensor.ops.packed import LAYOUTS, flat
from hqqtensor.solvers import Passes, Solution

OLDEST_TORCH = (2, 11)
LIBRARY = Path(__file__).parent / "libhqqtensor_cpu.so"
OPS = torch.ops.hqqtensor


def _load() -> str | None:
    """Load the library; the reason if it cannot be."""
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < OLDEST_TORCH:
        return (
            f"the compiled kernels need torch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is {torch.__version__}"
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the compiled library is not there ({error}); install with --no-build-isolation and a C++ compiler"
    return None


_missing = _load()
if _missing is not None:
    warnings.warn(f"hqqtensor runs through its plain path, many times slower: {_missing}", stacklevel=2)


def why_unavailable() -> str | None:
    """None, or why the compiled kernels cannot run here."""
    return _missing


def instruction_set() -> str:
    """The one in use: "amx", "avx512", "avx2" or "portable". RuntimeError for a HQQTENSOR_CPU that cannot be."""
    if _missing is not None:
        raise RuntimeError(_missing)
    return OPS._instruction_set()


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
    return OPS._solve(matrix, nbits, group_size, axis, solver)


def assign(
    out: Tensor, matrix: Tensor, inverse: Tensor, zero_point: Tensor, nbits: int, group_size: int, axis: int
) -> None:
    """Pack the nearest integer codes of ``[N, K]`` into ``out``, uint8 ``[N, row_bytes]``; scales as from ``solve``."""
    OPS._assign(out, matrix, inverse, zero_point, nbits, group_size, axis)


def solve_levels(matrix: Tensor, levels: Levels, group_size: int, axis: int, solver: str, format: str) -> Tensor:
    """Inverse scales as from ``solve`` for a format without zero points; ``levels`` may have a row for each of N."""
    return OPS._solve_levels(matrix, *_with_codes(levels, format), group_size, axis, solver)


def assign_levels(
    out: Tensor, matrix: Tensor, inverse: Tensor, levels: Levels, nbits: int, group_size: int, axis: int, format: str
) -> None:
    """Like ``assign``, for a format without zero points."""
    OPS._assign_levels(out, matrix, inverse, *_with_codes(levels, format), nbits, group_size, axis)


class LloydPasses:
    """``solvers.codebook.Passes`` compiled."""

    chunk = 1 << 18

    def fit(self, w: Tensor, levels: Levels) -> Tensor:
        inverse = solve_levels(w.flatten(1), levels, w.shape[-1], 1, "hqq_joint", "codebook")
        return inverse.reciprocal_().unsqueeze(-1)

    def step(self, w: Tensor, s: Tensor, levels: Levels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        error, better, top, bottom = OPS._lloyd(w, s.squeeze(-1), *_with_codes(levels, "codebook"))
        return error, better.unsqueeze(-1), top, bottom


class ColumnSteps:
    """``ops.encoder.ColumnSteps`` compiled."""

    def solve(self, group: Tensor, importance: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
        return OPS._solve_weighted(group, importance.contiguous(), nbits)

    def feed_back(
        self, group: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, nbits: int, codes: Tensor
    ) -> Tensor:
        errors = torch.empty(group.shape, dtype=torch.float32)
        OPS._feed_back(codes, errors, group, upper, scale.contiguous(), zero_point.contiguous(), nbits)
        return errors


def empty_packed(*sizes: int) -> Tensor:
    """Uninitialized memory for packed codes, uint8 on the CPU; in huge pages where the system gives them on request: to
    read packed weights is then up to 1.4 x as fast."""
    return torch.empty(sizes, dtype=torch.uint8) if _missing is not None else OPS._empty_packed(sizes)


class Pool:
    """Memory for large tensors that are made and dropped over and over; see ``pool``.

    Memory is used again only when no tensor uses it any more, so what was returned is its holder's own. At most two
    pieces wait for their next use. A copy (pickle, deepcopy) is a pool of its own with nothing in it yet.
    """

    def __init__(self) -> None:
        self._id: int = OPS._pool_new()
        self._delete = OPS._pool_delete.default  # when the process ends, modules may be gone before this object

    def empty(self, sizes: tuple[int, ...], like: Tensor) -> Tensor:
        """``like.new_empty(sizes)`` on the CPU."""
        return OPS._pool_empty(self._id, sizes, like.dtype)

    def __del__(self) -> None:
        self._delete(self._id)

    def __reduce__(self) -> tuple[Callable[[], "Pool | None"], tuple[()]]:
        return pool, ()


def pool() -> Pool | None:
    """A new pool; None without the compiled library."""
    return None if _missing is not None else Pool()


def _by_name(op: str) -> Callable[..., Any]:
    """The compiled kernel of an operator, for the registry."""
    kernel = getattr(OPS, f"_cpu_{op}").default

    def run(*args: Any) -> Any:
        out = kernel(*flat(op, args))
        return NotImplemented if out is None else out

    return run


def _learn(fmt: Format) -> None:
    """Tell the kernels what the codes of a format stand for."""
    if isinstance(fmt, TableFormat):
        OPS._set_table(fmt.name, fmt.widths[0], fmt.table.to("cpu", torch.float32).contiguous())


class _Encoder:
    """``ops.encoder.Encoder`` of the compiled solvers."""

    passes: Passes | None = LloydPasses()
    column_steps: ColumnStepsProtocol | None = ColumnSteps() if _missing is None else None
    column_spread: Callable[[Tensor, int], Tensor] | None = OPS._column_spread if _missing is None else None

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


_OPERATORS = [op for op in LAYOUTS if op != "dequantize_into"]
register_backend(
    Backend("cpu", {op: _by_name(op) for op in _OPERATORS}, ("cpu",), why_unavailable, _Encoder(), CompiledDecoder)
)
if _missing is None:
    observe_choice(OPS._set_choice_is_automatic)
    observe_formats(_learn)
