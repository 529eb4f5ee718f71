"""Half-quadratic quantization of PyTorch models to 1 to 8 bits as a tensor subclass.

``import hqqtensor`` imports torch and torchao and registers with them (``hqqtensor.registration``). What is beyond that
is imported when it is first used. The ``hqqtensor`` command registers only once it runs something, so that its help
needs no torch.
"""

import importlib
import importlib.util
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from hqqtensor.registration import register

if TYPE_CHECKING:
    from hqqtensor.background import QuantizationJob as QuantizationJob
    from hqqtensor.background import quantize_in_background as quantize_in_background
    from hqqtensor.config import HqqConfig as HqqConfig
    from hqqtensor.config import hqq_weight_only as hqq_weight_only
    from hqqtensor.diagnostics import check_quantization_status as check_quantization_status
    from hqqtensor.diagnostics import collect_quantization_debug_info as collect_quantization_debug_info
    from hqqtensor.diagnostics import monitor_quantization_performance as monitor_quantization_performance
    from hqqtensor.generation import prepare_for_generation_ as prepare_for_generation_
    from hqqtensor.generation import undo_generation_ as undo_generation_
    from hqqtensor.open_directory import load as load
    from hqqtensor.ops.backend import backend as backend
    from hqqtensor.ops.backend import set_backend as set_backend
    from hqqtensor.presets import PRESETS as PRESETS
    from hqqtensor.presets import OptimalConfig as OptimalConfig
    from hqqtensor.presets import get_optimal_quant_config as get_optimal_quant_config
    from hqqtensor.quantize import dequantize_ as dequantize_
    from hqqtensor.quantize import quantize_ as quantize_
    from hqqtensor.serialization import load_model as load_model
    from hqqtensor.serialization import save_model as save_model
    from hqqtensor.tensor import HQQTensor as HQQTensor

__version__ = "0.1.0"

_HOMES = {
    "PRESETS": "presets",
    "HQQTensor": "tensor",
    "HqqConfig": "config",
    "OptimalConfig": "presets",
    "QuantizationJob": "background",
    "backend": "ops.backend",
    "check_quantization_status": "diagnostics",
    "collect_quantization_debug_info": "diagnostics",
    "dequantize_": "quantize",
    "get_optimal_quant_config": "presets",
    "hqq_weight_only": "config",
    "load": "open_directory",
    "load_model": "serialization",
    "monitor_quantization_performance": "diagnostics",
    "prepare_for_generation_": "generation",
    "quantize_": "quantize",
    "quantize_in_background": "background",
    "save_model": "serialization",
    "set_backend": "ops.backend",
    "undo_generation_": "generation",
}
"""The module of each public name; type checkers read the imports above."""

__all__ = [*_HOMES]


def _started_as_command() -> bool:
    """Whether this process is ``hqqtensor ...`` or ``python -m hqqtensor ...``, whose ``main`` registers."""
    arguments = getattr(sys, "argv", None) or [""]  # an embedded interpreter may have none
    # While `python -m NAME` imports NAME's package, "-m" stands for the program.
    program = sys.orig_argv[-len(arguments)] if arguments[0] == "-m" else PurePath(arguments[0]).stem
    return program == "hqqtensor"


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name, or a submodule, imported at its first use."""
        if name in _HOMES:
            register()
            value = getattr(importlib.import_module(f"hqqtensor.{_HOMES[name]}"), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"hqqtensor.{name}") is not None:
            value = importlib.import_module(f"hqqtensor.{name}")
        else:
            raise AttributeError(f"module 'hqqtensor' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


if not _started_as_command():
    register()
