"""monitor_quantization_performance: memory and speed before and after, measured; or a monitor around real use."""

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from hqqtensor.diagnostics.monitor import PerformanceMonitor
from hqqtensor.diagnostics.size import model_size
from hqqtensor.diagnostics.table import megabytes, text_table
from hqqtensor.forward import evaluating, run
from hqqtensor.quantize import dequantize_


@dataclass(frozen=True)
class QuantizationPerformance:
    """parameters, quantized_parameters: numbers. bytes_before, bytes_after: of all parameters.

    rate_before, rate_after: ``unit`` ("tokens" or "samples") a second, the median run.
    """

    parameters: int
    quantized_parameters: int
    bytes_before: int
    bytes_after: int
    rate_before: float
    rate_after: float
    unit: str

    @property
    def bytes_saved(self) -> int:
        """Bytes that quantization saves."""
        return self.bytes_before - self.bytes_after

    def __str__(self) -> str:
        rows = [
            ("memory", megabytes(self.bytes_before), megabytes(self.bytes_after)),
            (f"{self.unit} a second", f"{self.rate_before:,.1f}", f"{self.rate_after:,.1f}"),
        ]
        saved = self.bytes_saved / max(1, self.bytes_before)
        count = f"{self.quantized_parameters:,} of {self.parameters:,} parameters quantized"
        return f"{text_table(('', 'before', 'after'), rows)}\n{count}, {saved:.1%} of memory saved"


@overload
def monitor_quantization_performance(
    model: nn.Module, *, memory_bandwidth: float | None = None
) -> PerformanceMonitor: ...


@overload
def monitor_quantization_performance(
    model: nn.Module, inputs: Any, original: nn.Module | None = None, runs: int = 5
) -> QuantizationPerformance: ...


def monitor_quantization_performance(
    model: nn.Module,
    inputs: Any = None,
    original: nn.Module | None = None,
    runs: int = 5,
    *,
    memory_bandwidth: float | None = None,
) -> QuantizationPerformance | PerformanceMonitor:
    """Watch ``model`` while it is used, or with ``inputs`` compare it with the dense model.

    Without ``inputs``: a context manager, ``with monitor_quantization_performance(model) as monitor:``, that counts and
    times what happens in its block; see ``PerformanceMonitor``. ``memory_bandwidth``: as there.

    With ``inputs`` (tensor, sequence or mapping of arguments): run the dense and the quantized model alternately on
    them. ``original`` is the dense model; None makes one by dequantizing a copy of ``model``. After one run each to
    warm up, ``runs`` timed pairs follow. Integer inputs of rank 2 are counted as tokens, anything else as samples along
    the first dimension. The models are left as they were. ValueError without a tensor in ``inputs`` or for
    ``runs`` below 1.
    """
    if inputs is None:
        if original is not None:
            raise ValueError("original is for a comparison: give inputs too")
        return PerformanceMonitor(model, memory_bandwidth)
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}")
    arguments = inputs.values() if isinstance(inputs, Mapping) else inputs
    values = arguments if isinstance(inputs, (Mapping, tuple, list)) else (inputs,)
    first = next((v for v in values if isinstance(v, Tensor) and v.ndim > 0), None)
    if first is None:
        raise ValueError(f"inputs must hold a tensor with a batch dimension, got {type(inputs).__name__}")
    tokens = first.ndim == 2 and not first.is_floating_point()
    count = first.numel() if tokens else first.shape[0]
    if original is None:
        original = copy.deepcopy(model)
        dequantize_(original)
    times: dict[str, list[float]] = {"before": [], "after": []}
    with torch.no_grad(), evaluating(original), evaluating(model):
        for repeat in range(runs + 1):
            for when, timed in (("before", original), ("after", model)):
                started = time.perf_counter()
                run(timed, inputs)
                if first.device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:
                    times[when].append(time.perf_counter() - started)
    size = model_size(model)
    before, after = (count / statistics.median(times[when]) for when in ("before", "after"))
    return QuantizationPerformance(
        size.parameters,
        size.quantized_weights,
        model_size(original).nbytes,
        size.nbytes,
        before,
        after,
        "tokens" if tokens else "samples",
    )
