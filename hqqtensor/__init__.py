"""Half-quadratic quantization of PyTorch models to 1 to 8 bits as a tensor subclass."""

from hqqtensor.config import HqqConfig, hqq_weight_only
from hqqtensor.ops.backend import backend, set_backend
from hqqtensor.tensor import HQQTensor

__version__ = "0.1.0"
__all__ = ["HQQTensor", "HqqConfig", "backend", "hqq_weight_only", "set_backend"]
