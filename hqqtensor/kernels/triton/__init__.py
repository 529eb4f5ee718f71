"""Triton kernels for CUDA, HIP and XPU devices.

Importing this module imports neither triton nor touches a device: the kernels load when an operator first needs them.
"""

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from hqqtensor.kernels.triton.encoder import TritonEncoder
from hqqtensor.ops.backend import Backend, register_backend
from hqqtensor.ops.batch_invariant import BATCH_INVARIANT

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
        if BATCH_INVARIANT and op.endswith("linear"):  # the number of rows chooses tiles and kernels
            return NotImplemented
        from hqqtensor.kernels.triton import launch

        return getattr(launch, op)(*args)

    return run


register_backend(Backend("triton", {op: _lazy(op) for op in OPERATORS}, DEVICES, why_unavailable, TritonEncoder()))
