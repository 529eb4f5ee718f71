"""Teach peft's ``dequantize_module_weight``, by which DoRA reads base weights, what an HQQTensor is."""

import functools
import sys
from typing import Any

import torch

from hqqtensor.tensor import HQQTensor


def install() -> None:
    """Wrap the function in its module and wherever it was imported from there; once."""
    original = sys.modules["peft.utils.integrations"].dequantize_module_weight
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def dequantize_module_weight(module: torch.nn.Module) -> Any:
        weight = getattr(module, "weight", None)
        return weight.dequantize() if isinstance(weight, HQQTensor) else original(module)

    for name, module in list(sys.modules.items()):
        if name.startswith("peft.") and getattr(module, "dequantize_module_weight", None) is original:
            module.dequantize_module_weight = dequantize_module_weight  # type: ignore[attr-defined]
