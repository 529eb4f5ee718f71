"""The error that is shown while a model is quantized is about that of all its weights."""

import math
from typing import Any

import pytest
import torch

from hqqtensor import HqqConfig, HQQTensor
from hqqtensor.weight_error import WeightError


def quantized(weight: torch.Tensor, **settings: Any) -> HQQTensor:
    config = HqqConfig(**settings).for_tag(None)
    assert config is not None
    return HQQTensor.from_hp(weight, config, 1)


def squares(t: torch.Tensor) -> float:
    return float(t.square().sum())


@pytest.mark.parametrize(
    "settings",
    [
        {"nbits": 4}, {"nbits": 3, "group_size": 64}, {"nbits": 4, "group_size": 64, "axis": 0},
        {"nbits": 3, "group_size": 64, "rotation": True}, {"nbits": 2, "group_size": 16, "format": "codebook"},
    ],
)  # fmt: skip
def test_a_few_rows_tell_the_error_of_all(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(700, 640), 0.1 * torch.randn(256, 640), torch.randn(4, 64, 128)]
    error, difference, size = WeightError(), 0.0, 0.0
    assert error.relative is None
    for weight in weights:
        q = quantized(weight, **settings)
        error.add(weight, q)
        difference, size = difference + squares(q.dequantize() - weight), size + squares(weight)
    assert error.relative == pytest.approx(math.sqrt(difference / size), rel=0.05)


def test_stored_transposed_or_not_the_error_is_the_same() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 640)
    q = quantized(weight, nbits=4)
    plain, transposed, dense = WeightError(), WeightError(), WeightError()
    plain.add(weight, q)
    transposed.add(weight.T, q.transpose(-1, -2))
    dense.add(weight, weight)
    assert plain.relative == transposed.relative and plain.relative and dense.relative is None
