"""What is quantized, what it costs and what it gains: typed results with a table as ``str()``."""

from hqqtensor.diagnostics.debug_info import collect_quantization_debug_info
from hqqtensor.diagnostics.performance import monitor_quantization_performance
from hqqtensor.diagnostics.size import model_size
from hqqtensor.diagnostics.status import check_quantization_status

__all__ = [
    "check_quantization_status",
    "collect_quantization_debug_info",
    "model_size",
    "monitor_quantization_performance",
]
