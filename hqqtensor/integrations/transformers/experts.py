"""transformers' operator for experts in compiled float32 code, over quantized experts.

"grouped_mm" experts call ``torch._grouped_mm``, which ``hqqtensor.tensor.products`` has. Compiled float32 code calls
``transformers::grouped_mm_fallback`` instead, with the same operands.
"""

from typing import Any

import torch

from hqqtensor.integrations import patches
from hqqtensor.integrations.versions import TRANSFORMERS
from hqqtensor.tensor import HQQTensor


def install() -> None:
    """Tell HQQTensor what the operator is; the operator itself is not changed."""
    reason = "compiled experts in float32"
    name = "ops.transformers.grouped_mm_fallback.default"
    operator = patches.find("torch", name, reason, TRANSFORMERS, library="transformers")
    if operator is not None:
        HQQTensor.implements([operator])(_grouped_mm)


def _grouped_mm(func: Any, types: Any, args: Any, kwargs: Any) -> torch.Tensor:
    x, weight, offs = args
    return torch.ops.aten._grouped_mm(x, weight, offs)
