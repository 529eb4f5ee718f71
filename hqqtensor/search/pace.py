"""How long measuring takes, and what to take for layers that no time was left for."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hqqtensor.search.layers import Layer
from hqqtensor.stored_size import stored_bytes


class Pace:
    """Foretells the time of layers from those measured so far, and keeps a limit.

    A layer takes a pass through the model for each of its solvers, and time in proportion to the weights that are
    quantized. limit: seconds from now on, None for no end.
    """

    def __init__(self, limit: float | None) -> None:
        self.started = time.monotonic()
        self.limit = limit
        self.pass_seconds = 0.0  # of one pass through the model; 0 where none is made
        self.seconds_in_passes = self.seconds = 0.0
        self.weights = 0

    def allows(self, layer: Layer) -> bool:
        """Whether ``layer`` can be measured within the limit, as far as is known; the first always may be."""
        if self.limit is None or not self.weights:
            return True
        return time.monotonic() - self.started + self.expect([layer]) <= self.limit

    def expect(self, layers: Iterable[Layer]) -> float:
        """Seconds that measuring ``layers`` will take."""
        rate = max(0.0, self.seconds - self.seconds_in_passes) / max(1, self.weights)
        return sum(_passes(layer) * self.pass_seconds + _weights(layer) * rate for layer in layers)

    def add(self, layer: Layer, seconds: float) -> None:
        """``layer`` was measured in ``seconds``."""
        self.seconds += seconds
        self.seconds_in_passes += _passes(layer) * self.pass_seconds
        self.weights += _weights(layer)


def _passes(layer: Layer) -> int:
    return len({config.solver for config in layer.configs if config is not None})


def _weights(layer: Layer) -> int:
    """Weights to quantize, all candidates together."""
    return layer.weight.numel() * sum(config is not None for config in layer.configs)


def estimate(layer: Layer, layers: Sequence[Layer], measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """An entry of ``Sensitivity.layers`` for a layer that was not measured; its key is empty.

    measured: entries of some of ``layers``, one at least. Losses lie between those of the nearest layers of the same
    kind. Where none of its kind was measured, each bit a weight is taken to divide the loss by four. Sizes are those
    of stored_bytes, with float32 scales where the dtype is left to the weight's numbers.
    """
    shape = list(layer.weight.shape)
    sizes = [None if config is None else stored_bytes(shape, config, torch.float32) for config in layer.configs]
    alike = [other for other in layers if other.kind == layer.kind]
    known = [(i, measured[other.name]["loss"]) for i, other in enumerate(alike) if other.name in measured]
    losses = _between(alike.index(layer), known) if known else _by_size(layer, sizes, layers, measured)
    return {"key": "", "bytes": sizes, "loss": losses}


def _between(place: int, known: Sequence[tuple[int, list[float | None]]]) -> list[float | None]:
    """Losses at ``place``, on lines between those of the nearest places on both sides, or those of the nearest one."""
    low, first = max((each for each in known if each[0] < place), default=known[0], key=lambda each: each[0])
    high, last = min((each for each in known if each[0] > place), default=known[-1], key=lambda each: each[0])
    share = min(1.0, max(0.0, (place - low) / (high - low))) if high != low else 0.0
    pairs = zip(first, last, strict=True)
    return [None if a is None or b is None else (1 - share) * a + share * b for a, b in pairs]


def _by_size(
    layer: Layer, sizes: Sequence[int | None], layers: Sequence[Layer], measured: dict[str, dict[str, Any]]
) -> list[float | None]:
    """Losses that fall by four with each bit, from the mean over all that was measured."""
    weight_of = {other.name: other.weight.numel() for other in layers}
    at_no_bits = [
        loss / weight_of[name] * 4 ** (8 * size / weight_of[name])
        for name, entry in measured.items()
        for size, loss in zip(entry["bytes"], entry["loss"], strict=True)
        if size is not None
    ]
    mean, count = sum(at_no_bits) / len(at_no_bits), layer.weight.numel()
    return [None if size is None else mean * count * 4 ** (-8 * size / count) for size in sizes]
