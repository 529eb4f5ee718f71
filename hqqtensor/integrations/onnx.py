"""``torch.onnx.export`` of a quantized model: refused at once, with what to do instead."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hqqtensor.integrations import patches
from hqqtensor.integrations.versions import TORCH
from hqqtensor.tensor import HQQTensor


def install() -> None:
    """Check models before ``torch.onnx.export`` does; it is told to go on by a ``custom_translation_table``."""
    reason = "the message on exporting a quantized model to ONNX"
    patches.wrap("torch.onnx", "export", _checked, reason, TORCH)


def _checked(export: Callable) -> Callable:
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("custom_translation_table"):
            _refuse(args[0] if args else kwargs.get("model"))
        return export(*args, **kwargs)

    return checked


def _refuse(model: Any) -> None:
    """NotImplementedError for a model with quantized weights, or a program that was exported from one."""
    what = None
    if isinstance(model, nn.Module):
        names = [name for name, p in model.named_parameters() if isinstance(p, HQQTensor)]
        what = f"{names[0]} is quantized" if names else None
    elif isinstance(model, torch.export.ExportedProgram):
        targets = [str(node.target) for node in model.graph.nodes]
        operators = [target for target in targets if target.startswith("hqqtensor.")]
        what = f"the program calls {operators[0]}" if operators else None
    if what is not None:
        raise NotImplementedError(
            f"torch.onnx.export: {what}, and ONNX has no operator for packed weights; call "
            "hqqtensor.dequantize_(model) first, on a copy if the quantized model is still needed"
        )
