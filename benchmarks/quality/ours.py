"""hqqtensor's own settings in the table."""

from torch import nn

from benchmarks.quality.method import Method
from benchmarks.quality.task import Task
from hqqtensor import HqqConfig, dequantize_, quantize_
from hqqtensor.diagnostics import model_size


def _apply(model: nn.Module, task: Task, config: HqqConfig) -> float:
    names = set(task.layers)
    quantize_(model, config, filter_fn=lambda _, name: name in names)
    bits = 8.0 * model_size(model).quantized_nbytes
    dequantize_(model)
    return bits


def methods() -> list[Method]:
    found = []
    for b in (8, 4, 3, 2):
        plain = HqqConfig(b, 64)
        found.append(Method(f"hqqtensor {b}-bit g64", b, lambda m, t, c=plain: _apply(m, t, c), ours=True))
    return found
