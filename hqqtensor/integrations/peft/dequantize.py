"""peft's ``dequantize_module_weight``, by which DoRA reads base weights, learns what an HQQTensor is."""

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from hqqtensor.integrations import patches
from hqqtensor.integrations.versions import PEFT
from hqqtensor.tensor import HQQTensor


def install() -> None:
    """Change the function in its module and wherever peft has imported it from there."""
    importlib.import_module("peft.utils.integrations")
    reason = "DoRA over quantized weights"
    patches.wrap("peft.utils.integrations", "dequantize_module_weight", _for_quantized, reason, PEFT)


def _for_quantized(dequantize: Callable) -> Callable:
    def dequantize_module_weight(module: nn.Module) -> Any:
        weight = getattr(module, "weight", None)
        return weight.dequantize() if isinstance(weight, HQQTensor) else dequantize(module)

    return dequantize_module_weight
