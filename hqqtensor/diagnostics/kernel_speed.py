"""How long the products of one token take on this machine, estimated from some rows of random weights."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hqqtensor.config import HqqConfig
from hqqtensor.tensor import HQQTensor

MOST_WEIGHTS = 8_000_000  # of one matrix; larger ones are estimated from some of their rows
READ_BYTES = 96 << 20  # copies take turns until this much is read, so that none waits in a cache
MOST_COPIES = 64
FEW_ROWS = 8  # of a product that is little but its call


def seconds_of_product(
    out_features: int, in_features: int, config: HqqConfig | None, dtype: torch.dtype, seconds: float
) -> float:
    """Seconds of ``x [1, in_features] @ w.T`` in ``dtype``, with ``w [out_features, in_features]`` quantized.

    config: None for a dense weight. seconds: about how long to measure. What a call from Python takes is left out for
    quantized weights, since ``prepare_for_generation_`` makes the products of a layer without such calls.
    """
    rows = max(1, min(out_features, MOST_WEIGHTS // in_features))
    weight = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed: Tensor = weight if config is None else HQQTensor.from_hp(weight, config)
    copies = [packed, *(packed.clone() for _ in range(min(MOST_COPIES, READ_BYTES // packed.nbytes)))]
    x = torch.randn(1, in_features, dtype=dtype)
    if config is None or rows <= FEW_ROWS:
        return median_seconds(copies, x, seconds) * out_features / rows
    few = [HQQTensor.from_hp(weight[:FEW_ROWS], config)]
    measured = median_seconds(copies, x, 0.8 * seconds) - median_seconds(few, x, 0.2 * seconds)
    return max(0.0, measured) * out_features / (rows - FEW_ROWS)


@torch.no_grad()
def median_seconds(weights: Sequence[Tensor], x: Tensor, seconds: float) -> float:
    """Median seconds of a product with one of ``weights``, which take turns; at least one turn after the first."""
    times: list[float] = []
    end = 0.0
    while not times or time.perf_counter() < end:
        is_first = end == 0.0
        started = time.perf_counter()
        for weight in weights:
            F.linear(x, weight)
        if is_first:
            end = time.perf_counter() + seconds
        else:
            times.append((time.perf_counter() - started) / len(weights))
    return statistics.median(times)
