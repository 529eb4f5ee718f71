"""Half-quadratic quantization of PyTorch models to 1 to 8 bits as a tensor subclass."""

from hqqtensor.config import HqqConfig, hqq_weight_only
from hqqtensor.diagnostics import (
    check_quantization_status,
    collect_quantization_debug_info,
    monitor_quantization_performance,
)
from hqqtensor.integrations import register_when_imported
from hqqtensor.ops.backend import backend, set_backend
from hqqtensor.presets import PRESETS, OptimalConfig, get_optimal_quant_config
from hqqtensor.quantize import dequantize_, quantize_
from hqqtensor.serialization import load_model, save_model
from hqqtensor.tensor import HQQTensor

__version__ = "0.1.0"
register_when_imported()
__all__ = [
    "PRESETS",
    "HQQTensor",
    "HqqConfig",
    "OptimalConfig",
    "backend",
    "check_quantization_status",
    "collect_quantization_debug_info",
    "dequantize_",
    "get_optimal_quant_config",
    "hqq_weight_only",
    "load_model",
    "monitor_quantization_performance",
    "quantize_",
    "save_model",
    "set_backend",
]
