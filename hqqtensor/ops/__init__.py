"""Operators on packed weights: definitions, the plain reference, and the choice of backend."""

from hqqtensor.ops.backend import backend, register_backend, set_backend
from hqqtensor.ops.definitions import (
    batched_linear,
    dequantize,
    dequantize_into,
    embedding,
    grouped_linear,
    linear,
    linear_many,
)

__all__ = [
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

from hqqtensor.kernels import cpu as cpu
from hqqtensor.kernels import triton as triton
from hqqtensor.ops import batching as batching

if cpu.why_unavailable() is not None:
    from hqqtensor.ops import gradients

    gradients.register()
