"""Operators on packed weights: definitions, gradients, the plain reference, and the choice of backend."""

from hqqtensor.ops.backend import backend, register_backend, set_backend
from hqqtensor.ops.calls import (
    batched_linear,
    dequantize,
    dequantize_into,
    embedding,
    grouped_linear,
    linear,
    linear_many,
)
from hqqtensor.ops.packed import PackedWeight

__all__ = [
    "PackedWeight",
    "backend",
    "batched_linear",
    "dequantize",
    "dequantize_into",
    "embedding",
    "grouped_linear",
    "linear",
    "linear_many",
    "register_backend",
    "set_backend",
]

# isort: split
from hqqtensor.ops import attention as attention  # before the kernels, which implement it

# isort: split
from hqqtensor.kernels import cpu as cpu
from hqqtensor.kernels import triton as triton
from hqqtensor.ops import batching as batching
