"""Second moments of the inputs of LoRA layers over quantized linear weights, of few layers at a time."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from hqqtensor.calibration.inputs import watch, whole_passes
from hqqtensor.calibration.moments import MomentSums
from hqqtensor.integrations.peft import lora

BYTES_AT_A_TIME = 2**30
"""Moments in memory, unless one layer has more: the batches run again for the next layers."""


def moments_in_turn(
    model: nn.Module, layers: dict[str, Any], batches: Iterable[Any] | None
) -> Iterator[tuple[str, Tensor | None]]:
    """Each name of ``layers`` once, with the float32 mean of x x^T ``[K, K]`` of its inputs while ``batches`` run.

    model: has the ``layers``. None without batches, for experts and embeddings, and, with a warning, for layers that no
    batch reached. ValueError for no batches, or inputs that are not finite.
    """
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, lora.HqqLoraLinear)}
    if batches is None:
        linear = {}
    else:
        batches = list(batches)
        if not batches:
            raise ValueError("batches: there must be at least one, or None to weigh all inputs alike")
    yield from ((name, None) for name in layers if name not in linear)
    module_names = {id(module): name for name, module in model.named_modules()}
    for group in _groups(linear):
        sums = {module_names[id(linear[name])]: MomentSums() for name in group}
        _add_up(model, sums, batches or ())
        for name, seen in zip(group, sums.values(), strict=True):
            if not seen.count:
                warnings.warn(f"{name}: no batch reached it, all of its inputs weigh alike", stacklevel=2)
                yield name, None
                continue
            second, _ = seen.means()
            if not bool(second.isfinite().all()):
                raise ValueError(f"{name}: its inputs are not finite on the batches")
            yield name, second


def _add_up(model: nn.Module, sums: dict[str, MomentSums], batches: Iterable[Any]) -> None:
    watch(model, sums, whole_passes(model, batches), lambda name, rows: sums[name].add(rows))


def _groups(layers: dict[str, Any]) -> Iterator[list[str]]:
    """The names in turn, as many as have moments of ``BYTES_AT_A_TIME``."""
    group: list[str] = []
    size = 0
    for name, layer in layers.items():
        moments = 4 * layer.in_features**2
        if group and size + moments > BYTES_AT_A_TIME:
            yield group
            group, size = [], 0
        group.append(name)
        size += moments
    if group:
        yield group
