"""C++ kernels for CPUs: AVX-512 with VNNI, AVX2 or portable code, chosen when first used (HQQTENSOR_CPU forces one).

Importing this module puts the compiled kernels behind the operators for CPU tensors. Without the extension those run
through the plain path.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from hqqtensor.formats import TableFormat, format_names, get_format
from hqqtensor.ops.backend import Backend, observe_choice, register_backend

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
    """The instruction set in use: "avx512", "avx2" or "portable". RuntimeError for a HQQTENSOR_CPU that cannot be."""
    if _missing is not None:
        raise RuntimeError(_missing)
    return _C.instruction_set()


def solves(solver: str, lp_norm: float, format: str) -> bool:
    """Whether ``solve`` has this solver."""
    return format == "int" and (solver in ("rtn", "hqq") or (solver == "hqq_joint" and lp_norm == 2.0))


def solve(matrix: Tensor, nbits: int, group_size: int, axis: int, solver: str) -> tuple[Tensor, Tensor]:
    """Inverse scales and zero points, float32, of ``[N, K]``: ``[N, groups]`` (axis 1) or ``[groups, K]`` (axis 0)."""
    return _C.solve(matrix, nbits, group_size, axis, solver)


def assign(
    out: Tensor, matrix: Tensor, inverse: Tensor, zero_point: Tensor, nbits: int, group_size: int, axis: int
) -> None:
    """Pack the nearest integer codes of ``[N, K]`` into ``out``, uint8 ``[N, row_bytes]``; scales as from ``solve``."""
    _C.assign(out, matrix, inverse, zero_point, nbits, group_size, axis)


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


# No kernels by name: the operators call the compiled ones without asking the registry.
register_backend(Backend("cpu", {}, ("cpu",), why_unavailable))
if _missing is None:
    observe_choice(_follow)
    for _format in (get_format(name) for name in format_names()):
        if isinstance(_format, TableFormat):
            _C.set_table(_format.name, _format.widths[0], _format.table)
