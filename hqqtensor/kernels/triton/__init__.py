"""Triton kernels for CUDA, HIP and XPU devices.

Importing this module imports neither triton nor touches a device: the kernels load when an operator first needs them.
"""

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from hqqtensor.ops.backend import Backend, register_backend

OPERATORS = ("linear", "batched_linear", "grouped_linear", "embedding", "dequantize")
DEVICES = ("cuda", "xpu")
"""HIP devices call themselves "cuda" in PyTorch."""


def why_unavailable() -> str | None:
    """None, or why the kernels cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return None
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        return "there is no CUDA, HIP or XPU device"
    return None


def _lazy(op: str) -> Callable[..., Tensor]:
    def run(*args: object) -> Tensor:
        from hqqtensor.kernels.triton import launch

        return getattr(launch, op)(*args)

    return run


LONGEST_GROUP = 4096
"""Members of a group that the solvers still hold in registers."""


def why_not_solved(solver: str, lp_norm: float, format: str, members: int) -> str | None:
    """None, or why ``solve_groups`` cannot find scales for groups of so many members."""
    if format != "int":
        return f"format {format!r}: the Triton solvers have integers only"
    if solver not in ("rtn", "hqq_joint"):
        return f"solver {solver!r}: the Triton kernels have 'rtn' and 'hqq_joint'"
    if solver == "hqq_joint" and lp_norm != 2.0:
        return f"lp_norm {lp_norm}: the Triton solver has 2.0 only"
    if members > LONGEST_GROUP:
        return f"groups of {members}: the Triton solvers hold up to {LONGEST_GROUP} in registers"
    return None


def solve_groups(matrix: Tensor, nbits: int, group_size: int, axis: int, solver: str) -> tuple[Tensor, Tensor]:
    """Inverse scales and zero points, float32, of ``[N, K]``: ``[N, groups]`` (axis 1) or ``[groups, K]`` (axis 0)."""
    from hqqtensor.kernels.triton import launch

    return launch.solve(matrix, nbits, group_size, axis, solver)


def pack_codes(
    out: Tensor, matrix: Tensor, inverse: Tensor, zero_point: Tensor, nbits: int, group_size: int, axis: int
) -> None:
    """Pack the nearest integer codes of ``[N, K]`` into ``out``, uint8 ``[N, row_bytes]``."""
    from hqqtensor.kernels.triton import launch

    launch.assign(out, matrix, inverse, zero_point, nbits, group_size, axis)


register_backend(Backend("triton", {op: _lazy(op) for op in OPERATORS}, DEVICES, why_unavailable))
